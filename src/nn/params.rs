//! Weights by name: made from a seed, read from and written to safetensors, and viewed as tracked or frozen.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Display,
    iter,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use candle_core::{DType, Device, Shape, Tensor, Var};

use super::state_dict::{SHOWN, StateDict};
use crate::{Error, Result, kernels::PackedWeights, progress, rng};

/// How a parameter starts out. The distributions are PyTorch's defaults for the layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// U(-1/√fan_in, 1/√fan_in): weights and biases of convolutions and linear layers, which is
    /// Kaiming-uniform with a = √5 (He et al. 2015) for the weights.
    FanIn(usize),
    /// U(-bound, bound).
    Uniform(f32),
    /// N(0, σ²) of this σ: 1 for embeddings.
    Normal(f32),
    /// These numbers: constants that files hold.
    Constant(&'static [f32]),
    /// 0: biases of norms.
    Zeros,
    /// 1: weights of norms.
    Ones,
}

impl Init {
    /// The initial values of parameter `name`: a function of only the seed and the name, so that neither the order
    /// of construction nor other layers change them.
    fn values(self, seed: u64, name: &str, len: usize) -> Vec<f32> {
        let hash = blake3::hash(name.as_bytes());
        let id = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"));
        let mut values = vec![0.0; len];
        let uniforms = |bound: f32, values: &mut [f32]| {
            rng::uniforms(seed, id, rng::stream::INIT, values);
            values.iter_mut().for_each(|v| *v = (2.0 * *v - 1.0) * bound);
        };
        match self {
            Self::Zeros => {}
            Self::Ones => values.fill(1.0),
            Self::Constant(numbers) => values.copy_from_slice(numbers),
            Self::Normal(sigma) => {
                rng::normals(seed, id, rng::stream::INIT, &mut values);
                values.iter_mut().for_each(|v| *v *= sigma);
            }
            Self::FanIn(fan_in) => uniforms(1.0 / (fan_in as f32).sqrt(), &mut values),
            Self::Uniform(bound) => uniforms(bound, &mut values),
        }
        values
    }
}

/// Hands a network's constructor its parameters, by the path of their names.
///
/// `builder.pp("conv1").get("weight", shape, init)` is the parameter `conv1.weight`.
#[derive(Clone)]
pub struct Builder<'a> {
    source: &'a Source,
    /// The names of the current path, beginning with the one to write, each with a final dot unless empty.
    prefixes: Vec<String>,
}

enum Source {
    Declare(RefCell<Vec<Declaration>>),
    /// Parameters and buffers, the former with gradients if `tracked`.
    Values {
        vars: HashMap<String, Var>,
        tracked: bool,
        packs: Arc<Packs>,
    },
}

/// What the kernels derive from the weights, valid until these change; shared by all views.
#[derive(Debug, Default)]
struct Packs {
    /// Counts the updates of the weights.
    version: AtomicU64,
    /// By the weights' names, each with the version from which it was made.
    slots: Mutex<HashMap<String, (u64, Arc<PackedWeights>)>>,
}

/// Where a layer finds what the kernels derived from its weight; see [`Builder::packed`].
#[derive(Clone, Debug)]
pub struct Packed {
    packs: Arc<Packs>,
    name: String,
}

impl Packed {
    /// The entry for the current weight; empty after an update.
    pub fn get(&self) -> Arc<PackedWeights> {
        let mut slots = self.packs.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let version = self.packs.version.load(Ordering::Acquire);
        match slots.get(&self.name) {
            Some((made_of, packed)) if *made_of == version => Arc::clone(packed),
            _ => {
                let packed = Arc::default();
                slots.insert(self.name.clone(), (version, Arc::clone(&packed)));
                packed
            }
        }
    }
}

/// See [`Params::overwriting`].
#[must_use = "it is to be held until parameters are overwritten"]
pub struct Overwriting<'a>(&'a Packs);

/// Counts after the last write, not before the first: a view that reads in between packs partly old weights, which
/// must not count as the new ones.
impl Drop for Overwriting<'_> {
    fn drop(&mut self) {
        self.0.version.fetch_add(1, Ordering::Release);
    }
}

/// One variable, as a constructor asks for it.
struct Declaration {
    name: String,
    shape: Shape,
    kind: Kind,
    /// What it is in files: itself, or the tensors that are stored in it one after another.
    parts: Vec<Part>,
}

struct Part {
    /// The name, then the names that old files may use.
    names: Vec<String>,
    shape: Shape,
    init: Init,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Parameter,
    Buffer,
    /// A buffer that counts: I64, the rest is F32.
    Counter,
}

impl Part {
    fn name(&self) -> &str {
        &self.names[0]
    }

    /// The name that a file has it under, if it has it.
    fn name_in(&self, file: &StateDict) -> Option<&str> {
        self.names.iter().map(String::as_str).find(|name| file.shape(name).is_some())
    }
}

impl Declaration {
    fn initial(&self, seed: u64, device: &Device) -> Result<Var> {
        if self.kind == Kind::Counter {
            return Ok(Var::zeros(self.shape.clone(), DType::I64, device)?);
        }
        let values = |part: &Part| part.init.values(seed, part.name(), part.shape.elem_count());
        let values = self.parts.iter().flat_map(values).collect::<Vec<_>>();
        Ok(Var::from_vec(values, self.shape.clone(), device)?)
    }

    /// Takes the values out of a file; `None` if something is wrong with them, which is added to `faults`.
    fn take(&self, file: &mut StateDict, faults: &mut Faults, device: &Device) -> Result<Option<Var>> {
        if self.kind == Kind::Counter {
            // Files from before PyTorch 0.4.1 do not count, and no layer goes by the count.
            let count = match self.parts[0].name_in(file) {
                Some(name) => {
                    let count = file.integer(name);
                    file.remove(name);
                    faults.or_fault(count)?
                }
                None => {
                    faults.uncounted += 1;
                    Some(0)
                }
            };
            return Ok(count.map(|count| Var::from_tensor(&Tensor::new(count, device)?)).transpose()?);
        }
        let mut values = Vec::new();
        for part in &self.parts {
            let Some(name) = part.name_in(file) else {
                faults.missing.push(part.name().to_owned());
                continue;
            };
            match file.shape(name) {
                Some(shape) if shape != part.shape.dims() => faults.shape(name, shape, part.shape.dims()),
                _ => values.extend(faults.or_fault(file.values(name))?.unwrap_or_default()),
            }
            file.remove(name);
        }
        let whole = values.len() == self.shape.elem_count();
        Ok(whole.then(|| Var::from_vec(values, self.shape.clone(), device)).transpose()?)
    }
}

/// Numbers that belong to a network but are not learned, such as running statistics: no optimiser sees them,
/// the network itself may change them, and they are saved with it.
///
/// A clone is another handle on the same numbers.
#[derive(Clone, Debug)]
pub struct Buffer(Var);

impl Buffer {
    /// The numbers, outside any graph; they see a later [`Buffer::set`].
    pub fn get(&self) -> Tensor {
        self.0.as_detached_tensor()
    }

    /// Overwrites the numbers in place. All views of the network's parameters see it. Fails if the shape or type
    /// differs.
    pub fn set(&self, values: &Tensor) -> Result<()> {
        Ok(self.0.set(values)?)
    }
}

impl<'a> Builder<'a> {
    fn new(source: &'a Source) -> Self {
        Self { source, prefixes: vec![String::new()] }
    }

    /// The builder of the part `name`.
    pub fn pp(&self, name: impl Display) -> Self {
        let prefixes = self.prefixes.iter().map(|prefix| format!("{prefix}{name}.")).collect();
        Self { source: self.source, prefixes }
    }

    /// The builder of the part `name`, which files written by older programs call `former`.
    pub fn pp_or(&self, name: &str, former: &str) -> Self {
        let mut renamed = self.pp(name);
        renamed.prefixes.extend(self.pp(former).prefixes);
        renamed
    }

    /// The parameter `name` of this part, f32 of the given shape.
    ///
    /// Tensors that a constructor gets while parameters are being declared have the right shape but no
    /// values: constructors keep them and do not compute with them.
    pub fn get(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        self.parameter(self.declaration(name, shape.into(), init, Kind::Parameter))
    }

    /// Several parameters of this part as one vector, stored one after another, row-major, as a fused block takes
    /// them. In files they are separate tensors under their own names.
    pub fn flat<N: AsRef<str>>(&self, parts: impl IntoIterator<Item = (N, Shape, Init)>) -> Result<Tensor> {
        let part =
            |(name, shape, init): (N, Shape, Init)| Part { names: self.names(name.as_ref()), shape, init };
        let parts: Vec<Part> = parts.into_iter().map(part).collect();
        let shape = Shape::from(parts.iter().map(|part| part.shape.elem_count()).sum::<usize>());
        let name = self.prefixes[0].trim_end_matches('.').to_owned();
        self.parameter(Declaration { name, shape, kind: Kind::Parameter, parts })
    }

    fn parameter(&self, declaration: Declaration) -> Result<Tensor> {
        match self.source {
            Source::Declare(declared) => {
                let scalar = Tensor::zeros((), DType::F32, &Device::Cpu)?;
                let placeholder = scalar.broadcast_as(&declaration.shape)?;
                declared.borrow_mut().push(declaration);
                Ok(placeholder)
            }
            Source::Values { vars, tracked, .. } => {
                let var = find(vars, &declaration.name, &declaration.shape)?;
                Ok(if *tracked { var.as_tensor().clone() } else { var.as_detached_tensor() })
            }
        }
    }

    /// The buffer `name` of this part, f32 of the given shape: see [`Buffer`].
    pub fn buffer(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Buffer> {
        self.any_buffer(name, shape.into(), init, Kind::Buffer)
    }

    /// The buffer `name` of this part, an i64 scalar that starts as 0.
    pub fn counter(&self, name: &str) -> Result<Buffer> {
        self.any_buffer(name, Shape::from(()), Init::Zeros, Kind::Counter)
    }

    fn any_buffer(&self, name: &str, shape: Shape, init: Init, kind: Kind) -> Result<Buffer> {
        match self.source {
            Source::Declare(declared) => {
                let declaration = self.declaration(name, shape, init, kind);
                let placeholder = Buffer(declaration.initial(0, &Device::Cpu)?);
                declared.borrow_mut().push(declaration);
                Ok(placeholder)
            }
            Source::Values { vars, .. } => Ok(Buffer(find(vars, &self.names(name)[0], &shape)?.clone())),
        }
    }

    fn declaration(&self, name: &str, shape: Shape, init: Init, kind: Kind) -> Declaration {
        let names = self.names(name);
        let parts = vec![Part { names, shape: shape.clone(), init }];
        Declaration { name: parts[0].name().to_owned(), shape, kind, parts }
    }

    /// Where all views find what a kernel derived from the weight `name`, which is a parameter or part of a vector
    /// of parameters.
    pub fn packed(&self, name: &str) -> Packed {
        let packs = match self.source {
            Source::Declare(_) => Arc::default(),
            Source::Values { packs, .. } => Arc::clone(packs),
        };
        Packed { packs, name: format!("{}{name}", self.prefixes[0]) }
    }

    /// The full name, then the names used by older programs.
    fn names(&self, name: &str) -> Vec<String> {
        self.prefixes.iter().map(|prefix| format!("{prefix}{name}")).collect()
    }
}

/// The variable of this name, if it has this shape.
fn find<'a>(among: &'a HashMap<String, Var>, name: &str, shape: &Shape) -> Result<&'a Var> {
    match among.get(name) {
        Some(found) if found.shape() == shape => Ok(found),
        Some(found) => {
            bail!(Alarm, "parameter {name} has shape {:?}, expected {:?}", found.dims(), shape.dims())
        }
        None => bail!(Alarm, "parameter {name} was not declared by the network it is asked for"),
    }
}

/// Runs a constructor to learn what it asks for.
fn declare<N>(build: impl FnOnce(&Builder) -> Result<N>) -> Result<(N, Vec<Declaration>)> {
    let source = Source::Declare(RefCell::default());
    let net = build(&Builder::new(&source))?;
    let Source::Declare(declared) = source else { unreachable!("the source is made above") };
    let declared = declared.into_inner();
    let mut seen = HashSet::new();
    if let Some(twice) = declared.iter().flat_map(|d| &d.parts).find(|part| !seen.insert(part.name())) {
        bail!(Alarm, "the network declares parameter {} twice", twice.name());
    }
    Ok((net, declared))
}

/// A network with shapes but without memory for its parameters, and how many numbers they would be.
pub(super) fn skeleton<N>(build: impl FnOnce(&Builder) -> Result<N>) -> Result<(N, usize)> {
    let (net, declared) = declare(build)?;
    let parameters = declared.iter().filter(|d| d.kind == Kind::Parameter);
    Ok((net, parameters.map(|d| d.shape.elem_count()).sum()))
}

/// The parameters of a network, f32, in the order in which its constructor asks for them, and its buffers.
///
/// A clone is another handle on the same numbers.
#[derive(Clone, Debug, Default)]
pub struct Params {
    vars: Vec<(String, Var)>,
    /// For each variable the names and shapes of its parts in files.
    parts: Vec<Vec<(String, Shape)>>,
    buffers: Vec<(String, Buffer)>,
    packs: Arc<Packs>,
}

impl Params {
    /// Fresh parameters of the network that `build` makes; the same for the same seed, on any device.
    pub fn init<N>(seed: u64, device: &Device, build: impl FnOnce(&Builder) -> Result<N>) -> Result<Self> {
        let mut params = Self::default();
        for declaration in declare(build)?.1 {
            let var = declaration.initial(seed, device)?;
            params.push(&declaration, var);
        }
        Ok(params)
    }

    fn push(&mut self, declaration: &Declaration, var: Var) {
        let name = declaration.name.clone();
        match declaration.kind {
            Kind::Parameter => {
                let part = |part: &Part| (part.name().to_owned(), part.shape.clone());
                self.parts.push(declaration.parts.iter().map(part).collect());
                self.vars.push((name, var));
            }
            Kind::Buffer | Kind::Counter => self.buffers.push((name, Buffer(var))),
        }
    }

    /// Reads the parameters of the network that `build` makes from a file of safetensors or of PyTorch.
    ///
    /// Fails as [`StateDict::open`] and [`Params::from_state_dict`] do, naming the file.
    pub fn load<N>(path: &Path, device: &Device, build: impl FnOnce(&Builder) -> Result<N>) -> Result<Self> {
        Self::from_state_dict(StateDict::open(path)?, device, build)
    }

    /// Takes the parameters of the network that `build` makes out of a file.
    ///
    /// f64, f32, f16 and bf16 tensors are accepted and held as f32, counters of any type as i64; those that are missing
    /// are 0, with a note. A prefix of all names that is none of the network's is taken off, with a note. Fails with
    /// [`Error::Data`], naming the file, and with their numbers the tensors that are missing, unexpected, misshapen, of
    /// another type or not finite.
    pub fn from_state_dict<N>(
        mut file: StateDict,
        device: &Device,
        build: impl FnOnce(&Builder) -> Result<N>,
    ) -> Result<Self> {
        let declared = declare(build)?.1;
        let known: Vec<&String> =
            declared.iter().flat_map(|d| &d.parts).flat_map(|part| &part.names).collect();
        let origin = file.origin().to_owned();
        while let Some(prefix) =
            file.common_prefix().filter(|p| !known.iter().any(|name| name.starts_with(p)))
        {
            progress::note(&format!("{origin}: the prefix {prefix} of all names is taken off"));
            let len = prefix.len();
            file.strip(len);
        }
        let mut faults = Faults::default();
        let mut params = Self::default();
        for declaration in &declared {
            if let Some(var) = declaration.take(&mut file, &mut faults, device)? {
                params.push(declaration, var);
            }
        }
        faults.unexpected.extend(file.names().map(str::to_owned));
        faults.check(&origin)?;
        if faults.uncounted > 0 {
            progress::note(&format!(
                "{origin}: {} batch counters are missing and begin at 0",
                faults.uncounted
            ));
        }
        Ok(params)
    }

    /// The network with these parameters and with gradients; it sees an optimiser's updates in place.
    pub fn tracked<N>(&self, build: impl FnOnce(&Builder) -> Result<N>) -> Result<N> {
        self.view(build, true)
    }

    /// The network with these parameters but without gradients, so that an attack does not pay for them.
    ///
    /// The storage is shared, buffers included, so it sees updates in place too.
    pub fn frozen<N>(&self, build: impl FnOnce(&Builder) -> Result<N>) -> Result<N> {
        self.view(build, false)
    }

    fn view<N>(&self, build: impl FnOnce(&Builder) -> Result<N>, tracked: bool) -> Result<N> {
        let (vars, packs) = (self.all().into_iter().collect(), Arc::clone(&self.packs));
        build(&Builder::new(&Source::Values { vars, tracked, packs }))
    }

    /// The parameters and their names, in the order of their declaration. Hold [`Params::overwriting`] while
    /// overwriting any of them.
    pub fn vars(&self) -> &[(String, Var)] {
        &self.vars
    }

    /// A guard to hold while parameters are overwritten. When it is dropped, all views are told to derive again
    /// what kernels made from the parameters.
    pub fn overwriting(&self) -> Overwriting<'_> {
        Overwriting(&self.packs)
    }

    /// The buffers and their names, in the order of their declaration.
    pub fn buffers(&self) -> &[(String, Buffer)] {
        &self.buffers
    }

    /// Parameters and buffers under their names: the complete network.
    pub fn all(&self) -> Vec<(String, Var)> {
        let buffers = self.buffers.iter().map(|(name, Buffer(var))| (name.clone(), var.clone()));
        self.vars.iter().cloned().chain(buffers).collect()
    }

    /// The number of parameters, not counting buffers.
    pub fn count(&self) -> usize {
        self.vars.iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// Every parameter under its name in files, as `of` gives it for its variable: the value, a gradient. Fails if
    /// `of` does, or if a tensor does not have as many elements as its variable.
    pub fn named(&self, of: impl Fn(&Var) -> Result<Tensor>) -> Result<Vec<(String, Tensor)>> {
        let mut named = Vec::new();
        for ((_, var), parts) in self.vars.iter().zip(&self.parts) {
            let (flat, mut start) = (of(var)?.flatten_all()?, 0);
            if flat.elem_count() != var.elem_count() {
                bail!(Alarm, "a variable of {} numbers is given as {}", var.elem_count(), flat.elem_count());
            }
            for (name, shape) in parts {
                named.push((name.clone(), flat.narrow(0, start, shape.elem_count())?.reshape(shape)?));
                start += shape.elem_count();
            }
        }
        Ok(named)
    }

    /// Overwrites in place every parameter and the given buffers; other buffers stay as they are. All views of
    /// these parameters see it. For parameters that share a variable, either the variable or all of them are given.
    ///
    /// Fails with [`Error::Data`], naming every tensor that is missing, unexpected or misshapen; in that case
    /// nothing is overwritten.
    pub fn copy_from<'a>(&self, named: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<()> {
        let mut faults = Faults::default();
        let mut found: BTreeMap<_, _> = named.into_iter().collect();
        let mut pairs = Vec::with_capacity(self.vars.len());
        for ((name, var), parts) in self.vars.iter().zip(&self.parts) {
            let whole = [(name.clone(), var.shape().clone())];
            let parts = if found.contains_key(name.as_str()) { &whole[..] } else { parts };
            let mut flat = Vec::with_capacity(parts.len());
            for (name, shape) in parts {
                if let Some(tensor) = faults.take(&mut found, name, shape) {
                    flat.push(tensor.flatten_all()?.to_dtype(var.dtype())?);
                }
            }
            if flat.len() == parts.len() {
                pairs.push((var, Tensor::cat(&flat, 0)?.reshape(var.shape())?));
            }
        }
        for (name, Buffer(var)) in &self.buffers {
            if found.contains_key(name.as_str())
                && let Some(tensor) = faults.take(&mut found, name, var.shape())
            {
                pairs.push((var, tensor.clone()));
            }
        }
        faults.unexpected.extend(found.keys().map(|name| (*name).to_owned()));
        faults.check("the tensors given")?;
        let _overwriting = self.overwriting();
        for (var, tensor) in pairs {
            var.set(&tensor.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
        Ok(())
    }

    /// The parameters and buffers as the bytes of a safetensors file: the same bytes for the same values and metadata.
    ///
    /// `metadata` goes into the header together with `format: pt`, which PyTorch's readers look for.
    pub fn to_safetensors(&self, metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
        // Written here because the `safetensors` crate keeps metadata in a HashMap, whose order varies.
        let metadata: BTreeMap<_, _> = metadata.iter().copied().chain(iter::once(("format", "pt"))).collect();
        let mut header = serde_json::Map::from_iter([("__metadata__".into(), serde_json::json!(metadata))]);
        let mut sorted = self.named(|var| Ok(var.as_detached_tensor()))?;
        sorted.extend(self.buffers.iter().map(|(name, buffer)| (name.clone(), buffer.get())));
        // Readers map the data: the eight bytes of an i64 must not begin between two f32s.
        sorted.sort_by(|(a, x), (b, y)| (x.dtype() != DType::I64, a).cmp(&(y.dtype() != DType::I64, b)));
        let mut data = Vec::with_capacity(4 * self.count());
        for (name, tensor) in sorted {
            let start = data.len();
            let flat = tensor.flatten_all()?;
            let dtype = if tensor.dtype() == DType::I64 {
                data.extend(flat.to_vec1::<i64>()?.iter().flat_map(|v| v.to_le_bytes()));
                "I64"
            } else {
                data.extend(flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()));
                "F32"
            };
            let entry = serde_json::json!({"dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, data.len()]});
            header.insert(name, entry);
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut header);
        bytes.append(&mut data);
        Ok(bytes)
    }
}

/// Parameters that belong to no network, by name.
impl From<Vec<(String, Var)>> for Params {
    fn from(vars: Vec<(String, Var)>) -> Self {
        let parts = vars.iter().map(|(name, var)| vec![(name.clone(), var.shape().clone())]).collect();
        Self { vars, parts, ..Self::default() }
    }
}

/// Everything that is wrong with a set of tensors, to be reported together.
#[derive(Default)]
struct Faults {
    wrong: Vec<String>,
    /// The names of what is not there.
    missing: Vec<String>,
    /// The names of what nobody asks for.
    unexpected: Vec<String>,
    /// How many counters are not there, which is no fault.
    uncounted: usize,
}

impl Faults {
    /// Takes the tensor of this name, if there is one of this shape.
    fn take<'t>(
        &mut self,
        found: &mut BTreeMap<&str, &'t Tensor>,
        name: &str,
        shape: &Shape,
    ) -> Option<&'t Tensor> {
        match found.remove(name) {
            Some(tensor) if tensor.shape() == shape => return Some(tensor),
            Some(tensor) => self.shape(name, tensor.dims(), shape.dims()),
            None => self.missing.push(name.to_owned()),
        }
        None
    }

    fn shape(&mut self, name: &str, found: &[usize], expected: &[usize]) {
        self.wrong.push(format!("{name} has shape {found:?}, expected {expected:?}"));
    }

    /// What was read, or `None` after a fault in the data.
    fn or_fault<T>(&mut self, read: Result<T>) -> Result<Option<T>> {
        match read {
            Err(Error::Data(fault)) => {
                self.wrong.push(fault);
                Ok(None)
            }
            read => read.map(Some),
        }
    }

    /// Fails if there are faults, with at most [`SHOWN`] of them and the numbers of the others.
    fn check(&self, origin: &str) -> Result<()> {
        let kinds = [
            (&self.wrong, "", "do not fit"),
            (&self.missing, " is missing", "are missing"),
            (&self.unexpected, " is not part of this network", "are not part of this network"),
        ];
        let share = SHOWN / kinds.iter().filter(|(names, ..)| !names.is_empty()).count().max(1);
        let mut told = Vec::new();
        for (names, one, all) in kinds {
            told.extend(names.iter().take(share).map(|name| format!("{name}{one}")));
            if names.len() > share {
                told.push(format!("{} in all {all}", names.len()));
            }
        }
        let prefixed =
            |missing: &String| self.unexpected.iter().find_map(|name| name.strip_suffix(missing.as_str()));
        if let Some(prefix) = self.missing.first().and_then(prefixed) {
            let count = self.unexpected.iter().filter(|name| name.starts_with(prefix)).count();
            told.push(format!("{count} of these begin with {prefix}"));
        }
        if told.is_empty() {
            return Ok(());
        }
        bail!(Data, "{origin}: not the weights of this network: {}", told.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use safetensors::{Dtype, SafeTensors, tensor::TensorView};

    use super::*;

    struct Net {
        a: Tensor,
        b: Tensor,
    }

    impl Net {
        fn new(b: &Builder) -> Result<Self> {
            let out = b.pp_or("out", "proj");
            Ok(Self {
                a: b.pp("in").get("weight", (2, 3), Init::FanIn(3))?,
                b: out.get("weight", 4, Init::Normal(1.0))?,
            })
        }
    }

    fn write(dir: &Path, tensors: &[(&str, Dtype, &[usize], &[u8])]) -> std::path::PathBuf {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap())
        });
        let path = dir.join("model.safetensors");
        crate::fs::publish(&path, &safetensors::serialize(views, None).unwrap()).unwrap();
        path
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_but_not_on_order() {
        let forth = Params::init(7, &Device::Cpu, Net::new).unwrap();
        let back = Params::init(7, &Device::Cpu, |b| {
            b.pp("out").get("weight", 4, Init::Normal(1.0))?;
            b.pp("in").get("weight", (2, 3), Init::FanIn(3))
        })
        .unwrap();
        assert_eq!(values(&forth.vars[0].1), values(&back.vars[1].1));
        assert_eq!(values(&forth.vars[1].1), values(&back.vars[0].1));
        let other = Params::init(8, &Device::Cpu, Net::new).unwrap();
        assert_ne!(values(&forth.vars[0].1), values(&other.vars[0].1));
    }

    #[test]
    fn fan_in_initialisation_is_uniform_in_its_bounds() {
        let v = Init::FanIn(16).values(1, "w", 40_000);
        let mean = v.iter().sum::<f32>() / v.len() as f32;
        let variance = v.iter().map(|v| v * v).sum::<f32>() / v.len() as f32;
        assert!(v.iter().all(|v| v.abs() <= 0.25));
        assert!(mean.abs() < 3e-3, "{mean}");
        assert!((variance - 0.25 * 0.25 / 3.0).abs() < 5e-4, "{variance}");
    }

    #[test]
    fn safetensors_round_trip_bit_for_bit_and_deterministically() {
        let dir = tempfile::tempdir().unwrap();
        let params = Params::init(3, &Device::Cpu, Net::new).unwrap();
        let metadata = [("b", "2"), ("a", "1"), ("c", "3")];
        let bytes = params.to_safetensors(&metadata).unwrap();
        assert_eq!(bytes, params.to_safetensors(&metadata).unwrap());
        let path = dir.path().join("model.safetensors");
        crate::fs::publish(&path, &bytes).unwrap();
        let back = Params::load(&path, &Device::Cpu, Net::new).unwrap();
        for ((name, var), (back_name, back_var)) in params.vars().iter().zip(back.vars()) {
            assert_eq!((name, values(var)), (back_name, values(back_var)));
        }
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn half_precision_is_widened_and_former_names_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let f16 = [0x00, 0x3c, 0x00, 0xc0, 0x00, 0x38, 0, 0, 0, 0, 0, 0]; // 1, -2, 0.5, 0, 0, 0
        let bf16 = [0x80, 0x3f, 0, 0, 0, 0, 0x40, 0xc0]; // 1, 0, 0, -3
        let path = write(
            dir.path(),
            &[("in.weight", Dtype::F16, &[2, 3], &f16), ("proj.weight", Dtype::BF16, &[4], &bf16)],
        );
        let params = Params::load(&path, &Device::Cpu, Net::new).unwrap();
        let net = params.frozen(Net::new).unwrap();
        assert_eq!(values(&net.a), [1.0, -2.0, 0.5, 0.0, 0.0, 0.0]);
        assert_eq!(values(&net.b), [1.0, 0.0, 0.0, -3.0]);
        assert_eq!(params.vars()[1].0, "out.weight");
    }

    #[test]
    fn a_bad_file_is_told_whole() {
        let dir = tempfile::tempdir().unwrap();
        let f32s = |v: [f32; 4]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let path = write(
            dir.path(),
            &[
                ("extra", Dtype::F32, &[4], &f32s([0.0; 4])),
                ("out.weight", Dtype::F32, &[4], &f32s([0.0, f32::NAN, 0.0, 0.0])),
            ],
        );
        let error = Params::load(&path, &Device::Cpu, Net::new).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        let text = error.to_string();
        for part in ["model.safetensors", "in.weight is missing", "out.weight holds NaN", "extra is not part"]
        {
            assert!(text.contains(part), "{text}");
        }

        let path = write(
            dir.path(),
            &[("in.weight", Dtype::F32, &[4], &f32s([0.0; 4])), ("out.weight", Dtype::U8, &[4], &[0; 4])],
        );
        let text = Params::load(&path, &Device::Cpu, Net::new).unwrap_err().to_string();
        assert!(text.contains("in.weight has shape [4], expected [2, 3]"), "{text}");
        assert!(text.contains("out.weight is of type U8, expected F64, F32, F16 or BF16"), "{text}");

        crate::fs::publish(&path, b"<html>").unwrap();
        let error = Params::load(&path, &Device::Cpu, Net::new).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains("not a safetensors file"), "{error}");
    }

    #[test]
    fn views_see_updates_and_only_the_tracked_one_has_gradients() {
        let params = Params::init(1, &Device::Cpu, Net::new).unwrap();
        let (tracked, frozen) = (params.tracked(Net::new).unwrap(), params.frozen(Net::new).unwrap());
        assert!(tracked.a.track_op());
        assert!(!frozen.a.track_op());
        let ones = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let fours = Tensor::full(4f32, 4, &Device::Cpu).unwrap();
        params.copy_from([("in.weight", &ones), ("out.weight", &fours)]).unwrap();
        assert_eq!(values(&tracked.a), [1.0; 6]);
        assert_eq!(values(&frozen.b), [4.0; 4]);
        let grads = tracked.a.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(values(grads.get(params.vars()[0].1.as_tensor()).unwrap()), [2.0; 6]);
    }

    #[test]
    fn what_kernels_made_of_a_weight_is_shared_by_views_until_an_update() {
        let build = |b: &Builder| Ok((b.get("weight", 4, Init::Ones)?, b.packed("weight")));
        let params = Params::init(1, &Device::Cpu, build).unwrap();
        let (tracked, frozen) = (params.tracked(build).unwrap().1, params.frozen(build).unwrap().1);
        let before = tracked.get();
        assert!(Arc::ptr_eq(&before, &frozen.get()));
        params.copy_from([("weight", &Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap())]).unwrap();
        assert!(!Arc::ptr_eq(&before, &frozen.get()));
        assert!(Arc::ptr_eq(&tracked.get(), &frozen.get()));
    }

    #[test]
    fn copy_from_changes_nothing_unless_all_fits() {
        let params = Params::init(1, &Device::Cpu, Net::new).unwrap();
        let before = values(&params.vars()[0].1);
        let ones = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let error = params.copy_from([("in.weight", &ones), ("out.weight", &ones)]).unwrap_err();
        assert!(error.to_string().contains("out.weight has shape [2, 3], expected [4]"), "{error}");
        assert_eq!(values(&params.vars()[0].1), before);
    }

    fn with_buffers(b: &Builder) -> Result<(Tensor, Buffer, Buffer)> {
        let b = b.pp("norm");
        Ok((b.get("weight", 3, Init::Ones)?, b.buffer("mean", 3, Init::Zeros)?, b.counter("count")?))
    }

    #[test]
    fn buffers_are_saved_and_loaded_but_are_no_parameters() {
        let params = Params::init(1, &Device::Cpu, with_buffers).unwrap();
        assert_eq!((params.count(), skeleton(with_buffers).unwrap().1), (3, 3));
        assert_eq!(params.vars().len(), 1);
        let (_, mean, count) = params.tracked(with_buffers).unwrap();
        mean.set(&Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap()).unwrap();
        count.set(&Tensor::new(1i64 << 40, &Device::Cpu).unwrap()).unwrap();
        let bytes = params.to_safetensors(&[]).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("norm.count").unwrap();
        assert_eq!(
            (view.dtype(), view.shape(), view.data()),
            (Dtype::I64, &[][..], &[0, 0, 0, 0, 0, 1, 0, 0][..])
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        crate::fs::publish(&path, &bytes).unwrap();
        let back = Params::load(&path, &Device::Cpu, with_buffers).unwrap();
        let (_, mean, count) = back.frozen(with_buffers).unwrap();
        assert!(!mean.get().track_op());
        assert_eq!(
            (values(&mean.get()), count.get().to_scalar::<i64>().unwrap()),
            (vec![1.0, 2.0, 3.0], 1 << 40)
        );
        assert_eq!(back.to_safetensors(&[]).unwrap(), bytes);
    }

    #[test]
    fn parameters_that_share_a_vector_have_their_names_in_files() {
        let build = |b: &Builder| {
            let parts =
                [("weight", Shape::from((2, 3)), Init::FanIn(3)), ("bias", Shape::from(2), Init::Ones)];
            b.pp("block").flat(parts)
        };
        let params = Params::init(1, &Device::Cpu, build).unwrap();
        assert_eq!(params.vars().len(), 1);
        let alone = |b: &Builder| {
            let b = b.pp("block");
            Ok((b.get("weight", (2, 3), Init::FanIn(3))?, b.get("bias", 2, Init::Ones)?))
        };
        // The same names, first values and file as without the vector.
        let apart = Params::init(1, &Device::Cpu, alone).unwrap();
        assert_eq!(params.to_safetensors(&[]).unwrap(), apart.to_safetensors(&[]).unwrap());
        let changed = apart.named(|var| Ok((var.as_tensor() * 2.0)?)).unwrap();
        params.copy_from(changed.iter().map(|(name, t)| (name.as_str(), t))).unwrap();
        let expected: Vec<f32> = changed.iter().flat_map(|(_, t)| values(t)).collect();
        assert_eq!(values(&params.vars()[0].1), expected);
        let error = params.copy_from([("block.weight", &changed[0].1)]).unwrap_err().to_string();
        assert!(error.contains("block.bias is missing"), "{error}");
    }

    #[test]
    fn buffers_are_copied_if_they_are_given() {
        let params = Params::init(1, &Device::Cpu, with_buffers).unwrap();
        let fours = Tensor::full(4f32, 3, &Device::Cpu).unwrap();
        params.copy_from([("norm.weight", &fours)]).unwrap();
        assert_eq!(values(&params.buffers()[0].1.get()), [0.0; 3]);
        let count = Tensor::new(7i64, &Device::Cpu).unwrap();
        params.copy_from([("norm.weight", &fours), ("norm.mean", &fours), ("norm.count", &count)]).unwrap();
        assert_eq!(values(&params.buffers()[0].1.get()), [4.0; 3]);
        assert_eq!(params.buffers()[1].1.get().to_scalar::<i64>().unwrap(), 7);
    }

    /// A file with a norm whose counter is of this type, or missing.
    fn norm(dir: &Path, counter: Option<(Dtype, Vec<u8>)>) -> std::path::PathBuf {
        let mut tensors = vec![
            ("norm.weight", Dtype::F32, &[3][..], &[0; 12][..]),
            ("norm.mean", Dtype::F32, &[3], &[0; 12]),
        ];
        tensors
            .extend(counter.iter().map(|(dtype, bytes)| ("norm.count", *dtype, &[][..], bytes.as_slice())));
        write(dir, &tensors)
    }

    #[test]
    fn a_counter_may_be_of_any_type_or_missing_but_has_to_be_whole() {
        let dir = tempfile::tempdir().unwrap();
        let count = |counter: Option<(Dtype, Vec<u8>)>| {
            let loaded = Params::load(&norm(dir.path(), counter), &Device::Cpu, with_buffers);
            loaded.map(|params| params.buffers()[1].1.get().to_scalar::<i64>().unwrap())
        };
        assert_eq!(count(Some((Dtype::F32, 7f32.to_le_bytes().into()))).unwrap(), 7);
        assert_eq!(count(Some((Dtype::I32, (-3i32).to_le_bytes().into()))).unwrap(), -3);
        assert_eq!(count(None).unwrap(), 0);
        let error = count(Some((Dtype::F64, 1.5f64.to_le_bytes().into()))).unwrap_err().to_string();
        assert!(error.ends_with("norm.count is 1.5, expected an integer"), "{error}");
    }

    #[test]
    fn doubles_are_rounded_and_a_common_prefix_is_taken_off() {
        let dir = tempfile::tempdir().unwrap();
        let f64s = |v: &[f64]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let (a, b) = (f64s(&[0.1, 0.0, 0.0, 0.0, 0.0, 1e-50]), f64s(&[1.0; 4]));
        let path = write(
            dir.path(),
            &[
                ("module._orig_mod.in.weight", Dtype::F64, &[2, 3], &a),
                ("module._orig_mod.out.weight", Dtype::F64, &[4], &b),
            ],
        );
        let params = Params::load(&path, &Device::Cpu, Net::new).unwrap();
        assert_eq!(values(&params.vars()[0].1), [0.1f32, 0.0, 0.0, 0.0, 0.0, 0.0]);

        let path = write(dir.path(), &[("in.weight", Dtype::F64, &[2, 3], &f64s(&[1e300; 6]))]);
        let error = Params::load(&path, &Device::Cpu, Net::new).unwrap_err().to_string();
        assert!(error.contains("in.weight holds inf, expected finite numbers"), "{error}");
    }

    #[test]
    fn many_faults_are_told_by_ten_names_their_numbers_and_a_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let build =
            |b: &Builder| (0..30).map(|i| b.get(&format!("w{i}"), 1, Init::Ones)).collect::<Result<Vec<_>>>();
        let names: Vec<_> = (0..30).map(|i| format!("net.w{i}")).chain(["sigma".into()]).collect();
        let tensors: Vec<_> =
            names.iter().map(|name| (name.as_str(), Dtype::F32, &[1][..], &[0; 4][..])).collect();
        let path = write(dir.path(), &tensors);
        let error = Params::load(&path, &Device::Cpu, build).unwrap_err().to_string();
        let end = "; 31 in all are not part of this network; 30 of these begin with net.";
        assert!(error.contains("w4 is missing; 30 in all are missing; net.w0 is not part"), "{error}");
        assert!(error.ends_with(end), "{error}");
        assert_eq!(error.matches(" is ").count(), 10, "{error}");
    }
}
