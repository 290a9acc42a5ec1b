//! The discriminators of a finished fit-discriminator stage, and the record of their sets.

use std::{path::Path, sync::Arc};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::{
    division::SPLIT,
    pool::{POOL, Pool},
};
use crate::{
    Result,
    attack::{Epsilon, Norm},
    data::Dataset,
    evaluation::{Evaluation, unchanged},
    fs::{self, Record},
    nn::Classifier,
    proxy::{
        REAL, SYNTHETIC,
        calibration::Calibration,
        discriminator::{Discriminator, RadiusConditioning},
        fold::fold_of,
    },
    stage::Input,
};

/// The input of stages that read discriminators.
pub const DISCRIMINATORS: Input = Input::of("discriminators", &["fit-discriminator"]);

/// `sets.json`: the networks of a finished fit-discriminator stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetsRecord {
    /// `proxyset.discriminators/1`.
    pub schema: String,
    /// The norm of the attack.
    pub norm: Norm,
    /// The grid of radii.
    pub epsilons: Vec<Epsilon>,
    /// Number of pool folds for ranking; one more fold is the judges'.
    pub folds: usize,
    /// Whether each set has one network for all radii, see [`RadiusConditioning::Plane`], instead of one for each.
    pub conditioned: bool,
    /// The ranking sets in the order of their folds, then the judges, if there are any: a record for each radius.
    pub sets: Vec<Vec<NetRecord>>,
}

impl Record for SetsRecord {
    const FILE: &'static str = "sets.json";
}

/// One network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NetRecord {
    /// Its folder, relative to the stage's.
    pub path: String,
    /// Its radius.
    pub epsilon: Epsilon,
    /// Accuracy under attack at its radius on the stopping images.
    pub stop_accuracy: f64,
    /// The step whose weights were kept.
    pub kept_step: usize,
    /// Turns its margins into probabilities; fitted to the clean stopping images.
    pub calibration: Calibration,
}

/// Discriminators, ready to use.
pub(crate) struct Discriminators {
    pub(crate) record: SetsRecord,
    /// `[set][radius]`, as in the record.
    pub(crate) nets: Vec<Vec<Discriminator>>,
}

impl Discriminators {
    /// Loads the networks of a finished fit-discriminator stage. Fails with [`Error::Usage`](crate::Error::Usage) unless they were
    /// trained with this division of the real images and this pool: for others it is unknown which images they have
    /// seen.
    pub(crate) fn load(dir: Option<&Path>, split: &Path, pool: &Pool, device: &Device) -> Result<Self> {
        let dir = DISCRIMINATORS.finished(dir)?;
        SPLIT.expect_in(DISCRIMINATORS.key, &dir, split)?;
        POOL.expect_in(DISCRIMINATORS.key, &dir, &pool.dir)?;
        let record: SetsRecord = fs::read_json(&dir.join(SetsRecord::FILE))?;
        let of_set = |set: &Vec<NetRecord>| -> Result<Vec<Discriminator>> {
            let mut nets: Vec<(&str, Arc<Classifier>)> = Vec::new();
            let mut discriminators = Vec::new();
            for (radius, NetRecord { path, .. }) in set.iter().enumerate() {
                if nets.last().is_none_or(|(loaded, _)| loaded != path) {
                    nets.push((path, Arc::new(Classifier::load(&dir.join(path), device)?)));
                }
                let condition = condition(record.conditioned, &record.epsilons, radius);
                discriminators.extend(nets.last().map(|(_, net)| Discriminator::new(net.clone(), condition)));
            }
            Ok(discriminators)
        };
        let nets: Vec<Vec<Discriminator>> = record.sets.iter().map(of_set).collect::<Result<_>>()?;
        let (taken, shape) = (nets[0][0].image_shape(), pool.info.shape);
        if taken != (shape.height, shape.width, shape.channels) {
            bail!(Data, "discriminators take {taken:?} images (height, width, channels), expected {shape}");
        }
        Ok(Self { record, nets })
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) if there are no judges.
    pub(crate) fn expect_judges(&self) -> Result<()> {
        if self.nets.len() == self.record.folds {
            bail!(Usage, "discriminators were trained with judges = false, expected judges");
        }
        Ok(())
    }

    /// The fold of a pool image: `0..folds` rank, `folds` is the judges'.
    pub(crate) fn fold_of(&self, uid: &str) -> usize {
        fold_of(uid, self.record.folds + 1)
    }
}

/// How a network of the set is conditioned on a radius of the grid.
pub(crate) fn condition(conditioned: bool, epsilons: &[Epsilon], radius: usize) -> RadiusConditioning {
    let largest = epsilons.iter().map(|e| e.get()).fold(0.0, f64::max);
    if conditioned {
        RadiusConditioning::Plane((epsilons[radius].get() / largest) as f32)
    } else {
        RadiusConditioning::None
    }
}

/// The logit of synthetic minus that of real, for each image.
pub(crate) fn margins(net: &Discriminator, data: &Dataset, device: &Device) -> Result<Vec<f32>> {
    let logits = Evaluation::new(&|x| net.logits(x), data, device).logits("clean", &unchanged)?;
    Ok(logits.iter().map(|l| l[SYNTHETIC as usize] - l[REAL as usize]).collect())
}

/// The same images, all of one class.
pub(crate) fn relabel(mut data: Dataset, class: u32) -> Dataset {
    data.labels.fill(class);
    data.class_names = vec!["real".into(), "synthetic".into()];
    data
}
