//! Which images of a data set a network gets right: clean, perturbed, or under attack.
//!
//! Each image has a [`Search`], even if it only looks up the logits. Up to
//! [`Evaluation`]`::batch` of them are evaluated together, and a finished image makes room for the next.

mod doubts;
mod examined;
mod findings;

use std::{
    iter,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use candle_core::Device;
use findings::Findings;

pub use self::doubts::{saturation, unusable};
pub(crate) use self::examined::{Examined, expect_images};
use crate::{
    Result,
    attack::{
        Attack, Example, Loss, Norm, Search, Victim,
        search::{self, LogitsOf, choice, length},
    },
    data::{Dataset, Range, to_floats},
    device::side_by_side,
    fs::Parts,
    progress::Progress,
};

/// A network and the labelled images on which it is evaluated.
#[derive(Clone, Copy)]
pub struct Evaluation<'a> {
    /// The network.
    pub victim: Victim<'a>,
    /// The images. Their ids, which key all random draws for them, are their indices.
    pub data: &'a Dataset,
    /// How many images the network evaluates together, on each CPU thread or on the GPU; 0 chooses a number that
    /// suits the device. Results do not depend on it.
    pub batch: usize,
    /// Where findings are kept, so that a repeated evaluation can reuse them, and how often.
    pub kept: Option<(&'a Parts, Duration)>,
    /// The progress display that counts the images.
    pub bar: Option<&'a Progress>,
}

/// What is done to an image before the network sees it: its pixels in [0, 1], HWC.
pub type Perturb<'a> = &'a (dyn Fn(&Example) -> Result<Vec<f32>> + Sync);

/// Leaves the image unchanged; see [`Perturb`].
pub fn unchanged(example: &Example) -> Result<Vec<f32>> {
    Ok(example.image.clone())
}

/// The share of images that are classified correctly.
pub fn share(right: &[bool]) -> f64 {
    right.iter().filter(|&&right| right).count() as f64 / right.len().max(1) as f64
}

impl<'a> Evaluation<'a> {
    /// An evaluation of this network on these images that keeps and shows nothing.
    pub fn new(logits_of: LogitsOf<'a>, data: &'a Dataset, device: &'a Device) -> Self {
        let shape = (data.shape.height, data.shape.width, data.shape.channels);
        Self { victim: Victim { logits_of, shape, device }, data, batch: 0, kept: None, bar: None }
    }

    /// The logits of each image after `perturb`. Findings are kept under `key`.
    pub fn logits(&self, key: &str, perturb: Perturb) -> Result<Vec<Vec<f32>>> {
        self.logits_of(key, &Vec::from_iter(0..self.data.len()), perturb)
    }

    /// For each image, whether the network predicts its label after `perturb`. Findings are kept under `key`.
    pub fn right(&self, key: &str, perturb: Perturb) -> Result<Vec<bool>> {
        let logits = self.logits(key, perturb)?;
        Ok(logits.iter().zip(&self.data.labels).map(|(z, &y)| choice(z) == Some(y as usize)).collect())
    }

    /// For each image, whether it withstands `attack`; only those still `standing` are attacked. Findings are kept
    /// under `key`.
    pub fn stands(&self, key: &str, standing: &[bool], attack: &dyn Attack) -> Result<Vec<bool>> {
        let rows: Vec<usize> = (0..standing.len()).filter(|&row| standing[row]).collect();
        let mut stands = standing.to_vec();
        for (&row, found) in rows.iter().zip(self.run(key, &rows, attack, false)?) {
            stands[row] = found.is_none();
        }
        Ok(stands)
    }

    /// What `attack` finds for the images `rows`, HWC. Findings are kept under `key`.
    pub fn find(&self, key: &str, rows: &[usize], attack: &dyn Attack) -> Result<Vec<Option<Vec<f32>>>> {
        self.run(key, rows, attack, true)
    }

    /// See [`Evaluation::find`]. Without `points`, only the fact that something was found is kept, as an empty
    /// point.
    fn run(
        &self,
        key: &str,
        rows: &[usize],
        attack: &dyn Attack,
        points: bool,
    ) -> Result<Vec<Option<Vec<f32>>>> {
        let findings = Findings::read(self.kept, key, self.data.len())?;
        let left: Vec<usize> = rows.iter().copied().filter(|&row| !findings.has(row)).collect();
        if let Some(bar) = self.bar {
            bar.skip((rows.len() - left.len()) as u64);
        }
        let workers = if self.victim.device.is_cpu() { rayon::current_num_threads() } else { 1 };
        // If there are few images, they are shared out evenly.
        let batch = self.batch().min(left.len().div_ceil(workers));
        let (taken, findings) = (AtomicUsize::new(0), Mutex::new(findings));
        let work = |_: &usize| {
            let next = || left.get(taken.fetch_add(1, Ordering::Relaxed));
            let searches = iter::from_fn(next).map(|&row| Ok((row, attack.search(self.example(row))?)));
            let over = |row: usize, found: Option<&[f32]>| {
                if let Some(bar) = self.bar {
                    bar.add(1);
                }
                let found = found.map(|point| if points { point } else { &[] });
                findings.lock().unwrap_or_else(PoisonError::into_inner).add(row, found)
            };
            let done = search::run(&self.victim, batch, searches, over);
            if done.is_err() {
                taken.store(left.len(), Ordering::Relaxed);
            }
            done
        };
        let done = side_by_side(self.victim.device, &Vec::from_iter(0..workers), work);
        let mut findings = findings.into_inner().unwrap_or_else(PoisonError::into_inner);
        let saved = findings.save();
        done?;
        saved?;
        Ok(rows.iter().map(|&row| findings.take(row)).collect())
    }

    fn logits_of(&self, key: &str, rows: &[usize], perturb: Perturb) -> Result<Vec<Vec<f32>>> {
        let ask = |example: Example| -> Result<Box<dyn Search>> {
            Ok(Box::new(Question { point: perturb(&example)?, slope_for: None, answer: None }))
        };
        Ok(self.find(key, rows, &ask)?.into_iter().map(Option::unwrap_or_default).collect())
    }

    /// How many of the images `rows` have a margin without a gradient.
    fn silent(&self, rows: &[usize]) -> Result<usize> {
        let ask = |Example { image, label, .. }: Example| -> Result<Box<dyn Search>> {
            Ok(Box::new(Question { point: image, slope_for: Some(label), answer: None }))
        };
        let slopes = self.find("gradients", rows, &ask)?;
        Ok(slopes.iter().filter(|slope| slope.as_deref() == Some(&[0.0])).count())
    }

    /// Image `row` as pixels in [0, 1].
    pub fn pixels(&self, row: usize) -> Vec<f32> {
        to_floats(self.data.image(row), Range::Unit)
    }

    fn example(&self, row: usize) -> Example {
        let label = self.data.labels[row] as usize;
        Example { image: self.pixels(row), shape: self.victim.shape, label, id: row as u64 }
    }

    fn batch(&self) -> usize {
        match self.batch {
            0 if self.victim.device.is_cpu() => 64,
            0 => 256,
            batch => batch,
        }
    }
}

/// A single query for one image. Its result is the answer: the logits, or the size of the margin's gradient.
struct Question {
    point: Vec<f32>,
    /// The label whose margin's gradient is wanted.
    slope_for: Option<usize>,
    answer: Option<Vec<f32>>,
}

impl Search for Question {
    fn point(&self) -> Option<&[f32]> {
        self.answer.is_none().then_some(self.point.as_slice())
    }

    fn wants_gradient(&self) -> bool {
        self.slope_for.is_some()
    }

    fn weights(&mut self, logits: &[f32]) -> Result<Vec<f32>> {
        Ok(self.slope_for.map_or_else(Vec::new, |label| Loss::Margin.of(logits, label).1))
    }

    fn advance(&mut self, logits: &[f32], gradient: &[f32]) -> Result<()> {
        self.answer = Some(match self.slope_for {
            Some(_) => vec![length(Norm::Linf, gradient.iter().copied())],
            None => logits.to_vec(),
        });
        Ok(())
    }

    fn found(&self) -> Option<&[f32]> {
        self.answer.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use candle_core::Tensor;

    use super::*;
    use crate::{
        attack::{Counted, Epsilon, METHODS, Pgd, PgdSearch, Threat},
        data::{OfficialSplit, Source},
        kernels, rng,
    };

    const N: usize = 40;

    /// A network of two layers.
    fn network(x: &Tensor) -> Result<Tensor> {
        let layer = |key: u64, rows: usize, columns: usize| -> Result<Tensor> {
            let mut weights = vec![0f32; rows * columns];
            rng::normals(key, 0, 0, &mut weights);
            Ok((Tensor::from_vec(weights, (rows, columns), x.device())? / (columns as f64).sqrt())?)
        };
        let hidden = kernels::relu(&kernels::linear(&x.flatten_from(1)?, &layer(1, 24, 64)?, None)?)?;
        kernels::linear(&hidden, &layer(2, 10, 24)?, None)
    }

    /// Digits with the labels that the network gives them, except for three.
    fn digits() -> Dataset {
        let mut data = Source::Digits.load(OfficialSplit::Test, Some(N), 0).unwrap();
        let logits = Evaluation::new(&network, &data, &Device::Cpu).logits("", &unchanged).unwrap();
        data.labels = logits.iter().map(|z| choice(z).unwrap() as u32).collect();
        (0..3).for_each(|i| data.labels[5 * i] = (data.labels[5 * i] + 1) % 10);
        data
    }

    /// All attacks by name, and both forms of PGD.
    fn attacks() -> Vec<(String, Box<dyn Attack>)> {
        let epsilon = Epsilon::try_from(0.05).unwrap();
        let threat = Threat::new(Norm::Linf, epsilon).unwrap();
        let mut attacks: Vec<(String, Box<dyn Attack>)> =
            METHODS.map(|method| (method.name().to_owned(), method.attack(threat, 3))).into();
        for counted in [Counted::Last, Counted::Every] {
            let pgd = Pgd::new(Norm::Linf, epsilon, 7, 2.5, 4).unwrap();
            let attack = PgdSearch::new(pgd, 2, counted).unwrap();
            attacks.push((format!("pgd-{counted:?}"), Box::new(attack)));
        }
        attacks
    }

    #[test]
    fn verdicts_depend_neither_on_the_window_nor_on_what_was_found_before_a_stop() {
        let data = digits();
        let rows: Vec<usize> = (0..N).rev().collect();
        for (name, attack) in attacks() {
            let of = |batch: usize| {
                let evaluation = Evaluation { batch, ..Evaluation::new(&network, &data, &Device::Cpu) };
                evaluation.find(&name, &rows, &*attack).unwrap()
            };
            let expected = of(64);
            let found = expected.iter().flatten().count();
            assert!(3 < found && found < N, "{name}: {found}");
            for batch in [1, 7] {
                assert_eq!(of(batch), expected, "{name} in windows of {batch}");
            }

            // Stops when half of the images are finished.
            let dir = tempfile::tempdir().unwrap();
            let parts = Parts::new(dir.path().to_path_buf());
            let (stopped, begun) = (AtomicBool::new(true), AtomicUsize::new(0));
            let halting = |example: Example| {
                if begun.fetch_add(1, Ordering::Relaxed) >= N / 2 && stopped.load(Ordering::Relaxed) {
                    bail!(Stopped, "half of it");
                }
                attack.search(example)
            };
            let evaluation = Evaluation {
                batch: 3,
                kept: Some((&parts, Duration::ZERO)),
                ..Evaluation::new(&network, &data, &Device::Cpu)
            };
            let error = evaluation.find(&name, &rows, &halting).unwrap_err();
            assert_eq!(error.exit_code(), 75);
            stopped.store(false, Ordering::Relaxed);
            begun.store(0, Ordering::Relaxed);
            assert_eq!(evaluation.find(&name, &rows, &halting).unwrap(), expected, "{name} after a stop");
            let again = begun.load(Ordering::Relaxed);
            assert!((N / 2..N).contains(&again), "{name}: {again} images were attacked again");
            assert_eq!(
                evaluation.find(&name, &rows, &halting).unwrap(),
                expected,
                "{name} from what is kept"
            );
            assert_eq!(begun.load(Ordering::Relaxed), again, "{name}: nothing was left to do");
        }
    }

    #[test]
    fn attacks_are_made_on_what_stands_and_what_is_right_is_what_nothing_was_found_for() {
        let data = digits();
        let evaluation = Evaluation::new(&network, &data, &Device::Cpu);
        let right = evaluation.right("", &unchanged).unwrap();
        assert_eq!(right.iter().filter(|&&right| !right).count(), 3);
        for (name, attack) in attacks() {
            let all = evaluation.stands(&name, &[true; N], &*attack).unwrap();
            let some = evaluation.stands(&name, &right, &*attack).unwrap();
            let both: Vec<bool> = all.iter().zip(&right).map(|(a, b)| *a && *b).collect();
            assert_eq!(some, both, "{name}");
        }
        assert_eq!(share(&[true, false, true, true]), 0.75);
    }
}
