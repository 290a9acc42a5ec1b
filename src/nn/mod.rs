//! Networks: layers with PyTorch's weight names and layouts, run over NHWC images.
//!
//! A network is a plain struct of tensors with one constructor, `Net::new(&config, &builder)`. What the
//! constructor gets from its [`Builder`] is decided by who calls it: [`Params::init`] and [`Params::load`]
//! learn from it which parameters there are, [`Params::tracked`] and [`Params::frozen`] fill it with them.

pub mod checkpoint;
mod classifier;
#[cfg(test)]
mod golden;
mod layers;
mod lr;
pub mod optim;
mod params;
mod resnet;
mod small_cnn;
mod unet;
mod wide_resnet;

pub use classifier::{Architecture, Classifier, ClassifierConfig, Network};
pub use layers::{BatchNorm, BatchNormMode, Conv2d, Embedding, GroupNorm, Linear, Standardization};
pub use lr::{LrDecay, LrSchedule};
pub use params::{Buffer, Builder, Init, Packed, Params};
pub use resnet::{ResNet, ResNetConfig};
pub use small_cnn::{SmallCnn, SmallCnnConfig};
pub(crate) use unet::DIFFUSERS_VERSION;
pub use unet::{SampleSize, UNet, UNetConfig};
pub use wide_resnet::{Activation, WideResNet, WideResNetConfig, WideResNetLayout};
