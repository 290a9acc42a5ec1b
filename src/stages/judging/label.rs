//! Label: what a classifier sees in each pool image, and how sure it is.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    data::{Range, to_tensor},
    evaluation::expect_images,
    fs::{bytes_of, floats_of},
    nn::Classifier,
    stage::{Input, Job, Outcome, Stage},
    tables::{
        labels::{self, Labels},
        pool::{POOL, Pool, for_each_shard},
        records::CLASSIFIER,
    },
};

/// Images that go through the classifier together. Results do not depend on it.
const CHUNK: usize = 256;

/// Gives every pool image a label and the classifier's confidence in it.
///
/// An image made for a class keeps that class (`label_source` = intended); the classifier says whether it agrees.
/// An image from an unconditional generator gets the classifier's first choice (pseudo).
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Label {
    /// The folder of a finished generate or import stage.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// A classifier's folder (`config.json`, `model.safetensors`), such as that of a finished train stage.
    #[arg(long)]
    pub classifier: Option<PathBuf>,
}

impl Stage for Label {
    const NAME: &'static str = "label";
    const ABOUT: &'static str = "Give pool images labels, or confidence in the labels they have";
    const INPUTS: &'static [Input] = &[POOL, CLASSIFIER];

    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn amount(&self) -> String {
        "one forward pass per pool image".into()
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let pool = Pool::open(self.pool.as_deref())?;
        let dir = CLASSIFIER.set(self.classifier.as_deref(), "the folder of a classifier")?;
        let classifier = Classifier::load(dir, &job.device)?;
        let shape = pool.info.shape;
        expect_images(&classifier, dir, &"the pool", shape)?;
        expect_same_classes(&classifier, dir, &pool)?;
        let names = &classifier.config().class_names;
        let out = job.open()?;
        let dir = out.join(labels::FOLDER);
        for_each_shard(job, &dir, &pool, Self::NAME, |_, rows, parts, bar| {
            let mut found = Labels::default();
            for from in (0..rows.len()).step_by(CHUNK) {
                crate::progress::check_stop()?;
                let to = (from + CHUNK).min(rows.len());
                let key = format!("{from:08}");
                let probabilities = floats_of(&parts.get_or_make(&key, rows.len() > 16 * CHUNK, || {
                    let x = to_tensor(&rows.pixels(from..to, shape)?, shape, Range::Unit, &job.device)?;
                    let p = crate::kernels::softmax(&classifier.logits(&x)?)?;
                    Ok(bytes_of(&p.flatten_all()?.to_vec1()?))
                })?);
                for (row, p) in (from..to).zip(probabilities.chunks_exact(names.len())) {
                    let first = argmax(p);
                    let label = rows.labels[row].unwrap_or(first);
                    found.labels.push(i64::from(label));
                    found.intended.push(rows.labels[row].is_some());
                    found.pseudo.push(i64::from(first));
                    found.confidence.push(p[label as usize]);
                }
                bar.add((to - from) as u64);
            }
            found.batch(rows)
        })?;
        Ok(Outcome::Done(agreement(&pool, &dir, names.len())?))
    }
}

/// Fails with [`Error::Data`] if the pool was made for classes, and they are not the classifier's.
pub(super) fn expect_same_classes(classifier: &Classifier, dir: &Path, pool: &Pool) -> Result<()> {
    let names = &classifier.config().class_names;
    let differ = if pool.info.named {
        *names != pool.info.class_names
    } else {
        // For imported images only the largest label is known.
        let (known, found) = (names.len(), pool.info.class_names.len());
        pool.info.conditional && if pool.info.imported() { known < found } else { known != found }
    };
    if differ {
        let (dir, known, expected) = (dir.display(), names.join(", "), pool.info.class_names.join(", "));
        bail!(Data, "classifier {dir} knows the classes {known}, expected the pool's: {expected}");
    }
    Ok(())
}

/// How many images the classifier gives the label that they were made for, in all and by class.
fn agreement(pool: &Pool, dir: &Path, classes: usize) -> Result<serde_json::Value> {
    let (mut counts, mut agreed, mut confidence) = (vec![0u64; classes], vec![0u64; classes], 0.0);
    for shard in 0..pool.info.shards {
        let Labels { labels, pseudo, confidence: sure, .. } = Labels::read(dir, shard)?;
        confidence += sure.iter().copied().map(f64::from).sum::<f64>();
        for (label, pseudo) in labels.into_iter().zip(pseudo) {
            let class = usize::try_from(label).ok().filter(|&c| c < classes);
            let class = class
                .ok_or_else(|| Error::Data(format!("label is {label}, expected 0 to {}", classes - 1)))?;
            counts[class] += 1;
            agreed[class] += u64::from(label == pseudo);
        }
    }
    let (total, right): (u64, u64) = (counts.iter().sum(), agreed.iter().sum());
    Ok(json!({
        "images": total,
        "conditional": pool.info.conditional,
        // Nothing to agree with where the classifier gave the labels.
        "agreement": pool.info.conditional.then_some(right as f64 / total as f64),
        "agreement_by_class": agreed.iter().zip(&counts).map(|(a, n)| *a as f64 / (*n).max(1) as f64).collect::<Vec<_>>(),
        "mean_confidence": confidence / total as f64,
        "by_class": counts,
    }))
}

fn argmax(p: &[f32]) -> u32 {
    let best = p.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.map_or(0, |(i, _)| i as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argmax_takes_the_first_of_equals() {
        assert_eq!(argmax(&[0.1, 0.4, 0.4, 0.1]), 1);
    }
}
