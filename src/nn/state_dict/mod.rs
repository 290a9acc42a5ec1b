//! The tensors of a network in a file, by name: safetensors, and what `torch.save` writes. They are read when they
//! are asked for, and no code in a file is run.

mod pickle;
mod tensor;
mod torch;
mod zip;

use std::{
    collections::BTreeMap,
    fmt::Display,
    path::{Component, Path},
};

use candle_core::{DType, Device, Tensor};
pub use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;

use self::tensor::{Bytes, StoredTensor};
use crate::{Error, Result, ResultExt, fs};

/// The most names that an error lists of a kind.
pub(super) const SHOWN: usize = 10;

/// Tensors by name, in one file or several.
pub struct StateDict {
    origin: String,
    files: Vec<Bytes>,
    /// Each with the number of its file.
    tensors: BTreeMap<String, (usize, StoredTensor)>,
}

impl StateDict {
    /// Opens a file of either kind, which its first bytes tell; see [`StateDict::open_at`] without a key.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_at(path, None)
    }

    /// Opens a file of safetensors or of PyTorch (`.pt`, `.pth`, `.bin`, by the name of whichever extension).
    ///
    /// A checkpoint of PyTorch may hold its state dict in dicts (`{"model": {"state_dict": …}, "optimizer": …}`): it
    /// is the one dict of tensors that there is, else the one whose keys are usual for weights, or the one at `key`,
    /// keys of nested dicts joined by dots.
    ///
    /// Fails with [`Error::Data`], naming the file and what is wrong with it: damaged; a global that is no tensor and
    /// no plain data, which is never imported; tensors beyond their storage, with elements in common, or more than
    /// twice the file; no state dict or several.
    pub fn open_at(path: &Path, key: Option<&str>) -> Result<Self> {
        let file = Bytes::open(path)?;
        let origin = path.display().to_string();
        Self::of(file, key, &origin).context(|| origin)
    }

    /// Opens the files that an index lists (`diffusion_pytorch_model.safetensors.index.json`), which lie beside it.
    ///
    /// Fails as [`StateDict::open`] does, and if a tensor is not in the file that the index names.
    pub fn open_sharded(index: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let Index { weight_map } = fs::read_json(index)?;
        let mut whole =
            Self { origin: index.display().to_string(), files: Vec::new(), tensors: BTreeMap::new() };
        let mut shards = BTreeMap::<_, Vec<_>>::new();
        for (name, shard) in &weight_map {
            shards.entry(shard).or_default().push(name);
        }
        for (shard, names) in shards {
            if !matches!(Path::new(shard).components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
                bail!(Data, "{}: names the file {shard:?}, expected one beside it", whole.origin);
            }
            let mut part = Self::open(&index.with_file_name(shard))?;
            for name in names {
                let Some((_, tensor)) = part.tensors.remove(name) else {
                    bail!(Data, "{}: {name} is not in {shard}", whole.origin)
                };
                whole.tensors.insert(name.clone(), (whole.files.len(), tensor));
            }
            if let Some(name) = part.tensors.keys().next() {
                bail!(Data, "{}: {shard} has {name} too, which is not in the index", whole.origin);
            }
            whole.files.append(&mut part.files);
        }
        Ok(whole)
    }

    fn of(mut file: Bytes, key: Option<&str>, origin: &str) -> Result<Self> {
        let start = file.read(0, file.len().min(32) as usize)?;
        if start.starts_with(b"version https://git-lfs") {
            bail!(
                Data,
                "is a pointer of Git LFS, not the file that it stands for: `git lfs pull` fetches that"
            );
        }
        // The length before the header of a safetensors file may look like the start of any other file.
        let has_header = start.get(8) == Some(&b'{');
        let is_torch = start.starts_with(torch::ZIP) || start.first() == Some(&torch::PICKLE);
        let found = if is_torch && !has_header {
            torch::read(&mut file, key)?
        } else if let Some(key) = key {
            bail!(Data, "is not a file of torch.save, so it has no state dict {key}")
        } else {
            read_safetensors(&mut file)?
        };
        let (mut tensors, mut total) = (BTreeMap::new(), 0u64);
        for (name, tensor) in found {
            if name.is_empty() || name.len() > 1000 || name.contains(char::is_control) {
                bail!(
                    Data,
                    "a tensor is named {}, expected 1 to 1000 printable characters",
                    pickle::shown(&name)
                );
            }
            total = total.saturating_add((tensor.len().unwrap_or(0) * tensor.element_size()) as u64);
            if tensors.insert(name.clone(), (0, tensor)).is_some() {
                bail!(Data, "has two tensors {name}");
            }
        }
        // Tied weights share a storage; what shares more of it only looks small.
        if total > 2 * file.len() {
            bail!(Data, "has tensors of {total} bytes, more than twice those of the file, {}", file.len());
        }
        Ok(Self { origin: origin.into(), files: vec![file], tensors })
    }

    /// The file's name, for errors.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// All names, in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|(_, tensor)| tensor.shape.as_slice())
    }

    /// The type of a tensor's numbers.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.tensors.get(name).map(|(_, tensor)| tensor.dtype)
    }

    /// Reads a tensor in row-major order, rounded to f32.
    ///
    /// Fails with [`Error::Data`] if there is none, if it holds integers, and if a number is not finite as f32.
    pub fn values(&mut self, name: &str) -> Result<Vec<f32>> {
        let (tensor, bytes) = self.read(name)?;
        let dtype = match tensor.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => bail!(Data, "{name} is of type {other}, expected F64, F32, F16 or BF16"),
        };
        let len = bytes.len() / tensor.element_size();
        let values = Tensor::from_raw_buffer(&bytes, dtype, &[len], &Device::Cpu)?;
        let values = values.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        match values.iter().find(|v| !v.is_finite()) {
            Some(v) => bail!(Data, "{name} holds {v}, expected finite numbers"),
            None => Ok(values),
        }
    }

    /// Reads a single integer of any type.
    ///
    /// Fails with [`Error::Data`] if there is none, if it is more than one number, and if it is not whole.
    pub fn integer(&mut self, name: &str) -> Result<i64> {
        let (tensor, bytes) = self.read(name)?;
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        if shape.iter().any(|dim| *dim != 1) {
            bail!(Data, "{name} has shape {shape:?}, expected a single integer");
        }
        if dtype == Dtype::I64 {
            return Ok(i64::from_le_bytes(bytes.try_into().expect("an i64 has eight bytes")));
        }
        if dtype == Dtype::I32 {
            return Ok(i32::from_le_bytes(bytes.try_into().expect("an i32 has four bytes")).into());
        }
        let value = self.values(name)?[0];
        if value.fract() != 0.0 {
            bail!(Data, "{name} is {value}, expected an integer");
        }
        Ok(value as i64)
    }

    fn read(&mut self, name: &str) -> Result<(&StoredTensor, Vec<u8>)> {
        let Some((file, tensor)) = self.tensors.get(name) else { bail!(Data, "{name} is missing") };
        let bytes = tensor.read(&mut self.files[*file])?;
        Ok((tensor, bytes))
    }

    /// Forgets a tensor. Returns whether there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.tensors.remove(name).is_some()
    }

    /// What all names begin with, up to and including the first dot; `None` if they differ there.
    pub fn common_prefix(&self) -> Option<&str> {
        let first = self.names().next()?;
        let prefix = &first[..=first.find('.')?];
        self.names().all(|name| name.starts_with(prefix)).then_some(prefix)
    }

    /// Takes this many bytes off each name, those of the [common prefix](Self::common_prefix).
    pub fn strip(&mut self, len: usize) {
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        self.tensors = tensors.map(|(name, tensor)| (name[len..].to_owned(), tensor)).collect();
    }
}

/// The header is JSON, with its length in the 8 bytes before it; then come the numbers, without gaps.
fn read_safetensors(file: &mut Bytes) -> Result<Vec<(String, StoredTensor)>> {
    let not = |e: &dyn Display| Error::Data(format!("not a safetensors file: {e}; nor one of torch.save"));
    let header = (|| {
        let len = file.read(0, 8)?.try_into().expect("eight bytes were read");
        file.read(8, usize::try_from(u64::from_le_bytes(len)).unwrap_or(usize::MAX))
    })();
    let header = header.map_err(|e| not(&e))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| not(&e))?;
    let start = 8 + header.len() as u64;
    if start + metadata.data_len() as u64 != file.len() {
        return Err(not(&format!(
            "its header tells of {} bytes, and {} follow",
            metadata.data_len(),
            file.len() - start
        )));
    }
    let stored = |(name, info): (String, &TensorInfo)| {
        (name, StoredTensor::contiguous(info.dtype, info.shape.clone(), start + info.data_offsets.0 as u64))
    };
    Ok(metadata.tensors().into_iter().map(stored).collect())
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    /// A folder with two tensors in two files and the index of them.
    fn sharded(index: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (file, name, value) in [("a.safetensors", "w", 1f32), ("b.safetensors", "bias", 2.0)] {
            let bytes = value.to_le_bytes();
            let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
            fs::publish(&dir.path().join(file), &safetensors::serialize([(name, view)], None).unwrap())
                .unwrap();
        }
        let index = format!(r#"{{"metadata": {{"total_size": 8}}, "weight_map": {index}}}"#);
        fs::publish(&dir.path().join("index.json"), index.as_bytes()).unwrap();
        dir
    }

    #[test]
    fn shards_are_one_state_dict_if_the_index_is_right() {
        let open = |index| StateDict::open_sharded(&sharded(index).path().join("index.json"));
        let dir = sharded(r#"{"w": "a.safetensors", "bias": "b.safetensors"}"#);
        let mut whole = StateDict::open_sharded(&dir.path().join("index.json")).unwrap();
        assert_eq!(whole.names().collect::<Vec<_>>(), ["bias", "w"]);
        assert_eq!((whole.values("w").unwrap(), whole.values("bias").unwrap()), (vec![1.0], vec![2.0]));
        let faulty = [
            (r#"{"w": "a.safetensors", "v": "a.safetensors"}"#, "v is not in a.safetensors"),
            (r#"{"w": "../a.safetensors"}"#, "names the file \"../a.safetensors\", expected one beside it"),
            (r#"{"w": "/a.safetensors"}"#, "expected one beside it"),
        ];
        for (index, said) in faulty {
            let error = open(index).err().expect("a wrong index is refused");
            assert_eq!(error.exit_code(), 65);
            assert!(error.to_string().contains(said), "{error}");
        }
        fs::publish(
            &dir.path().join("index.json"),
            br#"{"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}"#,
        )
        .unwrap();
        let error = StateDict::open_sharded(&dir.path().join("index.json")).err().unwrap().to_string();
        assert!(error.contains("x is not in b.safetensors"), "{error}");
    }
}
