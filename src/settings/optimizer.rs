//! Settings of the optimisers, gradient clipping included. What they do is in `nn::optim`.

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    error::expect_within,
    nn::optim::{Adam, AdamConfig, Optimizer, Sgd, SgdConfig},
};

/// Stochastic gradient descent.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SgdSettings {
    /// Peak learning rate.
    #[arg(long, default_value_t = 0.1)]
    pub learning_rate: f64,
    /// Momentum.
    #[arg(long, default_value_t = 0.9)]
    pub momentum: f64,
    /// Whether the momentum is Nesterov's, which looks ahead by one step; true if left out.
    #[arg(long)]
    pub nesterov: Option<bool>,
    /// Weight decay.
    #[arg(long, default_value_t = 5e-4)]
    pub weight_decay: f64,
    /// The largest norm of the gradient; larger gradients are scaled down to it.
    #[arg(long, default_value_t = 5.0)]
    pub grad_clip: f64,
}

/// Adam.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamSettings {
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// Weight decay, decoupled from the gradient.
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// The largest norm of the gradient; larger gradients are scaled down to it.
    #[arg(long, default_value_t = 5.0)]
    pub grad_clip: f64,
}

tagged! {
    /// The optimiser, which turns gradients into steps.
    pub enum OptimizerSettings("optimizer", default "sgd") {
        /// Stochastic gradient descent with momentum, by default Nesterov's (Sutskever et al. 2013).
        Sgd(SgdSettings) = "sgd",
        /// Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019).
        Adam(AdamSettings) = "adam",
    }
}

impl OptimizerSettings {
    /// The optimiser, before its first step.
    pub fn optimizer(&self) -> Box<dyn Optimizer> {
        match *self {
            Self::Sgd(SgdSettings { momentum, nesterov, weight_decay, .. }) => {
                let nesterov = nesterov.unwrap_or(true);
                Box::new(Sgd::new(SgdConfig { momentum, nesterov, weight_decay }))
            }
            Self::Adam(AdamSettings { weight_decay, .. }) => {
                Box::new(Adam::new(AdamConfig { weight_decay, ..AdamConfig::default() }))
            }
        }
    }

    /// Its display name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sgd(_) => "SGD",
            Self::Adam(_) => "Adam",
        }
    }

    /// The highest learning rate.
    pub fn learning_rate(&self) -> f64 {
        match self {
            Self::Sgd(sgd) => sgd.learning_rate,
            Self::Adam(adam) => adam.learning_rate,
        }
    }

    /// The largest norm of a gradient.
    pub fn grad_clip(&self) -> f64 {
        match self {
            Self::Sgd(sgd) => sgd.grad_clip,
            Self::Adam(adam) => adam.grad_clip,
        }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        let (Self::Sgd(SgdSettings { weight_decay, .. }) | Self::Adam(AdamSettings { weight_decay, .. })) =
            self;
        expect_within("learning_rate", self.learning_rate(), 1e-12, 1e3)?;
        expect_within("weight_decay", *weight_decay, 0.0, 1.0)?;
        expect_within("grad_clip", self.grad_clip(), 1e-6, 1e9)?;
        match self {
            Self::Sgd(sgd) => expect_within("momentum", sgd.momentum, 0.0, 1.0),
            Self::Adam(_) => Ok(()),
        }
    }
}
