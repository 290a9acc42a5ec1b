//! Arc: the area under the robust discrimination curve of a pool.

use std::path::PathBuf;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Job, Outcome, Split, Stage,
    accuracy::{correct, correct_after_apgd},
    expect, finished_input,
    fit_discriminator::{Discriminators, relabel, spread},
    note,
    shards::Pool,
    split::Real,
};
use crate::{
    Result,
    attack::{Apgd, Epsilon, Norm, Pgd, Threat},
    data::Dataset,
    fs,
    plot::lines,
    progress::Progress,
    proxy::{
        REAL, SYNTHETIC,
        arc::{Estimate, Point, SetResult, estimate, signed_area},
        fold::{HeldOut, held_out, uid_order},
    },
};

/// Estimates ARC: each ranking set's accuracy under attack on images that it has seen in no way before.
///
/// Real images: the proxy folds on which the set was not stopped. Synthetic images: held-out pool images of
/// other folds. Both sides in equal numbers. A network that was right on at most half of its stopping images under attack
/// is worse than an answer that is always the same, and is replaced by it: its accuracy is then 1/2, a real image's 0 and a
/// synthetic one's 1. ARC is blind to labels: see the agreement that label reports.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Arc {
    /// The folder of a finished split: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// The folder of a finished generate or import.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// The folder of a finished fit-discriminator.
    #[arg(long)]
    pub discriminators: Option<PathBuf>,
    /// Steps of the attack.
    #[arg(long, default_value_t = 20)]
    pub attack_steps: usize,
    /// The step of the attack as a multiple of epsilon / steps.
    #[arg(long, default_value_t = 2.5)]
    pub attack_step_ratio: f64,
    /// Random restarts of the attack; the strongest counts.
    #[arg(long, default_value_t = 2)]
    pub restarts: usize,
    /// Steps of APGD on the cross-entropy (Croce & Hein 2020), which then tries what PGD left standing; 0 for none.
    #[arg(long, default_value_t = 50)]
    pub apgd_steps: usize,
    /// Largest number of images of each source that measure a set.
    #[arg(long, default_value_t = 5000)]
    pub max_images: usize,
    /// Bootstrap draws.
    #[arg(long, default_value_t = 1000)]
    pub bootstrap: usize,
    /// Seed of the attack and the bootstrap.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `arc.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ArcRecord {
    /// `proxyset.arc/1`.
    pub schema: String,
    /// The estimate, with curve and intervals.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// `4 · ARC`: an estimate, not a certificate, of a lower bound on the Wasserstein distance.
    pub wasserstein_lower_bound_estimate: f64,
    /// The signed area after PGD alone: how much weaker the weaker attack is.
    pub signed_after_pgd: f64,
    /// The radii as they were written.
    pub epsilons: Vec<Epsilon>,
    /// The attack.
    pub attack: serde_json::Value,
}

impl Arc {
    /// The attack at one radius; none at 0.
    fn attack(&self, norm: Norm, epsilon: Epsilon) -> Result<Option<Pgd>> {
        let (steps, ratio) = (self.attack_steps, self.attack_step_ratio);
        let attack = Pgd::new(norm, epsilon, steps, ratio, self.restarts, self.seed)?;
        Ok((epsilon.get() > 0.0).then_some(attack))
    }
}

impl Stage for Arc {
    const NAME: &'static str = "arc";
    const INPUTS: &'static [&'static str] = &["split", "pool", "discriminators"];

    fn validate(&self) -> Result<()> {
        self.attack(Norm::Linf, Epsilon::default())?;
        expect("apgd_steps", self.apgd_steps, 0, 100_000)?;
        expect("max_images", self.max_images, 2, usize::MAX)?;
        expect("bootstrap", self.bootstrap, 10, 1_000_000)
    }

    fn amount(&self) -> String {
        format!(
            "PGD-{} with {} restarts and APGD-{} on the measuring images of every set",
            self.attack_steps, self.restarts, self.apgd_steps
        )
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&finished_input::<Split>("split", self.split.as_deref())?)?;
        let pool = Pool::open("pool", self.pool.as_deref())?;
        let discriminators =
            Discriminators::load("discriminators", self.discriminators.as_deref(), &job.device)?;
        discriminators.expect_shape(pool.info.shape)?;
        let folds = discriminators.record.folds;
        let real_parts: Vec<Dataset> = (0..folds).map(|set| real.proxy_measure(set, folds)).collect();
        let wanted: Vec<usize> = real_parts.iter().map(|d| d.len().min(self.max_images)).collect();
        let synthetic = measuring_images(&pool, &discriminators, &wanted)?;
        if let Some(set) = (0..folds).find(|&set| synthetic[set].len() < 2) {
            bail!(
                Data,
                "the pool has {} images to measure set {set} on, expected at least 2",
                synthetic[set].len()
            );
        }
        let (out, _lock) = job.open("run")?;
        let parts = fs::Parts::new(job.hidden(out, "parts"));
        let radii: Vec<f64> = discriminators.record.epsilons.iter().map(|e| e.get()).collect();
        let attacks =
            radii.len() + if self.apgd_steps > 0 { radii.iter().filter(|r| **r > 0.0).count() } else { 0 };
        let total: usize = (0..folds).map(|s| 2 * wanted[s].min(synthetic[s].len()) * attacks).sum();
        let bar = Progress::new(Self::NAME, total as u64, "attacked images");
        let (mut results, mut after_pgd) = (Vec::new(), Vec::new());
        for set in 0..folds {
            let n = wanted[set].min(synthetic[set].len());
            let chosen = spread(real_parts[set].len(), n, self.seed);
            let real_side = real_parts[set].subset(&chosen);
            let synthetic_side = synthetic[set].subset(&(0..n).collect::<Vec<_>>());
            let class: Vec<u32> = real_side.labels.iter().chain(&synthetic_side.labels).copied().collect();
            let both = relabel(real_side, REAL).concat(&relabel(synthetic_side, SYNTHETIC));
            let (mut rows, mut pgd_rows) = (Vec::new(), Vec::new());
            for (radius, &epsilon) in discriminators.record.epsilons.iter().enumerate() {
                if discriminators.record.sets[set][radius].stop_accuracy <= 0.5 {
                    let right: Vec<bool> = both.labels.iter().map(|&label| label == SYNTHETIC).collect();
                    let passes = if epsilon.get() > 0.0 && self.apgd_steps > 0 { 2 } else { 1 };
                    bar.skip((passes * right.len()) as u64);
                    pgd_rows.push(right.clone());
                    rows.push(right);
                    continue;
                }
                let net = &discriminators.nets[set][radius];
                let attack = self.attack(discriminators.record.norm, epsilon)?;
                let key = format!("set{set}-radius{radius}");
                let logits_of = |x: &Tensor| net.logits(x);
                let mut right =
                    correct(&logits_of, &both, attack.as_ref(), &job.device, Some((&parts, &key)), &bar)?;
                pgd_rows.push(right.clone());
                if epsilon.get() > 0.0 && self.apgd_steps > 0 {
                    let threat = Threat::new(discriminators.record.norm, epsilon)?;
                    let apgd = Apgd { threat, steps: self.apgd_steps, restarts: 1, seed: self.seed };
                    let kept = Some((&parts, &*format!("{key}-apgd")));
                    right = correct_after_apgd(&logits_of, &both, &right, &apgd, &job.device, kept, &bar)?;
                }
                rows.push(right);
            }
            let synthetic: Vec<bool> = both.labels.iter().map(|&l| l == SYNTHETIC).collect();
            after_pgd.push(SetResult {
                correct: pgd_rows,
                synthetic: synthetic.clone(),
                class: class.clone(),
            });
            results.push(SetResult { correct: rows, synthetic, class });
        }
        let estimate = estimate(&results, &radii, self.bootstrap, self.seed);
        let record = ArcRecord {
            schema: "proxyset.arc/1".into(),
            wasserstein_lower_bound_estimate: 4.0 * estimate.arc,
            signed_after_pgd: signed_area(&after_pgd, &radii),
            epsilons: discriminators.record.epsilons.clone(),
            attack: json!({
                "norm": discriminators.record.norm,
                "steps": self.attack_steps,
                "step_size_times_steps_over_epsilon": self.attack_step_ratio,
                "restarts": self.restarts,
                "apgd_steps_on_what_stands": self.apgd_steps,
            }),
            estimate,
        };
        fs::publish(&out.join("arc.svg"), discrimination_svg(&curves(&record.estimate))?.as_bytes())?;
        fs::publish_json(&out.join("arc.json"), &record)?;
        let e = &record.estimate;
        note(self, &format!("ARC {:.5}, 95 % interval {:.5} to {:.5}", e.arc, e.interval[0], e.interval[1]));
        let summary = serde_json::to_value(&record)
            .map_err(|e| crate::Error::Alarm(format!("ARC cannot be written as JSON: {e}")))?;
        Ok(Outcome::Done(summary))
    }
}

/// A plot of robust discrimination curves: a name and points (ε, accuracy) each.
pub(super) fn discrimination_svg(curves: &[(String, Vec<(f64, f64)>)]) -> Result<String> {
    lines("Robust discrimination of real and synthetic images", "ε", "accuracy under attack", curves)
}

/// The curve, and its two parts.
fn curves(estimate: &Estimate) -> Vec<(String, Vec<(f64, f64)>)> {
    let of = |name: &str, get: fn(&Point) -> f64| {
        (name.to_owned(), estimate.curve.iter().map(|p| (p.epsilon, get(p))).collect())
    };
    vec![
        of("both", |p| p.accuracy),
        of("real", |p| p.accuracy_real),
        of("synthetic", |p| p.accuracy_synthetic),
    ]
}

/// Held-out pool images for each ranking set: of other folds, never used to stop or calibrate, with their classes.
fn measuring_images(pool: &Pool, discriminators: &Discriminators, wanted: &[usize]) -> Result<Vec<Dataset>> {
    let mut images: Vec<Dataset> =
        wanted.iter().map(|_| Dataset::empty(pool.info.shape, pool.info.class_names.clone())).collect();
    for shard in 0..pool.info.shards {
        if images.iter().zip(wanted).all(|(d, &n)| d.len() >= n) {
            break;
        }
        let rows = pool.read(shard)?;
        let pixels = rows.pixels(0..rows.len(), pool.info.shape)?;
        for (row, image) in pixels.chunks_exact(pool.info.shape.size()).enumerate() {
            if held_out(&rows.uids[row]) != HeldOut::Measure {
                continue;
            }
            let fold = discriminators.fold_of(&rows.uids[row]);
            // Each image measures one set only, so that the sets' results are independent.
            let may: Vec<usize> = (0..wanted.len()).filter(|&set| set != fold).collect();
            let set = may[uid_order(&rows.uids[row]) as usize % may.len()];
            if images[set].len() < wanted[set] {
                images[set].push(image, rows.labels[row].unwrap_or(0));
            }
        }
    }
    Ok(images)
}
