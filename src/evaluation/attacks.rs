//! A sequence of attacks on a data set, each on the images that still stand; what is found is kept as it is found.

use candle_core::Tensor;

use crate::{
    Result,
    attack::{
        AutoAttack, Loss, Norm, Pgd, Threat, Victim,
        search::{choice, distance, length},
    },
    data::{Dataset, Range, to_floats},
    device::side_by_side,
    fs,
    progress::{Progress, check_stop},
};

/// One attack of a sequence.
#[derive(Clone, Copy)]
pub(crate) enum Single {
    Pgd(Pgd),
    Of(AutoAttack),
}

impl Single {
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Pgd(_) => "pgd".into(),
            Self::Of(attack) => attack.to_string(),
        }
    }
}

/// Images that are attacked together. Results do not depend on it.
const CHUNK: usize = 64;
/// The attacks on a data set.
pub(crate) struct Battle<'a> {
    pub(crate) victim: Victim<'a>,
    pub(crate) data: &'a Dataset,
    pub(crate) threat: Threat,
    pub(crate) seed: u64,
    pub(crate) parts: &'a fs::Parts,
}

impl Battle<'_> {
    /// Images `rows` as pixels in [0, 1], HWC.
    fn images(&self, rows: &[usize]) -> Vec<Vec<f32>> {
        rows.iter().map(|&row| unit_pixels(self.data, row)).collect()
    }

    /// Does `work` on chunks of `rows`, side by side on the CPU.
    fn by_chunks<T: Send>(
        &self,
        rows: &[usize],
        work: impl Fn(&[usize]) -> Result<Vec<T>> + Sync + Send,
    ) -> Result<Vec<T>> {
        let chunks: Vec<&[usize]> = rows.chunks(CHUNK).collect();
        let done = side_by_side(self.victim.device, &chunks, |chunk| work(chunk))?;
        Ok(done.into_iter().flatten().collect())
    }

    /// The logits of every image.
    pub(crate) fn logits(&self) -> Result<Vec<Vec<f32>>> {
        let all: Vec<usize> = (0..self.data.len()).collect();
        self.by_chunks(&all, |rows| {
            check_stop()?;
            let images = self.images(rows);
            self.victim.logits(&images.iter().map(Vec::as_slice).collect::<Vec<_>>())
        })
    }

    /// What `attack` finds for the images that stand. Finished chunks are kept and found again.
    pub(crate) fn fight(
        &self,
        attack: Single,
        standing: &[usize],
        bar: &Progress,
    ) -> Result<Vec<Option<Vec<f32>>>> {
        self.by_chunks(standing, |rows| {
            check_stop()?;
            let images = self.images(rows);
            let images: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
            // By all of the rows: who stands may differ in a run of another version.
            let members: Vec<u8> = rows.iter().flat_map(|&row| (row as u64).to_le_bytes()).collect();
            let key = format!("{}-{}", attack.name(), &blake3::hash(&members).to_hex()[..32]);
            let kept = self.parts.get(&key)?;
            match kept.and_then(|bytes| unpack(&bytes, rows.len(), images[0].len())) {
                Some(found) => {
                    bar.skip(rows.len() as u64);
                    self.proven(attack, rows, &images, found)
                }
                None => {
                    let found = self.search(attack, rows, &images)?;
                    let found = self.proven(attack, rows, &images, found)?;
                    self.parts.put(&key, &pack(&found))?;
                    bar.add(rows.len() as u64);
                    Ok(found)
                }
            }
        })
    }

    /// What the attack returns for some images.
    fn search(&self, attack: Single, rows: &[usize], images: &[&[f32]]) -> Result<Vec<Option<Vec<f32>>>> {
        let labels: Vec<usize> = rows.iter().map(|&row| self.data.labels[row] as usize).collect();
        let ids: Vec<u64> = rows.iter().map(|&row| row as u64).collect();
        match attack {
            Single::Of(attack) => attack.run(&self.victim, self.threat, self.seed, (images, &labels, &ids)),
            Single::Pgd(pgd) => {
                let (h, w, c) = self.victim.shape;
                let x = Tensor::from_vec(images.concat(), (rows.len(), h, w, c), self.victim.device)?;
                let y: Vec<u32> = labels.iter().map(|&label| label as u32).collect();
                let y = Tensor::new(y, self.victim.device)?;
                let x_adv = pgd.perturb(&self.victim.logits_of, &x, &y, &ids)?;
                Ok(x_adv.flatten_from(1)?.to_vec2::<f32>()?.into_iter().map(Some).collect())
            }
        }
    }

    /// What of it counts: images that are not answered by their label.
    ///
    /// Fails with [`crate::Error::Alarm`] if one is not in the ball and the box, or holds what is no number.
    fn proven(
        &self,
        attack: Single,
        rows: &[usize],
        images: &[&[f32]],
        mut found: Vec<Option<Vec<f32>>>,
    ) -> Result<Vec<Option<Vec<f32>>>> {
        let claimed: Vec<usize> = (0..found.len()).filter(|&i| found[i].is_some()).collect();
        if claimed.is_empty() {
            return Ok(found);
        }
        let points: Vec<&[f32]> = claimed.iter().filter_map(|&i| found[i].as_deref()).collect();
        let answers = self.victim.logits(&points)?;
        let epsilon = self.threat.epsilon();
        // Rounding of pixels, and of sums of their squares.
        let limit = epsilon * (1.0 + 1e-5) + 1e-6;
        for (point, &i) in points.iter().zip(&claimed) {
            let moved = f64::from(distance(self.threat.norm(), point, images[i]));
            let in_box = point.iter().all(|v| (0.0..=1.0).contains(v));
            if !in_box || moved.is_nan() || moved > limit {
                bail!(
                    Alarm,
                    "{} moved image {} by {moved}, expected at most {epsilon} and pixels from 0 to 1",
                    attack.name(),
                    rows[i]
                );
            }
        }
        for (&i, logits) in claimed.iter().zip(answers) {
            if choice(&logits) == Some(self.data.labels[rows[i]] as usize) {
                found[i] = None;
            }
        }
        Ok(found)
    }

    /// The doubts that AutoAttack's authors check for before it runs (their `checks.py`): a network that answers
    /// differently each time, probabilities instead of logits, images without a gradient.
    pub(crate) fn doubts(&self, logits: &[Vec<f32>], correct: &[usize]) -> Result<Vec<String>> {
        let mut doubts = Vec::new();
        let first: Vec<usize> = (0..self.data.len().min(CHUNK)).collect();
        let images = self.images(&first);
        let again = self.victim.logits(&images.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        let nan = logits.iter().filter(|row| row.iter().any(|z| z.is_nan())).count();
        if nan > 0 {
            doubts.push(format!("{nan} images are answered with what is no number, which counts as wrong"));
        }
        // Directions, as AutoAttack compares them: the last bits may differ on a GPU.
        let direction = |row: &[f32]| -> Vec<f32> {
            let size = length(Norm::L2, row.iter().copied()) + 1e-10;
            row.iter().map(|z| z / size).collect()
        };
        let differ = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            choice(a) != choice(b) || distance(Norm::L2, &direction(a), &direction(b)) > 1e-4
        };
        if again.iter().zip(logits).any(differ) {
            doubts.push(
                "the network answers the same image differently: a randomised defence needs attacks that average \
                 over its draws"
                    .to_owned(),
            );
        }
        let classes = logits.first().map_or(0, Vec::len);
        if classes < 4 {
            doubts.push(format!(
                "with {classes} classes the targeted DLR loss is not defined{}: the margin is climbed in its place",
                if classes < 3 { ", nor is DLR" } else { "" }
            ));
        }
        let is_distribution = |row: &Vec<f32>| {
            let sum: f32 = row.iter().sum();
            row.iter().all(|v| (-1e-5..=1.0 + 1e-5).contains(v)) && (sum - 1.0).abs() < 1e-5
        };
        if logits.iter().all(is_distribution) {
            doubts
                .push("the network returns probabilities, expected logits: gradients may vanish".to_owned());
        }
        let silent = self.by_chunks(correct, |rows| {
            check_stop()?;
            let images = self.images(rows);
            let points: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
            let weights =
                |i: usize, logits: &[f32]| Loss::Margin.of(logits, self.data.labels[rows[i]] as usize).1;
            let answers = self.victim.logits_and_gradients(&points, weights)?;
            Ok(answers.into_iter().map(|(_, gradient)| gradient.iter().all(|&g| g == 0.0)).collect())
        })?;
        let silent = silent.into_iter().filter(|&s| s).count();
        if silent > 0 {
            doubts.push(format!(
                "{silent} images have no gradient: what gradient attacks leave standing there says little"
            ));
        }
        Ok(doubts)
    }
}

/// A byte an image, whether something was found; then what was found.
fn pack(found: &[Option<Vec<f32>>]) -> Vec<u8> {
    let mut bytes: Vec<u8> = found.iter().map(|f| u8::from(f.is_some())).collect();
    bytes.extend(found.iter().flatten().flatten().flat_map(|v| v.to_le_bytes()));
    bytes
}

/// The inverse of [`pack`] for `n` images of `size` pixels; none if the bytes are not that.
fn unpack(bytes: &[u8], n: usize, size: usize) -> Option<Vec<Option<Vec<f32>>>> {
    let (flags, pixels) = bytes.split_at_checked(n)?;
    let hits = flags.iter().filter(|&&f| f == 1).count();
    if flags.iter().any(|&f| f > 1) || pixels.len() != hits * size * 4 {
        return None;
    }
    let mut images = pixels
        .chunks_exact(size * 4)
        .map(|image| image.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect());
    flags.iter().map(|&f| if f == 1 { images.next().map(Some) } else { Some(None) }).collect()
}

/// Image `row` as pixels in [0, 1].
pub(crate) fn unit_pixels(data: &Dataset, row: usize) -> Vec<f32> {
    to_floats(data.image(row), Range::Unit)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{attack::Epsilon, data::Shape};

    fn data() -> Dataset {
        let shape = Shape { height: 2, width: 2, channels: 1 };
        let mut data = Dataset::empty(shape, (0..4).map(|i| i.to_string()).collect());
        for i in 0..6u8 {
            data.push(&[40 * i, 255 - 40 * i, 10, 200], u32::from(i) % 3);
        }
        data
    }

    /// The doubts about a network of four classes.
    fn doubts(logits_of: &(dyn Fn(&Tensor) -> Result<Tensor> + Sync)) -> Vec<String> {
        let (data, dir) = (data(), tempfile::tempdir().unwrap());
        let battle = Battle {
            victim: Victim { logits_of, shape: (2, 2, 1), device: &Device::Cpu },
            data: &data,
            threat: Threat::new(Norm::Linf, Epsilon::try_from(0.1).unwrap()).unwrap(),
            seed: 0,
            parts: &fs::Parts::new(dir.path().to_path_buf()),
        };
        let logits = battle.logits().unwrap();
        battle.doubts(&logits, &[0, 1, 2, 3, 4, 5]).unwrap()
    }

    fn pixels(x: &Tensor) -> Result<Tensor> {
        Ok(x.flatten_from(1)?)
    }

    #[test]
    fn an_honest_network_raises_no_doubt() {
        assert_eq!(doubts(&|x| Ok((pixels(x)? * 3.0)?)), [""; 0]);
    }

    #[test]
    fn what_makes_robust_accuracy_worthless_is_said() {
        let said =
            |doubts: Vec<String>, part: &str| assert!(doubts.iter().any(|d| d.contains(part)), "{doubts:?}");
        let asked = std::sync::atomic::AtomicU32::new(0);
        said(
            doubts(&|x| {
                let time = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let noise = Tensor::new(&[0f32, 0.0, 0.0, time as f32], x.device())?;
                Ok(pixels(x)?.broadcast_add(&noise)?)
            }),
            "answers the same image differently",
        );
        said(
            doubts(&|x| {
                let odds = pixels(x)?.exp()?;
                Ok(odds.broadcast_div(&odds.sum_keepdim(1)?)?)
            }),
            "returns probabilities",
        );
        said(
            doubts(&|x| Ok((crate::kernels::relu(&(pixels(x)? - 10.0)?)? + pixels(x)?.detach())?)),
            "6 images have no gradient",
        );
        said(
            doubts(&|x| Ok(pixels(x)?.narrow(1, 0, 3)?)),
            "with 3 classes the targeted DLR loss is not defined:",
        );
        said(doubts(&|x| Ok((pixels(x)? * f64::NAN)?)), "6 images are answered with what is no number");
    }

    #[test]
    fn parts_round_trip_and_others_are_no_parts() {
        let found = vec![Some(vec![0.5, 1.0]), None, Some(vec![0.0, 0.25])];
        let bytes = pack(&found);
        assert_eq!(unpack(&bytes, 3, 2), Some(found));
        assert_eq!(unpack(&bytes, 3, 3), None);
        assert_eq!(unpack(&bytes[..bytes.len() - 1], 3, 2), None);
        assert_eq!(unpack(&[2, 0, 0], 3, 2), None);
        assert_eq!(unpack(&[], 3, 2), None);
    }

    #[test]
    fn an_image_outside_of_the_ball_or_the_box_raises_the_alarm() {
        let (data, dir) = (data(), tempfile::tempdir().unwrap());
        let logits_of = |x: &Tensor| pixels(x);
        let battle = Battle {
            victim: Victim { logits_of: &logits_of, shape: (2, 2, 1), device: &Device::Cpu },
            data: &data,
            threat: Threat::new(Norm::Linf, Epsilon::try_from(0.1).unwrap()).unwrap(),
            seed: 0,
            parts: &fs::Parts::new(dir.path().to_path_buf()),
        };
        let image = unit_pixels(&data, 0);
        let proven = |moved: Vec<f32>| {
            battle.proven(Single::Of(AutoAttack::Square), &[0], &[&image], vec![Some(moved)])
        };
        let moved =
            |by: f32| image.iter().enumerate().map(|(i, v)| if i == 2 { v + by } else { *v }).collect();
        assert_eq!(proven(moved(0.1)).unwrap().len(), 1);
        for by in [0.2, -0.06, f32::NAN] {
            assert_eq!(proven(moved(by)).unwrap_err().exit_code(), 70, "{by}");
        }
    }
}
