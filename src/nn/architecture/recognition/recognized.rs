//! What recognition says, and the questions that it asks.

use serde_json::{Map, Value};

use crate::nn::StateDict;

/// What the weights of a network say.
#[derive(Clone, Debug, PartialEq)]
pub struct Recognized {
    /// The network's name in files.
    pub tag: &'static str,
    /// The keys of the configuration that shapes determine.
    pub config: Map<String, Value>,
    /// The keys that they do not determine, on which the network's output depends.
    pub open: &'static [&'static str],
    /// The beginnings of the names that its authors' code saves and does not use.
    pub unused: &'static [&'static str],
}

/// The extent of a dimension of a tensor that has to be there.
pub fn dim(weights: &StateDict, name: &str, dim: usize) -> Option<usize> {
    weights.shape(name)?.get(dim).copied()
}

/// The first dimensions of the tensors `name(0)`, `name(1)`, … as far as there are any.
pub fn dims(weights: &StateDict, name: impl Fn(usize) -> String) -> Vec<usize> {
    (0..).map_while(|i| dim(weights, &name(i), 0)).collect()
}

/// A configuration's keys.
pub fn keys<const N: usize>(keys: [(&str, Value); N]) -> Map<String, Value> {
    keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
