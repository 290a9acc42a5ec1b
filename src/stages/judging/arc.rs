//! Arc: the area under the robust discrimination curve of a pool.

use std::path::PathBuf;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Result,
    attack::{Apgd, Attack, Counted, Epsilon, Loss, Norm, PgdSearch},
    data::Dataset,
    error::expect_within as expect,
    evaluation::{Evaluation, share},
    fs::{self, Record},
    plot::lines,
    progress::{Progress, checkpoint_interval},
    proxy::{
        REAL, SYNTHETIC,
        arc::{Estimate, Point, SetResult, estimate, signed_area},
        discriminator::Discriminator,
        fold::{HeldOut, held_out, uid_order},
    },
    rng::{some_of, spread},
    settings::{self, StepSettings},
    stage::{Input, Job, Outcome, Stage, note},
    tables::{
        discriminators::{DISCRIMINATORS, Discriminators, SetsRecord, relabel},
        division::{Real, SPLIT},
        pool::{POOL, Pool},
        records::{ArcRecord, AttackRecord},
    },
};

/// PGD at the radii of the discriminators, then APGD.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct ArcAttackSettings {
    /// The steps of PGD.
    #[command(flatten)]
    #[serde(flatten)]
    pub steps: StepSettings,
    /// Random starts of PGD. An image has to withstand all of them, at every step on the way. APGD adds one more
    /// start.
    #[arg(long, default_value_t = 1)]
    pub restarts: usize,
    /// Steps of APGD on the cross-entropy (Croce & Hein 2020), which then attacks the images that withstood PGD; 0
    /// for none.
    #[arg(long, default_value_t = 50)]
    pub apgd_steps: usize,
}

/// Estimates ARC from each ranking set's accuracy under attack on images that it has not seen in any way before.
///
/// The real images are the proxy folds on which the set was not stopped; the synthetic ones are held-out pool
/// images of other folds, in equal number. A network that is right on at most half of its stopping images under the
/// same attack is no better than a constant answer and is replaced by one: its accuracy is then 1/2, made of 0 on
/// real images and 1 on synthetic ones. ARC does not see labels; for these, see the agreement that the label stage
/// reports.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[command(mut_args(settings::defaults(&[("attack_steps", "20", &[])])))]
pub struct EstimateArc {
    /// The folder of a finished split stage: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// The folder of a finished generate or import stage.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// The folder of a finished fit-discriminator stage.
    #[arg(long)]
    pub discriminators: Option<PathBuf>,
    /// The attack.
    #[command(flatten)]
    pub attack: ArcAttackSettings,
    /// The largest number of images from each source on which a set is measured.
    #[arg(long, default_value_t = 5000)]
    pub max_images: usize,
    /// The largest number of stopping images from each source that decide whether a network is replaced.
    #[arg(long, default_value_t = 500)]
    pub max_stop: usize,
    /// Number of bootstrap draws.
    #[arg(long, default_value_t = 1000)]
    pub bootstrap: usize,
    /// How many images are attacked together, on each CPU thread or on the GPU; 0 chooses a number that suits the
    /// device. Results do not depend on it.
    #[arg(long, default_value_t = 0)]
    pub batch: usize,
    /// Seed of the attack and of the bootstrap.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl EstimateArc {
    /// The attack at one radius.
    fn attack(&self, norm: Norm, epsilon: Epsilon) -> Result<PgdSearch> {
        let pgd = self.attack.steps.pgd(norm, epsilon, self.seed)?;
        PgdSearch::new(pgd, self.attack.restarts, Counted::Every)
    }

    /// How often an image is attacked, or evaluated, at one radius.
    fn passes(&self, epsilon: f64) -> usize {
        1 + usize::from(epsilon > 0.0 && self.attack.apgd_steps > 0)
    }

    /// The images of each side that measure or stop a set, in equal numbers: real ones, then synthetic ones.
    fn sides(&self, real: Dataset, synthetic: &Dataset, max: usize) -> Sides {
        let n = real.len().min(synthetic.len()).min(max);
        let real = real.subset(&spread(real.len(), n, self.seed));
        let synthetic = synthetic.subset(&some_of(synthetic.len(), n, self.seed));
        let class = real.labels.iter().chain(&synthetic.labels).copied().collect();
        Sides { images: relabel(real, REAL).concat(&relabel(synthetic, SYNTHETIC)), class }
    }
}

/// Images labelled [`REAL`] and [`SYNTHETIC`], and the classes that they show.
struct Sides {
    images: Dataset,
    class: Vec<u32>,
}

/// The attack on one discriminator.
struct Trial<'a> {
    arc: &'a EstimateArc,
    net: &'a Discriminator,
    pgd: PgdSearch,
    job: &'a Job,
    parts: &'a fs::Parts,
    bar: &'a Progress,
}

impl Trial<'_> {
    /// Which of the images still `standing` withstand an attack. The findings are kept under `key`.
    fn stands(
        &self,
        images: &Dataset,
        standing: &[bool],
        attack: &dyn Attack,
        key: &str,
    ) -> Result<Vec<bool>> {
        let logits_of = |x: &Tensor| self.net.logits(x);
        let evaluation = Evaluation {
            batch: self.arc.batch,
            kept: Some((self.parts, checkpoint_interval())),
            bar: Some(self.bar),
            ..Evaluation::new(&logits_of, images, &self.job.device)
        };
        self.bar.skip(standing.iter().filter(|&&standing| !standing).count() as u64);
        evaluation.stands(key, standing, attack)
    }

    /// Which images withstand PGD.
    fn after_pgd(&self, images: &Dataset, key: &str) -> Result<Vec<bool>> {
        self.stands(images, &vec![true; images.len()], &self.pgd, &format!("{key}-pgd"))
    }

    /// Which of those still `standing` after PGD withstand APGD too.
    fn after_apgd(&self, images: &Dataset, standing: Vec<bool>, key: &str) -> Result<Vec<bool>> {
        let (arc, threat) = (self.arc, self.pgd.threat());
        if arc.passes(threat.epsilon()) == 1 {
            return Ok(standing);
        }
        let apgd = Apgd { threat, steps: arc.attack.apgd_steps, loss: Loss::CrossEntropy, seed: arc.seed };
        self.stands(images, &standing, &apgd, &format!("{key}-apgd"))
    }

    /// The accuracy after both attacks; after PGD alone, if that leaves half of the images or less.
    fn accuracy(&self, images: &Dataset, key: &str) -> Result<f64> {
        let after_pgd = self.after_pgd(images, key)?;
        let accuracy = share(&after_pgd);
        if accuracy <= 0.5 {
            let passes = self.arc.passes(self.pgd.threat().epsilon());
            self.bar.skip(((passes - 1) * images.len()) as u64);
            return Ok(accuracy);
        }
        Ok(share(&self.after_apgd(images, after_pgd, key)?))
    }
}

impl Stage for EstimateArc {
    const NAME: &'static str = "arc";
    const ABOUT: &'static str =
        "Estimate ARC, the area under the robust discrimination curve, or rank sample sets by it";
    const INPUTS: &'static [Input] = &[SPLIT, POOL, DISCRIMINATORS];
    const REVISION: u32 = 1;
    const RUNTIME: &'static [&'static str] = &["batch"];

    fn validate(&self) -> Result<()> {
        self.attack(Norm::Linf, Epsilon::default())?;
        expect("batch", self.batch, 0, 1 << 20)?;
        expect("apgd_steps", self.attack.apgd_steps, 0, 100_000)?;
        expect("max_images", self.max_images, 2, usize::MAX)?;
        expect("max_stop", self.max_stop, 2, usize::MAX)?;
        expect("bootstrap", self.bootstrap, 10, 1_000_000)
    }

    fn amount(&self) -> String {
        let starts = if self.attack.restarts == 1 { "start" } else { "starts" };
        format!(
            "PGD-{} from {} random {starts}, then APGD-{}, on the stopping and measuring images of every set",
            self.attack.steps.steps, self.attack.restarts, self.attack.apgd_steps
        )
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let split = SPLIT.finished(self.split.as_deref())?;
        let real = Real::load(&split)?;
        let pool = Pool::open(self.pool.as_deref())?;
        let discriminators =
            Discriminators::load(self.discriminators.as_deref(), &split, &pool, &job.device)?;
        let folds = discriminators.record.folds;
        let (measure, stop) = (0..folds)
            .map(|set| (real.proxy_measure(set, folds), real.proxy_stop(set)))
            .collect::<(Vec<Dataset>, Vec<Dataset>)>();
        let sides_of = |real: Vec<Dataset>, synthetic: Vec<Dataset>, max: usize| -> Vec<Sides> {
            let of_set = |(real, synthetic): (Dataset, &Dataset)| self.sides(real, synthetic, max);
            real.into_iter().zip(&synthetic).map(of_set).collect()
        };
        let limits = [(&measure, self.max_images), (&stop, self.max_stop)];
        let wanted =
            limits.map(|(real, max)| real.iter().map(|real| real.len().min(max)).collect::<Vec<_>>());
        // From folds that the set did not learn from.
        let slots = |uid: &str| slots(uid, discriminators.fold_of(uid), folds);
        let mut synthetic = pool.draw(&wanted.concat(), slots)?;
        let synthetic_stop = synthetic.split_off(folds);
        for (images, what, least) in [(&synthetic, "measure", 2), (&synthetic_stop, "stop", 1)] {
            if let Some((set, found)) = images.iter().map(Dataset::len).enumerate().find(|(_, n)| *n < least)
            {
                bail!(Data, "the pool has {found} images to {what} set {set} on, expected at least {least}");
            }
        }
        let measure = sides_of(measure, synthetic, self.max_images);
        let stop = sides_of(stop, synthetic_stop, self.max_stop);
        let out = job.open()?;
        let parts = fs::Parts::new(job.hidden(out, "parts"));
        let SetsRecord { epsilons, norm, .. } = &discriminators.record;
        let radii: Vec<f64> = epsilons.iter().map(|e| e.get()).collect();
        let passes: usize = radii.iter().map(|&radius| self.passes(radius)).sum();
        let images: usize = measure.iter().chain(&stop).map(|sides| sides.class.len()).sum();
        let bar = Progress::new(Self::NAME, (passes * images) as u64, "attacked images");
        let (mut results, mut after_pgd, mut stop_accuracy) = (Vec::new(), Vec::new(), Vec::new());
        for (set, Sides { images, class }) in measure.into_iter().enumerate() {
            let synthetic: Vec<bool> = images.labels.iter().map(|&label| label == SYNTHETIC).collect();
            let (mut rows, mut pgd_rows, mut accuracies) = (Vec::new(), Vec::new(), Vec::new());
            for (radius, &epsilon) in epsilons.iter().enumerate() {
                let trial = Trial {
                    arc: self,
                    net: &discriminators.nets[set][radius],
                    pgd: self.attack(*norm, epsilon)?,
                    job,
                    parts: &parts,
                    bar: &bar,
                };
                let key = format!("set{set}-radius{radius}");
                let accuracy = trial.accuracy(&stop[set].images, &format!("{key}-stop"))?;
                accuracies.push(accuracy);
                if accuracy > 0.5 {
                    let after_pgd = trial.after_pgd(&images, &key)?;
                    rows.push(trial.after_apgd(&images, after_pgd.clone(), &key)?);
                    pgd_rows.push(after_pgd);
                } else {
                    bar.skip((self.passes(epsilon.get()) * images.len()) as u64);
                    rows.push(synthetic.clone());
                    pgd_rows.push(synthetic.clone());
                }
            }
            stop_accuracy.push(accuracies);
            let of = |correct| SetResult { correct, synthetic: synthetic.clone(), class: class.clone() };
            after_pgd.push(of(pgd_rows));
            results.push(of(rows));
        }
        let estimate = estimate(&results, &radii, self.bootstrap, self.seed);
        let record = ArcRecord {
            schema: "proxyset.arc/1".into(),
            wasserstein_lower_bound_estimate: 4.0 * estimate.arc,
            signed_after_pgd: signed_area(&after_pgd, &radii),
            epsilons: epsilons.clone(),
            stop_accuracy,
            attack: AttackRecord {
                norm: *norm,
                steps: self.attack.steps.steps,
                step_size_times_steps_over_epsilon: self.attack.steps.step_ratio,
                restarts: self.attack.restarts,
                counts: "every point on the way".into(),
                apgd_steps_on_what_stands: self.attack.apgd_steps,
            },
            estimate,
        };
        fs::publish(&out.join("arc.svg"), discrimination_svg(&curves(&record.estimate))?.as_bytes())?;
        record.write(out)?;
        let e = &record.estimate;
        note(self, &format!("ARC {:.5}, 95 % interval {:.5} to {:.5}", e.arc, e.interval[0], e.interval[1]));
        Ok(Outcome::Done(json!(record)))
    }
}

/// A plot of robust discrimination curves, each with a name and points (ε, accuracy).
pub(super) fn discrimination_svg(curves: &[(String, Vec<(f64, f64)>)]) -> Result<String> {
    lines("Robust discrimination of real and synthetic images", "ε", "accuracy under attack", curves)
}

/// The curve and its two parts.
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

/// What a pool image of `fold` is for: it measures set `i < folds`, and stops set `i - folds`.
fn slots(uid: &str, fold: usize, folds: usize) -> Vec<usize> {
    let sets: Vec<usize> = (0..folds).filter(|&set| set != fold).collect();
    match held_out(uid) {
        // Each image measures one set only, so that the sets' results are independent.
        HeldOut::Measure => vec![sets[uid_order(uid) as usize % sets.len()]],
        HeldOut::Stop => sets.into_iter().map(|set| folds + set).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::fold::fold_of;

    #[test]
    fn a_pool_image_measures_one_set_or_stops_all_that_did_not_learn_from_it() {
        let folds = 3;
        let mut measured = [0; 3];
        for i in 0..4000 {
            let uid = format!("pool-{i}");
            let fold = fold_of(&uid, folds + 1);
            let found = slots(&uid, fold, folds);
            match held_out(&uid) {
                HeldOut::Measure => {
                    assert!(found.len() == 1 && found[0] != fold, "{uid}: {found:?}");
                    measured[found[0]] += 1;
                }
                HeldOut::Stop => {
                    let others: Vec<usize> =
                        (0..folds).filter(|&set| set != fold).map(|set| folds + set).collect();
                    assert_eq!(found, others, "{uid}");
                }
            }
        }
        assert!(measured.iter().all(|n| (900..1250).contains(n)), "{measured:?}");
    }
}
