//! Doing a stage's work in its folder.

use std::{path::Path, sync::OnceLock, time::Instant};

use serde_json::Value;

use super::{
    AnyStage, FolderConfig, InputRecord, Job, Outcome, State,
    fingerprint::fingerprint,
    folder::{read_done, state},
};
use crate::{
    Error, Result,
    device::{DeviceChoice, device_class},
};

/// Runs `stage` with the output folder `out`, unless it is already done. Returns the summary.
pub fn execute(
    stage: &dyn AnyStage,
    inputs: &[(&'static str, String)],
    out: &Path,
    device: DeviceChoice,
) -> Result<Value> {
    stage.validate()?;
    // TOML's integers are signed.
    if let Some(seed) = stage.settings()["seed"].as_u64().filter(|&seed| seed > i64::MAX as u64) {
        bail!(Usage, "seed is {seed}, expected at most {}", i64::MAX);
    }
    let fingerprint = fingerprint(stage, inputs);
    if state(out, &fingerprint)? == State::Done
        && let Some(done) = read_done(out)?
    {
        return Ok(done.summary);
    }
    let device = device.open()?;
    let job = Job {
        device_class: device_class(&device),
        device,
        config: config_text(stage, &fingerprint, inputs)?,
        fingerprint,
        out: out.to_path_buf(),
        lock: OnceLock::new(),
    };
    let started = Instant::now();
    match stage.run(&job)? {
        Outcome::Partial(summary) => Ok(summary),
        Outcome::Done(summary) => job.finish(stage.name(), summary, started.elapsed().as_secs_f64()),
    }
}

fn config_text(stage: &dyn AnyStage, fingerprint: &str, inputs: &[(&'static str, String)]) -> Result<String> {
    let settings = toml::Table::try_from(stage.settings())
        .map_err(|e| Error::Alarm(format!("settings of {} cannot be written as TOML: {e}", stage.name())))?;
    let config = FolderConfig {
        schema: "proxyset.config/1".into(),
        stage: stage.name().into(),
        fingerprint: fingerprint.into(),
        inputs: stage
            .inputs()
            .into_iter()
            .zip(inputs)
            .map(|((key, name), (_, fingerprint))| InputRecord {
                key: key.into(),
                name,
                fingerprint: fingerprint.clone(),
            })
            .collect(),
        settings,
    };
    toml::to_string(&config).map_err(|e| Error::Alarm(format!("configuration cannot be written: {e}")))
}
