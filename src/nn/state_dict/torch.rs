//! The files of `torch.save`: zip archives (from PyTorch 1.6 on) and the form before them.

use std::collections::{BTreeMap, HashSet};

use safetensors::Dtype;

use super::{
    pickle::{Object, Pickle, Value, shown},
    tensor::{Bytes, StoredTensor},
    zip,
};
use crate::{Error, Result};

/// How a zip archive starts.
pub const ZIP: &[u8] = b"PK\x03\x04";
/// How a pickle starts, of a protocol from 2 on.
pub const PICKLE: u8 = 0x80;
/// The first object of a file in the form before zip archives, as `torch.serialization.MAGIC_NUMBER`.
const MAGIC_NUMBER: [u8; 10] =
    0x1950_a86a_20f9_469c_fc6c_u128.to_le_bytes().first_chunk::<10>().copied().unwrap();
/// Where programs keep the weights of a network, beside the state of its training.
const KEYS: [&str; 10] = [
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "ema",
    "ema_state_dict",
];

/// What a pickle may name: tensors, and plain data that stand beside them in checkpoints.
fn is_known(module: &str, name: &str) -> bool {
    match module {
        "torch" => {
            dtype(name).is_some()
                || matches!(
                    name,
                    "Size" | "Tensor" | "device" | "float16" | "bfloat16" | "float32" | "float64" | "int64"
                )
        }
        "torch._utils" => {
            matches!(
                name,
                "_rebuild_tensor"
                    | "_rebuild_tensor_v2"
                    | "_rebuild_parameter"
                    | "_rebuild_parameter_with_state"
            )
        }
        "torch._tensor" => name == "_rebuild_from_type_v2",
        "torch.nn.parameter" => name == "Parameter",
        "collections" => matches!(name, "OrderedDict" | "Counter"),
        "argparse" => name == "Namespace",
        "pathlib" => matches!(name, "Path" | "PosixPath" | "WindowsPath"),
        "numpy" => matches!(name, "dtype" | "ndarray"),
        "numpy.core.multiarray" | "numpy._core.multiarray" => matches!(name, "scalar" | "_reconstruct"),
        "builtins" | "__builtin__" => name == "set",
        "_codecs" => name == "encode",
        _ => false,
    }
}

/// The type of the numbers in a storage, by its class.
fn dtype(class: &str) -> Option<Dtype> {
    Some(match class {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    })
}

/// The tensors of the state dict in a file of `torch.save`, by name, in the file's order.
///
/// See [`StateDict::open_at`](super::StateDict::open_at) for which state dict that is, and for what fails.
pub fn read(file: &mut Bytes, key: Option<&str>) -> Result<Vec<(String, StoredTensor)>> {
    if file.read(0, ZIP.len().min(file.len() as usize))? == ZIP {
        read_zip(file, key)
    } else {
        read_legacy(file, key)
    }
}

fn read_zip(file: &mut Bytes, key: Option<&str>) -> Result<Vec<(String, StoredTensor)>> {
    let records = zip::records(file)?;
    let mut pickles = records
        .keys()
        .filter_map(|name| name.strip_suffix("data.pkl").filter(|dir| dir.matches('/').count() == 1));
    let (Some(dir), None) = (pickles.next(), pickles.next()) else {
        bail!(Data, "is a zip archive, but not one of torch.save, which has one record NAME/data.pkl");
    };
    if let Some(&(start, len)) = records.get(&format!("{dir}byteorder")) {
        let order = file.read(start, len as usize)?;
        if order != b"little" {
            bail!(Data, "its byte order is {}, expected little", shown(&String::from_utf8_lossy(&order)));
        }
    }
    let (start, len) = records[&format!("{dir}data.pkl")];
    let pickle = file.read(start, len as usize)?;
    let checkpoint = Checkpoint(Pickle::read(&pickle, &is_known)?);
    checkpoint.tensors(key, |storage| {
        let name = format!("{dir}data/{}", storage.key);
        match records.get(&name) {
            Some(&(start, len)) if storage.bytes() == Some(len) => Ok(start),
            Some((_, len)) => bail!(
                Data,
                "record {} has {len} bytes, which are not those of {} {}",
                shown(&name),
                storage.len,
                storage.dtype
            ),
            None => bail!(Data, "there is no record {}", shown(&name)),
        }
    })
}

/// Five pickles: a magic number, the format's version, what the system was, what was saved, and the keys of the
/// storages; then each storage: its length, 8 bytes, and its numbers.
fn read_legacy(file: &mut Bytes, key: Option<&str>) -> Result<Vec<(String, StoredTensor)>> {
    let bytes = file.read(0, file.len() as usize)?;
    let magic = Pickle::read(&bytes, &is_known)?;
    if magic.root != Value::Bytes(&MAGIC_NUMBER) {
        bail!(Data, "is a pickle, but not one of torch.save");
    }
    let version = Pickle::read(magic.rest, &is_known)?;
    if version.root != Value::Int(1001) {
        bail!(Data, "its version is not 1001, the only one there is");
    }
    let system = Pickle::read(version.rest, &is_known)?;
    let little = (Value::Text("little_endian"), Value::Bool(true));
    if !matches!(system.object(system.root), Some(Object::Dict(items)) if items.contains(&little)) {
        bail!(Data, "it does not say that its numbers are little-endian");
    }
    let checkpoint = Checkpoint(Pickle::read(system.rest, &is_known)?);
    let keys = Pickle::read(checkpoint.0.rest, &is_known)?;
    let mut storages = BTreeMap::new();
    for object in &checkpoint.0.objects {
        if let Object::Persistent(id) = object {
            let storage = checkpoint.storage(*id)?;
            storages.insert(storage.key, storage);
        }
    }
    let mut starts = BTreeMap::new();
    let mut at = (bytes.len() - keys.rest.len()) as u64;
    for key in keys.items(keys.root).unwrap_or_default() {
        let Value::Text(key) = *key else { bail!(Data, "the key of a storage is no text") };
        let Some(storage) = storages.get(key) else {
            bail!(Data, "nothing is said of storage {}", shown(key))
        };
        let header = bytes.get(at as usize..).and_then(|rest| rest.first_chunk::<8>());
        let len = header.map(|len| u64::from_le_bytes(*len));
        let end = storage.bytes().and_then(|len| (at + 8).checked_add(len)).filter(|end| *end <= file.len());
        match end {
            Some(end) if len == Some(storage.len) => {
                starts.insert(key, at + 8);
                at = end;
            }
            _ => {
                bail!(Data, "storage {} has not the {} numbers that it should have", shown(key), storage.len)
            }
        }
    }
    checkpoint.tensors(key, |storage| match starts.get(storage.key) {
        Some(start) => Ok(*start),
        None => bail!(Data, "there is no storage {}", shown(storage.key)),
    })
}

/// Numbers that tensors are parts of.
struct Storage<'a> {
    key: &'a str,
    dtype: Dtype,
    len: u64,
}

impl Storage<'_> {
    fn bytes(&self) -> Option<u64> {
        self.len.checked_mul(self.dtype.bitsize() as u64 / 8)
    }
}

/// What was saved.
struct Checkpoint<'a>(Pickle<'a>);

impl<'a> Checkpoint<'a> {
    /// The tensors of the state dict; `start_of` finds a storage in the file.
    fn tensors(
        &self,
        key: Option<&str>,
        start_of: impl Fn(&Storage) -> Result<u64>,
    ) -> Result<Vec<(String, StoredTensor)>> {
        let mut tensors = Vec::new();
        for (name, value) in self.state_dict(key)? {
            let Value::Text(name) = name else {
                bail!(Alarm, "a dict of tensors has another key than a text")
            };
            let Some(args) = self.tensor(*value) else {
                bail!(Data, "{} is {}, expected a tensor", shown(name), self.told(*value))
            };
            let tensor =
                self.stored(args, &start_of).map_err(|e| Error::Data(format!("{}: {e}", shown(name))))?;
            tensors.push(((*name).to_owned(), tensor));
        }
        Ok(tensors)
    }

    /// The dict of tensors that is meant.
    fn state_dict(&self, key: Option<&str>) -> Result<&[(Value<'a>, Value<'a>)]> {
        let mut found = Vec::new();
        self.find(self.0.root, String::new(), &mut HashSet::new(), &mut found);
        let below = |key: &str, path: &str| {
            path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let paths = |found: &[(String, &[(Value, Value)])]| {
            let told = |(path, items): &(String, &[(Value, Value)])| {
                format!(
                    "{} ({} tensors)",
                    if path.is_empty() { "itself".into() } else { shown(path) },
                    items.len()
                )
            };
            found.iter().take(10).map(told).collect::<Vec<_>>().join(", ")
        };
        if found.is_empty() {
            bail!(
                Data,
                "holds {}, expected a dict of tensors, or dicts that hold one",
                self.told(self.0.root)
            );
        }
        let all = paths(&found);
        match key {
            Some(key) => found.retain(|(path, _)| below(key, path)),
            None if found.len() > 1 => {
                let known = |path: &str| path.split('.').all(|part| KEYS.contains(&part));
                if found.iter().any(|(path, _)| known(path)) {
                    found.retain(|(path, _)| known(path));
                }
            }
            None => {}
        }
        match (found.as_slice(), key) {
            ([(_, items)], _) => Ok(items),
            ([], key) => bail!(Data, "has no state dict {}; it has {all}", shown(key.unwrap_or_default())),
            (several, _) => {
                bail!(
                    Data,
                    "has several state dicts, expected one, or its name (--key of `proxyset convert`): {}",
                    paths(several)
                )
            }
        }
    }

    /// Adds the dicts that hold tensors and no dicts, a thousand at most, each with its path. Dicts with other keys
    /// than texts are states of optimisers.
    fn find<'s>(
        &'s self,
        value: Value<'a>,
        path: String,
        seen: &mut HashSet<usize>,
        found: &mut Vec<(String, &'s [(Value<'a>, Value<'a>)])>,
    ) {
        let (Value::Object(index), Some(Object::Dict(items))) = (value, self.0.object(value)) else { return };
        let enough = path.split('.').count() > 4 || found.len() == 1000;
        if enough || !seen.insert(index) || items.iter().any(|(key, _)| !matches!(key, Value::Text(_))) {
            return;
        }
        let is_dict = |value: Value| matches!(self.0.object(value), Some(Object::Dict(_)));
        let holds_dicts = items.iter().any(|(_, value)| is_dict(*value));
        if !holds_dicts && items.iter().any(|(_, value)| self.tensor(*value).is_some()) {
            found.push((path, items));
            return;
        }
        for (key, value) in items {
            let Value::Text(key) = key else { continue };
            let path = if path.is_empty() { shown(key) } else { format!("{path}.{}", shown(key)) };
            self.find(*value, path, seen, found);
        }
    }

    /// The arguments from which PyTorch would make this tensor: storage, offset, shape, strides, and more that is of
    /// no interest. `None` if it is something else.
    fn tensor(&self, mut value: Value<'a>) -> Option<&[Value<'a>]> {
        // A parameter is made of a tensor, and one with attributes of a call that makes it.
        for _ in 0..4 {
            let Some(Object::Call(callable, args)) = self.0.object(value) else { return None };
            let Object::Global(_, name) = self.0.objects[*callable] else { return None };
            let mut args = self.0.items(*args)?;
            let mut name = name;
            if name == "_rebuild_from_type_v2" {
                let [function, _, inner, ..] = args else { return None };
                let Some(Object::Global(_, function)) = self.0.object(*function) else { return None };
                (name, args) = (function, self.0.items(*inner)?);
            }
            match name {
                "_rebuild_tensor" | "_rebuild_tensor_v2" => return Some(args),
                "_rebuild_parameter" | "_rebuild_parameter_with_state" => value = *args.first()?,
                _ => return None,
            }
        }
        None
    }

    /// Finds the tensor in the file, and that all of it is in its storage.
    fn stored(&self, args: &[Value<'a>], start_of: impl Fn(&Storage) -> Result<u64>) -> Result<StoredTensor> {
        let [storage, offset, shape, strides, ..] = *args else {
            bail!(
                Data,
                "a tensor is made of {} values, expected storage, offset, shape and strides",
                args.len()
            )
        };
        let Some(Object::Persistent(id)) = self.0.object(storage) else {
            bail!(Data, "its storage is {}, expected one of the file's", self.told(storage))
        };
        let storage = self.storage(*id)?;
        let numbers = |value: Value<'a>| -> Result<Vec<usize>> {
            let items = self.0.items(value).ok_or_else(|| {
                Error::Data(format!("its shape or strides are {}, expected a tuple", self.told(value)))
            })?;
            items.iter().map(|item| self.number(*item)).collect()
        };
        let (offset, shape, strides) = (self.number(offset)?, numbers(shape)?, numbers(strides)?);
        if shape.len() != strides.len() {
            bail!(Data, "its shape is {shape:?} and its strides are {strides:?}, expected as many");
        }
        let mut tensor = StoredTensor { dtype: storage.dtype, shape, strides, start: 0 };
        let end = tensor.span().and_then(|span| span.checked_add(offset));
        if end.is_none_or(|end| end as u64 > storage.len) || tensor.overlaps() {
            bail!(
                Data,
                "its shape is {:?}, with strides {:?} from element {offset} on, which is not a part of the {} numbers of its storage",
                tensor.shape,
                tensor.strides,
                storage.len
            );
        }
        tensor.start = start_of(&storage)? + (offset * tensor.element_size()) as u64;
        Ok(tensor)
    }

    /// What a persistent id says: ("storage", class, key, device, number of elements), and in the form before zip archives
    /// `None`.
    fn storage(&self, id: Value<'a>) -> Result<Storage<'a>> {
        let parts = self.0.items(id).unwrap_or_default();
        let [Value::Text("storage"), class, Value::Text(key), _, len, ref view @ ..] = *parts else {
            let kind = match parts.first() {
                Some(Value::Text(kind)) => shown(kind),
                _ => self.told(id),
            };
            bail!(Data, "the pickle refers to {kind} outside of itself, expected a storage")
        };
        if !matches!(view, [] | [Value::None]) {
            bail!(Data, "storage {} is a part of another, as before PyTorch 0.4", shown(key));
        }
        let class = match self.0.object(class) {
            Some(Object::Global("torch", class)) => class,
            _ => bail!(
                Data,
                "the class of storage {} is {}, expected one of torch",
                shown(key),
                self.told(class)
            ),
        };
        let Some(dtype) = dtype(class) else { bail!(Data, "the class of storage {} is {class}", shown(key)) };
        Ok(Storage { key, dtype, len: self.number(len)? as u64 })
    }

    fn number(&self, value: Value<'a>) -> Result<usize> {
        match value {
            Value::Int(number) if number >= 0 => Ok(number as usize),
            Value::Int(number) => {
                bail!(Data, "a length, offset or stride is {number}, expected no negative number")
            }
            other => bail!(Data, "a length, offset or stride is {}, expected a number", self.told(other)),
        }
    }

    /// A value in words.
    fn told(&self, value: Value<'a>) -> String {
        match (value, self.0.object(value)) {
            (Value::Text(text), _) => format!("the text {}", shown(text)),
            (Value::Int(number), _) => format!("the number {number}"),
            (Value::Float(number), _) => format!("the number {number}"),
            (_, Some(Object::Dict(items))) => {
                let keys = items.iter().take(10).map(|(key, _)| match key {
                    Value::Text(key) => shown(key),
                    other => format!("{other:?}"),
                });
                format!("a dict of {} ({})", items.len(), keys.collect::<Vec<_>>().join(", "))
            }
            (_, Some(Object::Call(callable, _))) => self.told(Value::Object(*callable)),
            (_, Some(Object::Global(module, name))) => format!("{}.{}", shown(module), shown(name)),
            (_, Some(Object::List(_) | Object::Tuple(_))) => "a list".into(),
            (Value::None, _) => "nothing".into(),
            _ => "something else".into(),
        }
    }
}
