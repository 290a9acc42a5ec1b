//! Certify: the radii within which a smoothed classifier cannot be fooled.

use std::{path::PathBuf, time::Instant};

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Error, Result,
    attack::search::choice,
    certify::{Certificate, Smoothing, least_to_certify, least_to_predict},
    data::{self, Dataset, Range, Source, gaussian_noise, to_tensor},
    error::expect_within as expect,
    evaluation::Examined,
    fs::{self, Record},
    nn::Classifier,
    plot,
    progress::{Progress, check_stop},
    rng,
    settings::{self, NoSettings, PartSettings},
    stage::{Input, Job, Outcome, Stage, note},
    stats::clopper_pearson,
    tables::{
        images::write_certified,
        records::{MODEL, TrainRecord},
    },
};

/// The largest σ without a doubt about its unit: in pixels from 0 to 1, little can be seen under such noise.
const LARGEST_SIGMA: f64 = 2.0;

/// Certificates.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CertificateSettings {
    /// Number of noisy copies that choose the class to certify.
    #[arg(long, default_value_t = 100)]
    pub n0: u64,
}

tagged! {
    /// What is computed.
    pub enum Mode("mode", default "certify") {
        /// Certificates: a class and the radius within which it does not change (CERTIFY).
        Certify(CertificateSettings) = "certify",
        /// Predictions only, which need far fewer copies (PREDICT).
        Predict(NoSettings) = "predict",
    }
}

/// Smooths a classifier with Gaussian noise and certifies it (Cohen et al. 2019): for each image the class and the
/// ℓ2 radius within which the smoothed classifier's answer does not change, with probability 1 - alpha.
///
/// The classifier should have been trained on such noise: `train --objective gaussian`, `stability` or `smooth-adv`.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Certify {
    /// The classifier's folder (`config.json`, `model.safetensors`), such as that of a finished train stage.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// The real data: `builtin:digits`, or a folder or file of Hugging Face Parquet.
    #[arg(long, default_value = "builtin:digits")]
    pub data: Source,
    /// The official split to measure on. The test split is for measuring only, never for choosing anything.
    #[arg(long, value_parser = settings::named::<data::OfficialSplit>(), default_value_t = data::OfficialSplit::Test)]
    pub official_split: data::OfficialSplit,
    /// Which of the images are used.
    #[command(flatten)]
    #[serde(flatten)]
    pub part: PartSettings,
    /// Use only every N-th of these images, starting with the first.
    #[arg(long, default_value_t = 1)]
    pub skip: usize,
    /// Certificates, or predictions only.
    #[command(flatten)]
    pub mode: Mode,
    /// The standard deviation of the noise, for pixels in [0, 1].
    #[arg(long, default_value_t = 0.25)]
    pub sigma: f64,
    /// Number of noisy copies that bound the probability of that class, or that predict.
    #[arg(long, default_value_t = 10_000)]
    pub n: u64,
    /// The probability that a certificate or prediction is wrong.
    #[arg(long, default_value_t = 0.001)]
    pub alpha: f64,
    /// Noisy copies that go through the network together. Results do not depend on it.
    #[arg(long, default_value_t = 128)]
    pub batch: u64,
    /// How many unreadable rows of the source to tolerate; they are skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Certify {
    /// With [`Mode::Predict`] no copies choose.
    fn smoothing(&self) -> Smoothing {
        Smoothing { sigma: self.sigma, n0: self.n0().unwrap_or(0), n: self.n, alpha: self.alpha }
    }

    fn n0(&self) -> Option<u64> {
        match &self.mode {
            Mode::Certify(certificate) => Some(certificate.n0),
            Mode::Predict(_) => None,
        }
    }

    /// Reasons to doubt that σ is what the classifier was trained for.
    fn doubts(&self, train: Option<&TrainRecord>) -> Vec<String> {
        let sigma = self.sigma;
        let mut doubts = Vec::new();
        if sigma > LARGEST_SIGMA {
            let unit = sigma / 255.0;
            doubts.push(format!(
                "sigma is {sigma} for pixels in [0, 1], under which little can be seen; if it was meant for pixels up to \
                 255, it is {unit:.4}"
            ));
        }
        match train.and_then(|train| train.sigma) {
            Some(0.0) => doubts.push(format!(
                "the classifier was trained without noise, and is smoothed with sigma {sigma}: expect it to abstain"
            )),
            Some(trained) if (trained - sigma).abs() > 1e-6 * trained => {
                doubts.push(format!("the classifier was trained with sigma {trained}, and is smoothed with {sigma}"));
            }
            _ => {}
        }
        doubts
    }

    /// The certificate of one image; with [`Mode::Predict`] its radius and bound are 0, which is always true.
    fn one(
        &self,
        classifier: &Classifier,
        data: &Dataset,
        row: usize,
        device: &Device,
    ) -> Result<Certificate> {
        let image = to_tensor(data.image(row), data.shape, Range::Unit, device)?;
        let classes = classifier.config().class_names.len();
        // Each copy of each image has a key of its own.
        let seed = rng::uint(self.seed, row as u64, rng::stream::GAUSSIAN);
        let counts = |first: u64, n: u64| -> Result<Vec<u64>> {
            let mut counts = vec![0u64; classes];
            for from in (first..first + n).step_by(self.batch as usize) {
                check_stop()?;
                let ids: Vec<u64> = (from..(from + self.batch).min(first + n)).collect();
                let copies = image.repeat((ids.len(), 1, 1, 1))?;
                let noise = gaussian_noise(seed, &ids, rng::stream::GAUSSIAN, data.shape, device)?;
                let logits = classifier.logits(&(copies + (noise * self.sigma)?)?)?.to_vec2::<f32>()?;
                for class in logits.iter().filter_map(|row| choice(row)) {
                    counts[class] += 1;
                }
            }
            Ok(counts)
        };
        match self.mode {
            Mode::Certify(_) => self.smoothing().certify(&counts),
            Mode::Predict(_) => {
                let class = self.smoothing().predict(&counts)?;
                Ok(Certificate { class, radius: 0.0, lower: 0.0 })
            }
        }
    }
}

impl Stage for Certify {
    const NAME: &'static str = "certify";
    const ABOUT: &'static str =
        "Smooth a classifier with noise and certify radii within which its answers hold";
    const INPUTS: &'static [Input] = &[MODEL, Input::real_data("data")];
    const RUNTIME: &'static [&'static str] = &["batch"];
    const REVISION: u32 = 1;

    fn validate(&self) -> Result<()> {
        self.part.validate()?;
        expect("skip", self.skip, 1, usize::MAX)?;
        expect("sigma", self.sigma, 1e-6, 1e3)?;
        if let Some(n0) = self.n0() {
            expect("n0", n0, 1, 1 << 40)?;
        }
        expect("n", self.n, 1, 1 << 40)?;
        expect("alpha", self.alpha, 1e-12, 0.5)?;
        expect("batch", self.batch, 1, 1 << 20)?;
        let Self { n, alpha, .. } = *self;
        let (least, done) = match self.mode {
            Mode::Certify(_) => (least_to_certify(alpha), "certified"),
            Mode::Predict(_) => (least_to_predict(alpha), "predicted"),
        };
        if n < least {
            bail!(
                Usage,
                "n is {n} and alpha {alpha}, with which nothing can be {done} even if all copies agree; expected n from \
                 {least}"
            );
        }
        Ok(())
    }

    fn amount(&self) -> String {
        let skipping = if self.skip > 1 { format!("1 in {} of ", self.skip) } else { String::new() };
        let (images, copies) = (self.part.part(), self.n0().unwrap_or(0) + self.n);
        format!("{skipping}{images}, {copies} noisy copies each at sigma {}", self.sigma)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let started = Instant::now();
        let (model, part) = (self.model.as_deref(), self.part.part());
        let examined =
            Examined::load(model, &self.data, self.official_split, part, self.max_bad, &job.device)?;
        let Examined { dir, classifier, data } = &examined;
        let mut warnings = self.doubts(TrainRecord::read_if_there(dir)?.as_ref());
        warnings.extend(data.left_out(part));

        let out = job.open()?;
        warnings.iter().for_each(|doubt| note(self, &format!("warning: {doubt}")));
        let parts = fs::Parts::new(job.hidden(out, "parts"));
        let rows: Vec<usize> = (0..data.len()).step_by(self.skip).collect();
        let bar = Progress::new(Self::NAME, rows.len() as u64, "images");
        let mut certificates: Vec<Certificate> = Vec::with_capacity(rows.len());
        // One image at a time: the network's kernels have work for all threads.
        for &row in &rows {
            let key = format!("{row:08}");
            if let Some(kept) = parts.get(&key)?.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
                certificates.push(kept);
                bar.skip(1);
                continue;
            }
            let found = self.one(classifier, data, row, &job.device)?;
            let kept = serde_json::to_vec(&found)
                .map_err(|e| Error::Alarm(format!("a certificate cannot be kept: {e}")))?;
            parts.put(&key, &kept)?;
            certificates.push(found);
            bar.add(1);
        }
        let n = rows.len() as u64;
        let certify = self.n0().is_some();
        // Of the images whose class is right; the others count as 0 in the mean.
        let right = rows.iter().zip(&certificates).filter(|(row, c)| c.class == Some(data.labels[**row]));
        let mut radii: Vec<f64> = right.map(|(_, c)| c.radius).collect();
        let total = radii.iter().fold(0.0, |total, radius| total + radius);
        radii.sort_by(f64::total_cmp);
        // How many images are certified as right at this radius.
        let at_radius = |radius: f64| {
            let certified = radii.iter().filter(|r| **r >= radius).count() as u64;
            let (accuracy, interval) = (certified as f64 / n as f64, clopper_pearson(certified, n, 0.05));
            json!({ "radius": radius, "certified": certified, "accuracy": accuracy, "interval": interval })
        };
        // At 0, 0.25, 0.5, … as in the paper's tables, up to the first radius at which nothing is certified.
        let largest = radii.last().copied().unwrap_or(0.0);
        let rows_of_table = if certify { (largest / 0.25).floor() as usize + 2 } else { 0 };
        let table: Vec<Value> = (0..rows_of_table).map(|i| at_radius(0.25 * i as f64)).collect();
        let correct = radii.len() as u64;
        let abstained = certificates.iter().filter(|c| c.class.is_none()).count() as u64;
        let summary = json!({
            "schema": "proxyset.certify/1",
            "mode": self.mode.kind(),
            "images": n,
            "correct": correct,
            "accuracy": correct as f64 / n as f64,
            "interval": clopper_pearson(correct, n, 0.05),
            "abstained": abstained,
            "average_certified_radius": certify.then(|| total / n as f64),
            "certified": table,
            "smoothing": { "sigma": self.sigma, "n0": self.n0(), "n": self.n, "alpha": self.alpha },
            "seed": self.seed,
            "warnings": warnings,
            "data": examined.data_record(&self.data, self.official_split)?,
            "model_blake3": examined.model_blake3()?,
            "seconds": started.elapsed().as_secs_f64(),
        });
        write_certified(out, &rows, data, &certificates, certify)?;
        if certify {
            // The curve steps down where a certified radius ends.
            let mut curve = vec![(0.0, correct as f64 / n as f64)];
            for (i, &radius) in radii.iter().enumerate() {
                let [before, after] =
                    [correct - i as u64, correct - i as u64 - 1].map(|k| k as f64 / n as f64);
                curve.extend([(radius, before), (radius, after)]);
            }
            let label = format!("sigma = {}", self.sigma);
            let svg = plot::lines("Certified accuracy", "l2 radius", "accuracy", &[(label, curve)])?;
            fs::publish(&out.join("certified.svg"), svg.as_bytes())?;
        }
        fs::publish_json(&out.join("certify.json"), &summary)?;
        note(self, &format!("{correct} of {n} right, {abstained} abstained"));
        Ok(Outcome::Done(summary))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certify(sigma: f64) -> Certify {
        Certify { sigma, ..Certify::default() }
    }

    #[test]
    fn copies_with_which_nothing_can_be_decided_are_refused() {
        let predict = Mode::Predict(NoSettings {});
        for (mode, n, least) in [(Certify::default().mode, 9, 10), (predict, 10, 11)] {
            let settings = |n| Certify { n, mode: mode.clone(), ..Certify::default() };
            let error = settings(n).validate().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().ends_with(&format!("expected n from {least}")), "{error}");
            settings(least).validate().unwrap();
        }
    }

    #[test]
    fn a_sigma_other_than_that_of_the_training_is_doubted() {
        let trained = |sigma| TrainRecord {
            schema: String::new(),
            arm: "real".into(),
            seed: 0,
            real: 1,
            synthetic: 0,
            held_out_accuracy: 0.5,
            sigma,
            warnings: Vec::new(),
        };
        let doubts = |sigma, record: Option<f64>| certify(sigma).doubts(Some(&trained(record)));
        assert_eq!(doubts(0.25, Some(0.25)), [""; 0]);
        assert_eq!(doubts(0.25, None), [""; 0]);
        assert_eq!(certify(0.25).doubts(None), [""; 0]);
        assert!(doubts(1.0, Some(0.25))[0].contains("trained with sigma 0.25, and is smoothed with 1"));
        assert!(doubts(0.25, Some(0.0))[0].contains("trained without noise"));
        assert!(certify(64.0).doubts(None)[0].contains("if it was meant for pixels up to 255, it is 0.2510"));
    }
}
