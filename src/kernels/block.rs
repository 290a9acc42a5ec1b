//! What blocks have in common: parameters stored in one vector, and weights that the kernels keep packed.

use std::{collections::HashMap, ops::Range, sync::Arc};

use candle_core::{Shape, Tensor};

use super::conv2d::PackedWeights;
use crate::Result;

/// The packed weights of a block's convolutions: the first, the second and the shortcut's.
pub type BlockWeights = [Arc<PackedWeights>; 3];

/// Where each parameter is in a vector that holds them one after another.
pub(super) fn ranges(parameters: &[(&str, Shape)]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |(_, shape): &(&str, Shape)| {
        end += shape.elem_count();
        end - shape.elem_count()..end
    };
    parameters.iter().map(next).collect()
}

/// The parameters stored in a vector one after another.
pub(super) fn split(
    theta: &Tensor,
    parameters: &[(&'static str, Shape)],
) -> Result<HashMap<&'static str, Tensor>> {
    let part = |((name, shape), range): (&(&'static str, Shape), Range<usize>)| {
        Ok((*name, theta.narrow(0, range.start, range.len())?.reshape(shape)?))
    };
    parameters.iter().zip(ranges(parameters)).map(part).collect()
}
