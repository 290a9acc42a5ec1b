//! Networks: layers with PyTorch's weight names and layouts, run over NHWC images.
//!
//! A network is a plain struct of tensors with one constructor, which its configuration calls:
//! [`ClassifierArchitecture::build`], [`DenoiserArchitecture::build`]. What the constructor gets from its
//! [`Builder`] depends on the caller: [`Params::init`] and [`Params::load`] find out from it which parameters there
//! are, and [`Params::tracked`] and [`Params::frozen`] supply them.

mod architecture;
pub mod checkpoint;
mod classifier;
mod layers;
mod lr;
mod network;
pub mod optim;
mod params;
mod state_dict;

pub use architecture::*;
pub use classifier::{Classifier, ClassifierConfig};
pub use layers::{BatchNorm, BatchNormMode, Conv2d, Embedding, GroupNorm, Linear, Standardization};
pub use lr::{LrDecay, LrSchedule};
pub use network::{ClassifierArchitecture, ClassifierNetwork, DenoiserArchitecture, DenoiserNetwork};
pub use params::{Buffer, Builder, Init, Packed, Params};
pub use state_dict::{Dtype, StateDict};
