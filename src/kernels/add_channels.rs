//! A number added to each channel.

use candle_core::Tensor;

#[cfg(feature = "cuda")]
use super::cuda;
use super::reference;
use crate::Result;

/// `x + shift`. `x`: `(b, …, c)`; `shift`: `(c,)`, or `(b, c)` for each sample its own. Returns the shape of `x`. Fails if the
/// shapes do not fit.
pub fn add_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let (b, c) = (x.dims().first(), x.dims().last());
    let fits = match *shift.dims() {
        [of_c] => c == Some(&of_c),
        [of_b, of_c] => (b, c) == (Some(&of_b), Some(&of_c)),
        _ => false,
    };
    if !fits {
        bail!(Alarm, "{:?} is added to the channels of {:?}", shift.dims(), x.dims());
    }
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(x, &[shift]) {
        return cuda::add_channels(x, shift);
    }
    reference::add_channels(x, shift)
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn channels_are_shifted_by_their_number_or_by_that_of_their_sample() {
        let x =
            Tensor::new(&[[[1f32, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], &candle_core::Device::Cpu)
                .unwrap();
        let shift = |numbers: &[f32], shape: &[usize]| {
            Tensor::new(numbers, x.device()).unwrap().reshape(shape).unwrap()
        };
        let of = |shift: Tensor| values(&add_channels(&x, &shift).unwrap());
        assert_eq!(of(shift(&[10.0, 20.0], &[2])), [11.0, 22.0, 13.0, 24.0, 15.0, 26.0, 17.0, 28.0]);
        let own = shift(&[10.0, 20.0, 30.0, 40.0], &[2, 2]);
        assert_eq!(of(own), [11.0, 22.0, 13.0, 24.0, 35.0, 46.0, 37.0, 48.0]);
        for shape in [[1, 2], [4, 1]] {
            let error =
                add_channels(&x, &shift(&[0.0; 4][..shape[0] * shape[1]], &shape)).unwrap_err().to_string();
            assert!(error.contains(&format!("{shape:?} is added to the channels of [2, 2, 2]")), "{error}");
        }
    }
}
