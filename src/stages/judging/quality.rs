//! Quality: how far a pool is from real images, in a classifier's features.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::label::expect_same_classes;
use crate::{
    Result,
    data::{self, Range, Source, to_tensor},
    error::expect_within as expect,
    fs,
    progress::{Progress, check_stop},
    proxy::{
        extractor::Extractor,
        fold::uid_order,
        quality::{FeatureMatrix, frechet_distance, precision_recall},
    },
    rng::{Permutation, spread},
    settings::{self, PartSettings},
    stage::{Input, Job, Outcome, Stage, note},
    stats::clopper_pearson,
    tables::{
        pool::{POOL, Pool},
        records::CLASSIFIER,
    },
};

/// Images that go through the classifier together. Results do not depend on it.
const CHUNK: usize = 256;

/// Measures a pool against real images in the features of a classifier (the inputs of its last linear layer) or of
/// a network from the Hub.
///
/// Reports the Fréchet distance (Heusel et al. 2017), next to that between two halves of the real images (each
/// class halved), precision and recall (Kynkäänniemi et al. 2019), and the share of the images that the classifier
/// gives the class they were made for. All of them depend on the classifier and on the numbers of images, which are
/// reported too: compare at equal numbers.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Quality {
    /// The folder of a finished generate or import stage.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// A classifier's folder (`config.json`, `model.safetensors`), such as that of a finished train stage; or, if
    /// the program was built with the feature `extractors`, the folder of a ResNet, DINOv2 or CLIP from the Hub.
    #[arg(long)]
    pub classifier: Option<PathBuf>,
    /// The real data: `builtin:digits`, or a folder or file of Hugging Face Parquet.
    #[arg(long, default_value = "builtin:digits")]
    pub data: Source,
    /// The official split to compare with.
    #[arg(long, value_parser = settings::named::<data::OfficialSplit>(), default_value_t = data::OfficialSplit::Test)]
    pub official_split: data::OfficialSplit,
    /// Which of the real images are used.
    #[command(flatten)]
    #[serde(flatten)]
    pub part: PartSettings,
    /// Use only N images of the pool, drawn by the hashes of their uids; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub pool_limit: usize,
    /// Which nearest neighbour's distance is the radius of a ball, for precision and recall.
    #[arg(long, default_value_t = 3)]
    pub neighbours: usize,
    /// The largest number of images of each kind to draw for precision and recall, whose cost grows with its
    /// square.
    #[arg(long, default_value_t = 5000)]
    pub max_manifold: usize,
    /// How many unreadable rows of the source to tolerate; they are skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Seed of the halves of the real images and of the draw for precision and recall; pool images are drawn by
    /// their uids.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Stage for Quality {
    const NAME: &'static str = "quality";
    const ABOUT: &'static str =
        "Measure a pool against real images: Fréchet distance, precision, recall, class accuracy";
    const INPUTS: &'static [Input] = &[POOL, CLASSIFIER, Input::real_data("data")];
    const REVISION: u32 = 2;

    fn validate(&self) -> Result<()> {
        self.part.validate()?;
        expect("neighbours", self.neighbours, 1, 1000)?;
        expect("max_manifold", self.max_manifold, self.neighbours + 1, 1 << 20)
    }

    fn amount(&self) -> String {
        "one forward pass per image".into()
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let pool = Pool::open(self.pool.as_deref())?;
        let dir = CLASSIFIER.set(self.classifier.as_deref(), "the folder of a classifier")?;
        let network = Extractor::load(dir, &job.device)?;
        let part = self.part.part();
        let real = self.data.load_part(self.official_split, part, self.max_bad)?;
        network.expect_shape(dir, &"the pool", pool.info.shape)?;
        network.expect_shape(dir, &"the real data", real.shape)?;
        if let Some(classifier) = network.classifier() {
            expect_same_classes(classifier, dir, &pool)?;
        }
        let all = pool.info.count as usize;
        let wanted = if self.pool_limit > 0 { self.pool_limit.min(all) } else { all };
        let least = (self.neighbours + 1).max(4);
        if real.len() < least || wanted < least {
            bail!(
                Usage,
                "there are {} real images and {wanted} of the pool (limit or first, pool_limit), expected at least {least} of each: \
                 more than neighbours = {}, and two for each half",
                real.len(),
                self.neighbours
            );
        }
        let out = job.open()?;
        let warnings = Vec::from_iter(real.left_out(part));
        warnings.iter().for_each(|warning| note(self, &format!("warning: {warning}")));
        let bar = Progress::new(Self::NAME, (real.len() + wanted) as u64, "images");

        let mut seen = Seen::default();
        for pixels in real.pixels.chunks(CHUNK * real.shape.size()) {
            seen.add(&network, pixels, real.shape, job)?;
            bar.add((pixels.len() / real.shape.size()) as u64);
        }
        let (real_features, _) = seen.finish()?;

        let last = pool.last_of_first(wanted)?;
        let (mut seen, mut labels, mut uid_orders) = (Seen::default(), Vec::new(), Vec::new());
        for shard in 0..pool.info.shards {
            let mut rows = pool.read(shard)?;
            rows.retain(|uid| uid_order(uid) <= last);
            for first in (0..rows.len()).step_by(CHUNK) {
                let chunk = first..(first + CHUNK).min(rows.len());
                seen.add(&network, &rows.pixels(chunk.clone(), pool.info.shape)?, pool.info.shape, job)?;
                bar.add(chunk.len() as u64);
            }
            uid_orders.extend(rows.uids.iter().map(|uid| uid_order(uid)));
            labels.extend(rows.labels);
        }
        let (synthetic, classes) = seen.finish()?;

        let order = Permutation::new(self.seed, 0, real.len() as u64);
        let mut shuffled: Vec<usize> = (0..real.len()).map(|i| order.at(i as u64) as usize).collect();
        // Both get equally many of each class: halves that differ in their classes are further apart than a
        // balanced pool.
        shuffled.sort_by_key(|&image| real.labels[image]);
        let half = |from: usize| shuffled.iter().copied().skip(from).step_by(2).collect::<Vec<_>>();
        let (first, second) = (half(0), half(1));
        let halves = frechet_distance(&real_features.subset(&first)?, &real_features.subset(&second)?);
        let most = self.max_manifold;
        let real_part = real_features.subset(&spread(real.len(), real.len().min(most), self.seed))?;
        let mut drawn: Vec<usize> = (0..synthetic.len()).collect();
        drawn.sort_unstable_by_key(|&image| uid_orders[image]);
        drawn.truncate(most);
        let synthetic_part = synthetic.subset(&drawn)?;
        let (precision, recall) = precision_recall(&real_part, &synthetic_part, self.neighbours)?;
        let asked: Vec<(u32, u32)> =
            labels.iter().zip(&classes).filter_map(|(label, class)| Some(((*label)?, *class))).collect();
        let right = asked.iter().filter(|(label, class)| label == class).count() as u64;
        let n = asked.len() as u64;
        let summary = json!({
            "schema": "proxyset.quality/1",
            "frechet_distance": frechet_distance(&real_features, &synthetic),
            "real_images": real_features.len(),
            "synthetic_images": synthetic.len(),
            "frechet_distance_of_real_halves": halves,
            "images_of_the_halves": [first.len(), second.len()],
            "precision": precision,
            "recall": recall,
            "neighbours": self.neighbours,
            "images_of_precision_and_recall": [real_part.len(), synthetic_part.len()],
            "class_accuracy": (n > 0).then(|| right as f64 / n as f64),
            "class_accuracy_interval": (n > 0).then(|| clopper_pearson(right, n, 0.05)),
            "images_of_class_accuracy": n,
            "features": {
                "of": match network.classifier() {
                    Some(_) => "what the last linear layer of the classifier gets",
                    None => "what a network of the Hub pools",
                },
                "dimension": real_features.dim(),
                "classifier_blake3": fs::hash_file(&dir.join("model.safetensors"))?.0,
            },
            "warnings": warnings,
            "real": { "split": self.official_split, "blake3": self.data.fingerprint(self.official_split)? },
        });
        fs::publish_json(&out.join("quality.json"), &summary)?;
        Ok(Outcome::Done(summary))
    }
}

/// What a classifier saw: features and first choices.
#[derive(Default)]
struct Seen {
    dim: usize,
    features: Vec<f32>,
    /// Empty if the network is not a classifier.
    classes: Vec<u32>,
}

impl Seen {
    fn add(&mut self, network: &Extractor, pixels: &[u8], shape: data::Shape, job: &Job) -> Result<()> {
        check_stop()?;
        let x = to_tensor(pixels, shape, Range::Unit, &job.device)?;
        let (features, logits) = network.features(&x)?;
        self.dim = features.dim(1)?;
        self.features.extend(features.flatten_all()?.to_vec1::<f32>()?);
        if let Some(logits) = logits {
            self.classes.extend(logits.argmax(1)?.to_vec1::<u32>()?);
        }
        Ok(())
    }

    fn finish(self) -> Result<(FeatureMatrix, Vec<u32>)> {
        Ok((FeatureMatrix::new(self.dim, self.features)?, self.classes))
    }
}
