//! Materialize: writes a selection as a data set in the Hugging Face layout. Image bytes are copied once,
//! unchanged.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Error, Result,
    curate::Arm,
    data::{Card, CardConfig, FileEntry, ImageWriter, Manifest, check::check_dataset},
    error::expect_within as expect,
    fs::{Parts, Record},
    progress::{Progress, check_stop},
    rng::{Permutation, stream},
    stage::{Input, Job, Outcome, Stage, read_config},
    stages::making::{Generate, Import},
    tables::{
        dataset::{self, PoolConfiguration, features, recorded_file, written_file},
        division::{Division, SPLIT},
        pool::{POOL, Pool},
        scores::{SCORES, ScoreTables},
        selection::{self, SELECTION, SelectRecord, Selected},
    },
};

/// Bytes of images held in memory at a time, unless a single file has more.
const BYTES_IN_MEMORY: u64 = 1 << 30;

/// Writes the kept images as `dataset/`: Parquet files in the layout of Hugging Face `datasets`, a card, a manifest.
///
/// Rows are shuffled by a keyed permutation, since many readers shuffle only in a buffer. The result is checked
/// before the stage is done.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Materialize {
    /// The folder of a finished split stage, which is named in the card.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// The folder of a finished generate or import stage: the images.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// The folder of a finished curate stage, which says which images to write.
    #[arg(long)]
    pub selection: Option<PathBuf>,
    /// The folder of a finished score stage for the pool; needed for with_pool.
    #[arg(long)]
    pub scores: Option<PathBuf>,
    /// Also write the whole pool, with its scores and what was selected, as a second configuration `pool`.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub with_pool: bool,
    /// The largest number of rows in a file.
    #[arg(long, default_value_t = 131_072)]
    pub rows_per_file: usize,
    /// The approximate largest size of a file in millions of bytes, estimated from the mean size of the pool's
    /// images.
    #[arg(long, default_value_t = 500)]
    pub file_megabytes: u64,
    /// The data set's display name; derived from the real data's if empty.
    #[arg(long, default_value = "")]
    pub pretty_name: String,
    /// The licence in the card, as a Hub id. The real data's licence applies to what is made from it.
    #[arg(long, default_value = "other")]
    pub license: String,
    /// Seed of the order of the rows.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Materialize {
    /// The rows of a file whose images have this many bytes on average.
    fn rows_of_file(&self, image_bytes: u64) -> usize {
        self.rows_per_file.min((1_000_000 * self.file_megabytes / image_bytes).max(1) as usize)
    }
}

impl Stage for Materialize {
    const NAME: &'static str = "materialize";
    const ABOUT: &'static str = "Write a selection as a Hugging Face data set";
    const INPUTS: &'static [Input] = &[SPLIT, POOL, SELECTION, Input::given(SCORES.key)];

    fn validate(&self) -> Result<()> {
        if !self.with_pool && self.scores.is_some() {
            bail!(Usage, "scores is set, but with_pool is false, expected both or neither");
        }
        // Arrow's offsets end at 2 GiB, and the images of one file may be larger than the pool's average.
        expect("file_megabytes", self.file_megabytes, 1, 1000)?;
        expect("rows_per_file", self.rows_per_file, 1, 1 << 24)
    }

    fn amount(&self) -> String {
        let Self { rows_per_file, file_megabytes, .. } = self;
        format!("the kept images in files of at most {rows_per_file} rows and about {file_megabytes} MB")
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let split = SPLIT.finished(self.split.as_deref())?;
        let division = Division::read(&split)?;
        let pool = Pool::open(self.pool.as_deref())?;
        let (selected, record) = selection::read(self.selection.as_deref())?;
        if selected.is_empty() {
            bail!(Data, "the selection is empty, expected at least one image");
        }
        let tables = self.with_pool.then(|| ScoreTables::open(self.scores.as_deref())).transpose()?;
        if let Some(selection) = &self.selection {
            if let Some(tables) = &tables {
                SCORES.expect_in(SELECTION.key, selection, &tables.folder)?;
            }
            SPLIT.expect_same(SELECTION.key, selection, record.split.as_deref(), &split)?;
        }
        let out = job.open()?;
        let folder = out.join(dataset::FOLDER);
        let work = Parts::new(job.hidden(out, "parts"));
        let order = Permutation::new(self.seed, u64::from(stream::ORDER), selected.len() as u64);
        let rows: Vec<&Selected> =
            (0..selected.len()).map(|i| &selected[order.at(i as u64) as usize]).collect();
        let image_bytes = pool.bytes()?.div_ceil(pool.info.count).max(1);
        let rows_per_file = self.rows_of_file(image_bytes);
        let files = rows.len().div_ceil(rows_per_file);
        let writing = Writing {
            dataset: &folder,
            pool: &pool,
            class_names: &division.class_names,
            rows_per_file,
            files,
            work: &work,
            bar: Progress::new(Self::NAME, rows.len() as u64, "images"),
        };
        let mut entries = Vec::new();
        let files_at_once = ((BYTES_IN_MEMORY / image_bytes) as usize / rows_per_file).max(1);
        for (group, chunk) in rows.chunks(files_at_once * rows_per_file).enumerate() {
            check_stop()?;
            entries.extend(writing.files(chunk, group * files_at_once)?);
        }
        let mut card = self.card(&pool, &record, &division, &entries)?;
        if let Some(tables) = tables {
            let mut chosen = vec![false; tables.len()];
            for s in &selected {
                let row = chosen.get_mut(tables.row(s.shard, s.row));
                *row.ok_or_else(|| Error::Data("scores are not those that were selected by".into()))? = true;
            }
            let configuration = PoolConfiguration {
                pool: &pool,
                tables,
                class_names: &division.class_names,
                selected: chosen,
                rows_per_file,
            };
            let (files, config) = configuration.write(&folder, &work)?;
            entries.extend(files);
            card.configs.push(config);
        }
        let provenance = self.provenance(&pool, &record, &division)?;
        card.write(&folder)?;
        Manifest::new(pool.info.shape, division.class_names.clone(), entries, provenance).write(&folder)?;
        let report = check_dataset(&folder)?;
        Ok(Outcome::Done(json!({
            "rows": report.configs[0].rows,
            "pool_rows": report.configs.get(1).map(|pool| pool.rows),
            "files": report.files,
            "bytes": report.bytes,
            "arm": record.arm,
            "by_class": record.kept_by_class(),
        })))
    }
}

/// What the files of a data set have in common.
struct Writing<'a> {
    dataset: &'a Path,
    pool: &'a Pool,
    class_names: &'a [String],
    rows_per_file: usize,
    /// The total number of files.
    files: usize,
    /// Records of the files written so far.
    work: &'a Parts,
    bar: Progress,
}

impl Writing<'_> {
    /// Writes the files that hold `rows`, numbered from `first_file`, reading each pool shard once.
    fn files(&self, rows: &[&Selected], first_file: usize) -> Result<Vec<FileEntry>> {
        let Self { dataset, pool, class_names, files, work, bar, .. } = self;
        let name = |file: usize| format!("data/train-{file:05}-of-{files:05}.parquet");
        let written = (first_file..first_file + rows.len().div_ceil(self.rows_per_file))
            .map(|file| written_file(dataset, &name(file), work))
            .collect::<Result<Vec<_>>>()?;
        if let Some(entries) = written.into_iter().collect::<Option<Vec<_>>>() {
            bar.skip(rows.len() as u64);
            return Ok(entries);
        }
        let mut by_shard: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        rows.iter().enumerate().for_each(|(i, row)| by_shard.entry(row.shard).or_default().push(i));
        let mut images: Vec<Vec<u8>> = vec![Vec::new(); rows.len()];
        for (shard, wanted) in by_shard {
            let read = pool.read(shard)?;
            for i in wanted {
                let Selected { row, uid, .. } = rows[i];
                if read.uids.get(*row) != Some(uid) {
                    bail!(Data, "the selection says that row {row} of shard {shard} is {uid}, but it is not");
                }
                images[i].clone_from(&read.images[*row]);
            }
        }
        let mut entries = Vec::new();
        for (k, chunk) in rows.chunks(self.rows_per_file).enumerate() {
            check_stop()?;
            let images = &images[k * self.rows_per_file..][..chunk.len()];
            let columns = dataset::columns(images, chunk, pool.info.conditional)?;
            entries.push(recorded_file(dataset, &name(first_file + k), work, bar, || {
                let mut writer = ImageWriter::new(features(class_names), &pool.info.generator)?;
                writer.push(columns)?;
                Ok(writer)
            })?);
        }
        Ok(entries)
    }
}

impl Materialize {
    fn provenance(&self, pool: &Pool, record: &SelectRecord, division: &Division) -> Result<Value> {
        // Says what was computed, not where: the same work gives the same manifest in any folder.
        let mut generate = read_config(&pool.dir)?;
        let inputs = Generate::INPUTS.iter().chain(Import::INPUTS).map(|input| input.key);
        for key in inputs.chain(Generate::RUNTIME.iter().copied()) {
            generate.settings.remove(key);
        }
        let inputs: Vec<Value> =
            generate.inputs.iter().map(|i| json!({ "key": i.key, "fingerprint": i.fingerprint })).collect();
        Ok(json!({
            "arm": record.arm.to_string(),
            "rule": record.rule,
            "counts": { "pool": record.total, "kept": record.kept, "rejected": record.rejected },
            "real_data": { "name": real_name(&division.source.to_string()), "blake3": division.source_fingerprint },
            "generator": { "inputs": inputs, "settings": generate.settings, "fingerprint": pool.info.generator },
            "sampler": pool.info.sampler,
            "version": env!("CARGO_PKG_VERSION"),
        }))
    }

    fn card(
        &self,
        pool: &Pool,
        record: &SelectRecord,
        division: &Division,
        files: &[FileEntry],
    ) -> Result<Card> {
        let imported = pool.info.imported();
        let source = division.source.to_string();
        let real = real_name(&source);
        let pretty_name = match &*self.pretty_name {
            "" => format!("{real}, synthetic, curated ({})", record.arm),
            name => name.to_owned(),
        };
        let by_class: String =
            record.classes.iter().map(|class| format!("| {} | {} |\n", class.class, class.kept)).collect();
        let text = format!(
            "{made}, {selected}, by proxyset, which implements \
             [Sehwag et al. 2022](https://arxiv.org/abs/2104.09425).\n\n\
             - {origin}\n\
             - **Curation** arm `{arm}`: {balance}\n\
             - **Score** `synthetic_score`, low is close to real: the mean over ε of a robust discriminator's \
             probability of \"synthetic\", by networks that were not trained on the image\n\
             - **Labels** {labels}; `label_confidence` is a classifier's, trained on real images\n\
             - **Scores of the pool** {before}; **of the kept** {after}\n\n\
             | class | images |\n|---|---|\n{by_class}\n\
             ## Risks\n\n\
             The generator may have memorised training images; copies of one, mirrored or shifted by a \
             pixel too, were removed{but_pool}. \
             Selection by low score can shrink rare modes. The licence of the real data applies.\n\n\
             `manifest.json` has the hash of every file and all settings.\n",
            but_pool = if self.with_pool {
                ", except from the configuration `pool`, which has every image and its distances"
            } else {
                ""
            },
            made = if imported {
                format!("Images to stand for {real}, made elsewhere")
            } else {
                format!("Images made by a diffusion model of {real}")
            },
            selected = match record.arm {
                Arm::Score => "those that robust discriminators find closest to the real ones",
                Arm::Confidence => "those of which a classifier is surest",
                Arm::Rejection => "drawn with the density ratios that robust discriminators give them",
                Arm::Random => "a random part",
                Arm::All => "all that passed the gates",
            },
            origin = if imported {
                format!("**Imported** {}", pool.info.sampler)
            } else {
                format!("**Sampler** {}, seed {}", pool.info.sampler, pool.info.seed)
            },
            arm = record.arm,
            balance = record.balance(),
            labels = if pool.info.conditional {
                "are those the images were made for"
            } else {
                "are a classifier's"
            },
            before = record.score_before,
            after = record.score_after,
        );
        let tags = ["synthetic", "adversarial-robustness"].into_iter();
        Ok(Card {
            pretty_name,
            license: self.license.clone(),
            license_name: (self.license == "other").then(|| "as-the-real-data".into()),
            license_link: None,
            source_datasets: vec!["original".into()],
            tags: tags.chain((!imported).then_some("ddpm")).map(String::from).collect(),
            configs: vec![CardConfig::train(
                "curated",
                "data/train-*",
                features(&division.class_names),
                files,
            )],
            text,
        })
    }
}

/// `builtin:digits` → `digits`, `data/cifar10` → `cifar10`.
fn real_name(source: &str) -> &str {
    source.rsplit(['/', ':']).next().unwrap_or(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_bounded_by_rows_and_by_bytes() {
        let stage = Materialize::default();
        assert_eq!(stage.rows_of_file(100), 131_072);
        assert_eq!(stage.rows_of_file(50_000), 10_000);
        assert_eq!(stage.rows_of_file(1 << 40), 1);
        assert!(Materialize { file_megabytes: 1001, ..stage }.validate().is_err());
    }
}
