//! Which image each slot of a training batch shows: first real images, then those of each synthetic source.

use crate::{
    Result,
    data::Dataset,
    rng::{Permutation, Stream, stream},
};

/// Images to draw from: an endless sequence of epochs, each in its own keyed order.
struct Source<'a> {
    data: &'a Dataset,
    /// Keeps the keys of two sources apart.
    tag: u64,
    /// Slots of a batch.
    slots: usize,
}

/// The batches of a training run. What a slot shows is a function of seed, step and slot, so that a resumed run
/// continues with the images that an uninterrupted one would have seen.
pub(crate) struct Mix<'a> {
    sources: Vec<Source<'a>>,
    seed: u64,
}

/// An image in a slot of a batch.
pub(crate) struct Draw<'a> {
    pub(crate) pixels: &'a [u8],
    pub(crate) label: u32,
    /// The key of everything random about this draw.
    pub(crate) id: u64,
    pub(crate) real: bool,
}

impl<'a> Mix<'a> {
    /// Batches of `batch` images: `synthetic_slots` of them synthetic, distributed over the sources by their
    /// weights.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) if a source gets none.
    pub(crate) fn new(
        real: &'a Dataset,
        synthetic: &[(&'a Dataset, f64)],
        batch: usize,
        synthetic_slots: usize,
        seed: u64,
    ) -> Result<Self> {
        let weights: Vec<f64> = synthetic.iter().map(|(_, weight)| *weight).collect();
        let dealt = deal(synthetic_slots, &weights);
        if let Some(i) = dealt.iter().position(|&slots| slots == 0) {
            bail!(
                Usage,
                "synthetic source {i} of weight {} gets none of {synthetic_slots} places in a batch, expected at \
                 least one; raise batch or its weight",
                weights[i]
            );
        }
        let real = Source { data: real, tag: 1, slots: batch - dealt.iter().sum::<usize>() };
        let others = synthetic.iter().zip(dealt).enumerate();
        let others = others.map(|(i, ((data, _), slots))| Source { data, tag: 2 + i as u64, slots });
        Ok(Self { sources: std::iter::once(real).chain(others).collect(), seed })
    }

    /// What slot `slot` of step `step` shows.
    pub(crate) fn at(&self, step: usize, slot: usize) -> Draw<'a> {
        let mut slot = slot;
        for source in &self.sources {
            if slot < source.slots {
                let position = step * source.slots + slot;
                let n = source.data.len();
                let epoch = (position / n) as u64;
                let order = Permutation::new(self.seed, (source.tag << 48) | epoch, n as u64);
                let image = order.at((position % n) as u64) as usize;
                return Draw {
                    pixels: source.data.image(image),
                    label: source.data.labels[image],
                    id: (source.tag << 48) | position as u64,
                    real: source.tag == 1,
                };
            }
            slot -= source.slots;
        }
        unreachable!("a batch has as many slots as its sources together")
    }

    /// An image of the same source and step as that of slot `slot`, drawn by the latter's key.
    pub(crate) fn partner(&self, step: usize, slot: usize) -> Draw<'a> {
        let mut first = 0;
        for source in &self.sources {
            if slot < first + source.slots {
                let id = self.at(step, slot).id;
                let drawn = Stream::new(self.seed, id, stream::PARTNER).below(source.slots);
                return self.at(step, first + drawn);
            }
            first += source.slots;
        }
        unreachable!("a batch has as many slots as its sources together")
    }
}

/// Distributes `slots` in proportion to `weights`, by largest remainders; the first source wins a tie.
fn deal(slots: usize, weights: &[f64]) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| slots as f64 * w / total).collect();
    let mut dealt: Vec<usize> = exact.iter().map(|share| share.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let left = slots.saturating_sub(dealt.iter().sum());
    order.into_iter().take(left).for_each(|i| dealt[i] += 1);
    dealt
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::data::Shape;

    fn images(n: usize, label: u32) -> Dataset {
        let shape = Shape { height: 1, width: 1, channels: 1 };
        let mut data = Dataset::empty(shape, vec!["a".into(), "b".into(), "c".into()]);
        (0..n).for_each(|i| data.push(&[i as u8], label));
        data
    }

    #[test]
    fn slots_are_dealt_by_weight_and_none_is_lost() {
        assert_eq!(deal(10, &[1.0, 1.0]), [5, 5]);
        assert_eq!(deal(10, &[3.0, 1.0]), [8, 2]);
        assert_eq!(deal(7, &[1.0, 1.0, 1.0]), [3, 2, 2]);
        assert_eq!(deal(0, &[]), [0usize; 0]);
    }

    #[test]
    fn a_batch_has_its_share_of_each_source_and_an_epoch_every_image_once() {
        let (real, first, second) = (images(6, 0), images(8, 1), images(4, 2));
        let mix = Mix::new(&real, &[(&first, 2.0), (&second, 1.0)], 12, 9, 7).unwrap();
        let mut seen = HashSet::new();
        for step in 0..2 {
            let labels: Vec<u32> = (0..12).map(|slot| mix.at(step, slot).label).collect();
            assert_eq!(labels, [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]);
            seen.extend((0..3).map(|slot| mix.at(step, slot).pixels[0]));
            assert!((0..12).all(|slot| mix.at(step, slot).real == (slot < 3)));
        }
        assert_eq!(seen.len(), 6, "two steps of three are an epoch of six");
        for slot in 0..12 {
            let label = mix.at(1, slot).label;
            assert_eq!(mix.partner(1, slot).label, label, "partners are of one source");
        }
        let ids: HashSet<u64> = (0..24).map(|i| mix.at(i / 12, i % 12).id).collect();
        assert_eq!(ids.len(), 24, "every draw has its own key");
    }

    #[test]
    fn a_source_without_a_place_is_refused() {
        let (real, synthetic) = (images(6, 0), images(8, 1));
        let sources = [(&synthetic, 1.0), (&synthetic, 1e-3)];
        let error = Mix::new(&real, &sources, 8, 4, 0).err().expect("no place is left").to_string();
        assert!(error.starts_with("synthetic source 1 of weight 0.001 gets none of 4 places"), "{error}");
    }
}
