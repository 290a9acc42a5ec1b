//! The state of a training run between two steps, as one file.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Error, Result, fs, progress};

/// Keeps the newest state of a training run and the one before it.
///
/// A state consists of named tensors and a serialisable value. Files are complete or absent; if the newest one is
/// damaged nevertheless, the previous one is used, with a note.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
}

/// Tensors by name.
pub type Named = Vec<(String, Tensor)>;

#[derive(Serialize, Deserialize)]
struct Header<S> {
    schema: String,
    state: S,
}

const SCHEMA: &str = "proxyset.checkpoint/1";

impl Checkpoints {
    /// Checkpoints in `dir`, which is created with the first one.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Keeps a state; the newest one so far becomes the previous one.
    pub fn save<S: Serialize>(&self, state: &S, tensors: &[(String, Tensor)]) -> Result<()> {
        let header = serde_json::to_string(&Header { schema: SCHEMA.into(), state })
            .map_err(|e| Error::Alarm(format!("training state cannot be written as JSON: {e}")))?;
        let tensors: Vec<(&str, Tensor)> = tensors
            .iter()
            .map(|(name, tensor)| Ok((name.as_str(), tensor.to_device(&Device::Cpu)?.contiguous()?)))
            .collect::<Result<_>>()?;
        let metadata = std::collections::HashMap::from([(String::from("header"), header)]);
        let bytes = safetensors::serialize(tensors, Some(metadata))
            .map_err(|e| Error::Alarm(format!("training state cannot be written: {e}")))?;
        let (newest, previous) = (self.newest(), self.previous());
        if newest.exists() {
            fs::rename(&newest, &previous)?;
        }
        fs::publish(&newest, &bytes)
    }

    /// The newest intact state, if there is any, with its tensors on `device`. Fails if all are damaged.
    pub fn load<S: DeserializeOwned>(&self, device: &Device) -> Result<Option<(S, Named)>> {
        let mut damaged = None;
        for path in [self.newest(), self.previous()].into_iter().filter(|p| p.exists()) {
            match read(&path, device) {
                Ok(found) => return Ok(Some(found)),
                Err(e @ Error::Data(_)) => {
                    progress::note(&format!("checkpoint cannot be used, taking the one before it: {e}"));
                    damaged = Some(e);
                }
                Err(e) => return Err(e),
            }
        }
        damaged.map_or(Ok(None), Err)
    }

    fn newest(&self) -> PathBuf {
        self.dir.join("newest.safetensors")
    }

    fn previous(&self) -> PathBuf {
        self.dir.join("previous.safetensors")
    }
}

fn read<S: DeserializeOwned>(path: &Path, device: &Device) -> Result<(S, Named)> {
    let damaged = |e: &dyn std::fmt::Display| Error::Data(format!("{}: {e}", path.display()));
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| damaged(&e))?;
    let header = metadata.metadata().as_ref().and_then(|m| m.get("header"));
    let header = header.ok_or_else(|| damaged(&"no training state in its header"))?;
    let header: Header<S> = serde_json::from_str(header).map_err(|e| damaged(&e))?;
    if header.schema != SCHEMA {
        return Err(damaged(&format!("schema is '{}', expected '{SCHEMA}'", header.schema)));
    }
    let mut tensors: Vec<_> = candle_core::safetensors::load_buffer(&bytes, device)?.into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((header.state, tensors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(value: f32) -> Vec<(String, Tensor)> {
        vec![("a".into(), Tensor::new(&[value, 2.0], &Device::Cpu).unwrap())]
    }

    #[test]
    fn the_newest_state_comes_back_and_a_damaged_one_falls_back() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().join("c"));
        assert!(checkpoints.load::<u32>(&Device::Cpu)?.is_none());
        checkpoints.save(&1u32, &tensor(1.0))?;
        checkpoints.save(&2u32, &tensor(3.0))?;
        let (state, tensors) = checkpoints.load::<u32>(&Device::Cpu)?.unwrap();
        assert_eq!((state, tensors[0].1.to_vec1::<f32>()?), (2, vec![3.0, 2.0]));

        let newest = checkpoints.newest();
        let bytes = std::fs::read(&newest).unwrap();
        std::fs::write(&newest, &bytes[..bytes.len() - 3]).unwrap();
        assert_eq!(checkpoints.load::<u32>(&Device::Cpu)?.unwrap().0, 1);
        std::fs::write(checkpoints.previous(), b"x").unwrap();
        assert_eq!(
            checkpoints.load::<u32>(&Device::Cpu).unwrap_err().exit_code(),
            65,
            "never from the start again"
        );
        Ok(())
    }
}
