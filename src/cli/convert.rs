//! `proxyset convert SOURCE --out DIR`.

use std::path::PathBuf;

use super::{global::Global, table};
use crate::{
    Result,
    convert::{Stated, convert, setting},
};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// A file of safetensors or of PyTorch (.pt, .pth, .bin); a folder with one and its config.json; or a model folder
    /// of diffusers.
    source: PathBuf,
    /// The folder for the model. It must be new.
    #[arg(long)]
    out: PathBuf,
    /// Which of several state dicts in a checkpoint, as in `--key ema`; keys of nested dicts are joined by dots.
    #[arg(long)]
    key: Option<String>,
    /// The network, if it is not recognised from names and shapes: `arch` of a classifier, `_class_name` of a
    /// denoiser.
    #[arg(long)]
    network: Option<String>,
    /// The config.json of the network.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A key of the configuration, as in `--set image_size=32`. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Names of a classifier's classes, in the order of the logits.
    #[arg(long, value_delimiter = ',')]
    class_names: Vec<String>,
    /// With what noise a denoiser was trained: its scheduler_config.json, `ddpm-linear-1000` or `edm`.
    #[arg(long)]
    scheduler: Option<String>,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let Args { source, out, key, network, config, set, class_names, scheduler } = args.clone();
    let settings = set.iter().map(|assignment| setting(assignment)).collect::<Result<_>>()?;
    let summary = convert(&source, &Stated { key, network, config, settings, class_names, scheduler }, &out)?;
    global.show(
        || serde_json::json!({ "schema": "proxyset.convert/1", "summary": summary }),
        || table::summary(&summary),
    )
}
