//! Where the weights of a network are in a folder of `diffusers`.

use std::path::Path;

use crate::{Result, fs, nn::StateDict};

const STEM: &str = "diffusion_pytorch_model.";

/// Opens the weights in `dir`: those without a variant, else those of the only variant (`fp16`, `non_ema`, …); of
/// safetensors, else of PyTorch; a single file, or an index with its parts beside it.
///
/// Returns what should be said about the choice, too. Fails with [`Error::Data`](crate::Error::Data), saying what is there, if there are
/// none or several variants, and as [`StateDict::open`] does.
pub(super) fn open(dir: &Path) -> Result<(StateDict, Option<String>)> {
    let names: Vec<String> = fs::files_below(dir)?
        .into_iter()
        .filter_map(|path| Some(path.to_str()?.to_owned()))
        .filter(|name| !name.contains('/'))
        .collect();
    // (whether it is a variant, how many kinds come before, the variant, the file), the first the most wanted.
    let mut found: Vec<(bool, usize, &str, &str)> = Vec::new();
    for (rank, kind) in ["safetensors", "bin"].into_iter().enumerate() {
        let variants = names.iter().filter_map(|name| Some((variant(name, kind)?, name.as_str())));
        found.extend(variants.map(|(variant, name)| (!variant.is_empty(), rank, variant, name)));
    }
    found.sort_unstable();
    let Some(&(is_variant, rank, variant, name)) = found.first() else {
        let there = if names.is_empty() { "nothing".into() } else { names.join(", ") };
        bail!(Data, "{}: no weights: expected {STEM}safetensors, found {there}", dir.display())
    };
    let others: Vec<&str> = found[1..]
        .iter()
        .filter(|other| other.1 == rank && other.2 != variant)
        .map(|other| other.3)
        .collect();
    if is_variant && !others.is_empty() {
        bail!(
            Data,
            "{}: there are weights of several variants, {name} and {}, expected one, or a file without a variant",
            dir.display(),
            others.join(" and ")
        );
    }
    let path = dir.join(name);
    let weights = match path.extension().is_some_and(|extension| extension == "json") {
        true => StateDict::open_sharded(&path)?,
        false => StateDict::open(&path)?,
    };
    let note =
        is_variant.then(|| format!("{}: the weights are those of the variant {variant}", path.display()));
    Ok((weights, note))
}

/// The variant whose weights, or whose index, a file is; nothing for the plain one. Parts are not.
fn variant<'a>(name: &'a str, kind: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(STEM)?;
    if rest == kind || rest.strip_prefix(kind) == Some(".index.json") {
        return Some("");
    }
    let index = rest.strip_prefix(kind).and_then(|rest| rest.strip_prefix(".index.")?.strip_suffix(".json"));
    let file = rest.strip_suffix(kind).and_then(|rest| rest.strip_suffix('.'));
    index.or(file).filter(|variant| !variant.contains('.') && !variant.contains("-of-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_told_by_the_name() {
        for (name, expected) in [
            ("diffusion_pytorch_model.safetensors", Some("")),
            ("diffusion_pytorch_model.safetensors.index.json", Some("")),
            ("diffusion_pytorch_model.fp16.safetensors", Some("fp16")),
            ("diffusion_pytorch_model.safetensors.index.fp16.json", Some("fp16")),
            ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
            ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", None),
            ("diffusion_pytorch_model.bin", None),
            ("model.safetensors", None),
        ] {
            assert_eq!(variant(name, "safetensors"), expected, "{name}");
        }
        assert_eq!(variant("diffusion_pytorch_model.non_ema.bin", "bin"), Some("non_ema"));
    }

    #[test]
    fn what_is_there_is_said_if_the_weights_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let said = |part: &str| {
            let error = open(dir.path()).err().unwrap();
            assert!(error.exit_code() == 65 && error.to_string().contains(part), "{error}");
        };
        said("no weights: expected diffusion_pytorch_model.safetensors, found nothing");
        fs::publish(&dir.path().join("config.json"), b"{}").unwrap();
        said("found config.json");
        for variant in ["fp16", "non_ema"] {
            let name = format!("diffusion_pytorch_model.{variant}.safetensors");
            fs::publish(&dir.path().join(name), b"").unwrap();
        }
        said(
            "several variants, diffusion_pytorch_model.fp16.safetensors and diffusion_pytorch_model.non_ema",
        );
    }
}
