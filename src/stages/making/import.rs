//! Import: images made elsewhere, as a pool.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Result,
    data::{self, Source, UNLABELLED},
    error::expect_within as expect,
    fs::{self, Record},
    progress::{Progress, check_stop},
    settings::{self, PartSettings},
    stage::{Input, Job, Outcome, Stage, note},
    tables::{
        pool::{IMPORTED, PoolInfo},
        shards::{ShardRecord, pool_hash, read_record, record_file},
    },
};

const SOURCE: Input = Input::given("source");

/// Makes a pool from images that were made elsewhere: they are decoded once and written like generated ones.
///
/// Everything that works on a pool then works on them: labels, scores, ARC, curation. The images keep their order.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Import {
    /// The images: Hugging Face Parquet (file or folder), a folder of PNG or JPEG files (flat, or with a subfolder
    /// for each class), or an .npz file with the arrays `image`, (n, h, w, c) u8, and `label`, (n,).
    #[arg(long)]
    pub source: Option<Source>,
    /// The official split to import.
    #[arg(long, value_parser = settings::named::<data::OfficialSplit>(), default_value_t = data::OfficialSplit::Train)]
    pub official_split: data::OfficialSplit,
    /// Which of the images are used.
    #[command(flatten)]
    #[serde(flatten)]
    pub part: PartSettings,
    /// How many unreadable images to tolerate; they are skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Images in a shard.
    #[arg(long, default_value_t = 16_384)]
    pub shard_rows: usize,
}

impl Stage for Import {
    const NAME: &'static str = "import";
    const ABOUT: &'static str = "Make a pool from images made elsewhere";
    const INPUTS: &'static [Input] = &[SOURCE];

    fn validate(&self) -> Result<()> {
        self.part.validate()?;
        expect("shard_rows", self.shard_rows, 1, 1 << 24)
    }

    fn amount(&self) -> String {
        let source = self.source.as_ref().map_or("(source is not set)".into(), Source::to_string);
        format!("{} of the {} split of {source}", self.part.part(), self.official_split)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let source = SOURCE.set(self.source.as_ref(), "images: Parquet, a folder or an .npz file")?;
        let part = self.part.part();
        let images = source.load_part(self.official_split, part, self.max_bad)?;
        let labelled = images.class_names != [UNLABELLED];
        let info = PoolInfo {
            schema: "proxyset.pool/1".into(),
            count: images.len() as u64,
            shards: images.len().div_ceil(self.shard_rows),
            shape: images.shape,
            class_names: if labelled { images.class_names.clone() } else { Vec::new() },
            named: labelled && images.class_names.iter().enumerate().any(|(i, name)| *name != i.to_string()),
            conditional: labelled,
            generator: job.fingerprint.clone(),
            sampler: json!({ IMPORTED: source.fingerprint(self.official_split)? }),
            seed: 0,
        };
        let out = job.open()?;
        let warnings = Vec::from_iter(images.left_out(part));
        warnings.iter().for_each(|warning| note(self, &format!("warning: {warning}")));
        info.write(out)?;
        let dir = out.join("pool");
        let bar = Progress::new(Self::NAME, info.count, "images");
        for shard in 0..info.shards {
            check_stop()?;
            let first = shard * self.shard_rows;
            let rows = first..(first + self.shard_rows).min(images.len());
            if let Some(record) = read_record(&dir, shard)?.filter(|record| record.has_file(&dir)) {
                bar.skip(record.rows);
                continue;
            }
            let size = images.shape.size();
            let pixels = &images.pixels[rows.start * size..rows.end * size];
            let label = |i: u64| labelled.then(|| i64::from(images.labels[i as usize]));
            let writer = info.shard(rows.start as u64..rows.end as u64, pixels, label)?;
            let entry = writer.finish(&dir, &format!("shard-{shard:05}.parquet"))?;
            let record = ShardRecord::of(job, shard, entry.rows, entry.blake3, entry.bytes);
            fs::publish_json(&record_file(&dir, shard), &record)?;
            bar.add(record.rows);
        }
        Ok(Outcome::Done(json!({
            "images": info.count,
            "bad_images": images.bad_rows,
            "shards": info.shards,
            "shape": info.shape,
            "classes": info.class_names.len(),
            "warnings": warnings,
            "pool_blake3": pool_hash(&dir, info.shards)?,
        })))
    }
}
