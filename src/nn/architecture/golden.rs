//! Classifiers compared with PyTorch's, from the files that tests/golden/resnet.py, residual.py and wide_resnet.py write.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use candle_core::{DType, Device, Tensor, Var};

use crate::{
    Result, kernels,
    nn::{
        layers::BatchNormMode,
        network::ClassifierNetwork,
        params::{Builder, Params},
    },
};

/// A golden file and the parameters in it.
pub struct Golden {
    pub tensors: BTreeMap<String, Tensor>,
    pub params: Params,
}

fn nhwc(t: &Tensor) -> Tensor {
    t.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

/// max |found - expected| ≤ 1e-5 · max |expected|
#[track_caller]
fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let max = |t: Tensor| {
        let t = t.to_dtype(DType::F64).unwrap().abs().unwrap();
        t.flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
    };
    let error = max((found - expected).unwrap()) / max(expected.clone());
    assert!(error <= 1e-5, "{what} differs by {error:e} of its scale");
}

impl Golden {
    /// Reads `tests/golden/<name>.safetensors` into the parameters of the network that `build` makes.
    pub fn read<N>(name: &str, build: impl Fn(&Builder) -> Result<N>) -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let tensors = candle_core::safetensors::load(dir.join(format!("{name}.safetensors")), &Device::Cpu);
        let tensors: BTreeMap<_, _> = tensors.unwrap().into_iter().collect();
        let params = Params::init(0, &Device::Cpu, build).unwrap();
        let golden = Self { tensors, params };
        golden.params.copy_from(golden.part("model.")).unwrap();
        golden
    }

    /// The images, NHWC.
    pub fn x(&self) -> Tensor {
        nhwc(&self.tensors["x"])
    }

    fn part<'a>(&'a self, prefix: &str) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        self.tensors.iter().filter_map(move |(k, v)| Some((k.strip_prefix(prefix)?, v)))
    }

    /// A file of PyTorch's tensors loads as it is: the names are theirs, all of them.
    pub fn names_are_theirs<N>(&self, build: impl Fn(&Builder) -> Result<N>) {
        let theirs: Vec<_> = self.part("model.").map(|(name, _)| name).collect();
        let named = self.params.named(|var| Ok(var.as_detached_tensor())).unwrap();
        let mut ours: Vec<_> = named.iter().map(|(name, _)| name.as_str()).collect();
        ours.extend(self.params.buffers().iter().map(|(name, _)| name.as_str()));
        ours.sort_unstable();
        assert_eq!(ours, theirs);
        let state: HashMap<_, _> = self.part("model.").map(|(k, v)| (k.to_owned(), v.clone())).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        candle_core::safetensors::save(&state, &path).unwrap();
        let loaded = Params::load(&path, &Device::Cpu, build).unwrap();
        assert_eq!(loaded.to_safetensors(&[]).unwrap(), self.params.to_safetensors(&[]).unwrap());
    }

    /// Logits with running statistics, which are not changed.
    pub fn evaluates_alike<N: ClassifierNetwork>(&self, build: impl Fn(&Builder) -> Result<N>) {
        let before = self.params.to_safetensors(&[]).unwrap();
        let net = self.params.frozen(build).unwrap();
        let logits = net.logits_by(&self.x(), BatchNormMode::Eval).unwrap();
        assert_close("logits", &logits, &self.tensors["logits_eval"]);
        assert_eq!(self.params.to_safetensors(&[]).unwrap(), before);
    }

    /// Logits, gradients and running statistics of a training step on the mean cross-entropy.
    pub fn trains_alike<N: ClassifierNetwork>(&self, build: impl Fn(&Builder) -> Result<N>) {
        let Self { tensors, params } = self;
        let net = params.tracked(build).unwrap();
        let x = Var::from_tensor(&self.x()).unwrap();
        let logits = net.logits_by(&x, BatchNormMode::Train).unwrap();
        assert_close("logits", &logits, &tensors["logits_train"]);
        let labels = tensors["labels"].to_dtype(DType::U32).unwrap();
        let loss = kernels::cross_entropy(&logits, &labels).unwrap().mean_all().unwrap();
        let grads = loss.backward().unwrap();
        assert_close("gradient of x", grads.get(&x).unwrap(), &nhwc(&tensors["grad_x"]));
        let gradients = params.named(|var| Ok(grads.get(var).unwrap().clone())).unwrap();
        for (name, gradient) in &gradients {
            assert_close(name, gradient, &tensors[&format!("grad.{name}")]);
        }
        assert_eq!(params.buffers().len(), self.part("after.").count());
        for (name, buffer) in params.buffers() {
            assert_close(name, &buffer.get(), &tensors[&format!("after.{name}")]);
        }
    }
}
