//! The blocks of residual networks.

use candle_core::Tensor;

use crate::{
    Result, kernels,
    nn::{
        layers::{BatchNorm, BatchNormMode, Conv2d, RunningStatistics, fused, fused_macs},
        params::{Builder, Packed},
    },
};

/// Layers and what goes around them.
pub(super) trait Residual: Send + Sync {
    /// `x`: `(b, h, w, c_in)`. Returns `(b, h / stride, w / stride, c_out)`, rounded up.
    fn forward(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor>;

    /// Multiply-adds for an input of `before` and an output of `after` pixels.
    fn macs(&self, before: usize, after: usize) -> u64;
}

/// Two 3 × 3 convolutions. All parameters of the block are one vector: see [`kernels::basic_block`].
pub(super) struct BasicBlock {
    theta: Tensor,
    shape: kernels::BasicBlock,
    /// One for each norm.
    running: Vec<RunningStatistics>,
    packed: [Packed; 3],
}

impl BasicBlock {
    /// `shortcut`: the name of the layers that the input goes through where the shape changes.
    pub fn new(c_in: usize, c_out: usize, stride: usize, shortcut: &str, b: &Builder) -> Result<Self> {
        let shape = kernels::BasicBlock { c_in, c_out, stride, epsilon: BatchNorm::EPSILON };
        let named = |name: &str| name.replace("shortcut", shortcut);
        let parameters = shape.parameters().into_iter().map(|(name, shape)| (named(name), shape));
        let theta = fused(parameters.collect(), b)?;
        let norms = ["bn1", "bn2", "shortcut.1"].into_iter().take(shape.norms());
        let running =
            norms.map(|name| RunningStatistics::new(c_out, &b.pp(named(name)))).collect::<Result<_>>()?;
        let packed = ["conv1", "conv2", "shortcut.0"].map(|name| b.packed(name));
        Ok(Self { theta, shape, running, packed })
    }
}

impl Residual for BasicBlock {
    fn forward(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        let packed = self.packed.each_ref().map(Packed::get);
        let running = match mode {
            BatchNormMode::Train => None,
            BatchNormMode::Eval => Some(self.running.iter().map(RunningStatistics::get).collect::<Vec<_>>()),
        };
        let (out, batch) = kernels::basic_block(x, &self.theta, running.as_deref(), &self.shape, &packed)?;
        for (running, batch) in self.running.iter().zip(&batch) {
            running.track(batch)?;
        }
        Ok(out)
    }

    fn macs(&self, _: usize, after: usize) -> u64 {
        fused_macs(self.shape.parameters(), after)
    }
}

/// A convolution and the norm behind it.
struct Normed {
    conv: Conv2d,
    norm: BatchNorm,
}

impl Normed {
    fn new(
        [c_in, c_out]: [usize; 2],
        (kernel, stride): (usize, usize),
        [conv, norm]: [&str; 2],
        b: &Builder,
    ) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::without_bias(c_in, c_out, kernel, stride, &b.pp(conv))?,
            norm: BatchNorm::new(c_out, &b.pp(norm))?,
        })
    }

    fn forward(&self, x: &Tensor, mode: BatchNormMode, relu: bool) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward(x)?, mode, relu)
    }
}

/// Convolutions of 1 × 1, 3 × 3 and 1 × 1 (He et al. 2016, §4.1). The second has the stride, as in RobustBench and
/// torchvision; in the paper it is the first.
pub(super) struct Bottleneck {
    layers: [Normed; 3],
    shortcut: Option<Normed>,
}

impl Bottleneck {
    /// How many times more channels come out than the 3 × 3 convolution has.
    pub const EXPANSION: usize = 4;

    /// `width`: the channels of the 3 × 3 convolution. `shortcut`: as in [`BasicBlock::new`].
    pub fn new(c_in: usize, width: usize, stride: usize, shortcut: &str, b: &Builder) -> Result<Self> {
        let c_out = Self::EXPANSION * width;
        let through = || {
            let names = [0, 1].map(|i| format!("{shortcut}.{i}"));
            Normed::new([c_in, c_out], (1, stride), names.each_ref().map(String::as_str), b)
        };
        Ok(Self {
            layers: [
                Normed::new([c_in, width], (1, 1), ["conv1", "bn1"], b)?,
                Normed::new([width, width], (3, stride), ["conv2", "bn2"], b)?,
                Normed::new([width, c_out], (1, 1), ["conv3", "bn3"], b)?,
            ],
            shortcut: (stride != 1 || c_in != c_out).then(through).transpose()?,
        })
    }
}

impl Residual for Bottleneck {
    fn forward(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        let [first, second, third] = &self.layers;
        let inner = second.forward(&first.forward(x, mode, true)?, mode, true)?;
        let out = third.forward(&inner, mode, false)?;
        let x = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x, mode, false)?,
            None => x.clone(),
        };
        kernels::relu(&(out + x)?)
    }

    fn macs(&self, before: usize, after: usize) -> u64 {
        let [first, rest @ ..] = &self.layers;
        let rest = rest.iter().chain(&self.shortcut).map(|layer| layer.conv.macs(after));
        first.conv.macs(before) + rest.sum::<u64>()
    }
}

/// Two 3 × 3 convolutions, each behind a norm and ReLU (He et al. 2016, "Identity mappings in deep residual
/// networks"). Where the shape changes, the input goes through a 1 × 1 convolution.
pub(super) struct Preactivation {
    norms: [BatchNorm; 2],
    convs: [Conv2d; 2],
    shortcut: Option<Conv2d>,
    /// Whether the shortcut takes what comes out of the first ReLU.
    activated_shortcut: bool,
}

impl Preactivation {
    pub fn new(
        c_in: usize,
        c_out: usize,
        stride: usize,
        activated_shortcut: bool,
        b: &Builder,
    ) -> Result<Self> {
        let conv =
            |c_in, kernel, stride, name| Conv2d::without_bias(c_in, c_out, kernel, stride, &b.pp(name));
        let norm = |channels, name| BatchNorm::new(channels, &b.pp(name));
        let changes = stride != 1 || c_in != c_out;
        Ok(Self {
            norms: [norm(c_in, "bn1")?, norm(c_out, "bn2")?],
            convs: [conv(c_in, 3, stride, "conv1")?, conv(c_out, 3, 1, "conv2")?],
            shortcut: changes.then(|| conv(c_in, 1, stride, "shortcut.0")).transpose()?,
            activated_shortcut,
        })
    }
}

impl Residual for Preactivation {
    fn forward(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        let active = self.norms[0].forward(x, mode, true)?;
        let inner = self.norms[1].forward(&self.convs[0].forward(&active)?, mode, true)?;
        let out = self.convs[1].forward(&inner)?;
        let x = match &self.shortcut {
            Some(shortcut) => shortcut.forward(if self.activated_shortcut { &active } else { x })?,
            None => x.clone(),
        };
        Ok((out + x)?)
    }

    fn macs(&self, _: usize, after: usize) -> u64 {
        self.convs.iter().chain(&self.shortcut).map(|conv| conv.macs(after)).sum()
    }
}
