//! Fingerprints: of work, and of what work reads.

use std::path::Path;

use super::{
    AnyStage,
    folder::{CONFIG, DONE, read_config},
};
use crate::{Error, Result, data, fs};

/// The version of what stages write. It is part of every fingerprint, so after a change of format all work is
/// redone.
const FORMAT: u32 = 6;

/// The fingerprint of work: BLAKE3 over stage, identity, input fingerprints and format version, 64 hex digits.
pub fn fingerprint(stage: &dyn AnyStage, inputs: &[(&'static str, String)]) -> String {
    // serde_json's maps are sorted, so equal settings give equal text.
    let text = serde_json::json!({
        "format": FORMAT + stage.revision(),
        "stage": stage.name(),
        "settings": stage.identity(),
        "inputs": inputs,
    });
    blake3::hash(text.to_string().as_bytes()).to_hex().to_string()
}

/// The fingerprint of an input: a stage's folder, another folder or file, or a data source.
///
/// Fails with [`Error::Usage`] if it is the folder of a stage that is not finished.
pub fn input_fingerprint(input: &str) -> Result<String> {
    let path = Path::new(input);
    if path.join(CONFIG).is_file() {
        let config = read_config(path)?;
        if !path.join(DONE).is_file() {
            bail!(Usage, "input '{input}' is not finished; run its {} again first", config.stage);
        }
        return Ok(config.fingerprint);
    }
    if path.is_dir()
        && ["config.json", "model_index.json", "manifest.json"].iter().any(|f| path.join(f).is_file())
    {
        let mut hasher = blake3::Hasher::new();
        for file in fs::files_below(path)? {
            let known = [&["json", "safetensors"][..], &data::source::EXTENSIONS].concat();
            let extension = file.extension().map(|e| e.to_string_lossy().to_lowercase());
            if extension.is_some_and(|e| known.contains(&&*e)) {
                hasher.update(file.to_string_lossy().as_bytes());
                hasher.update(fs::hash_file(&path.join(&file))?.0.as_bytes());
            }
        }
        return Ok(hasher.finalize().to_hex().to_string());
    }
    let source: data::Source = input.parse().map_err(Error::Usage)?;
    source.fingerprint_all()
}
