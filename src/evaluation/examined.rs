//! A classifier together with the data that it is measured on.

use std::path::Path;

use candle_core::Device;
use serde_json::Value;

use crate::{Result, data, fs, nn::Classifier};

/// A classifier, and the data that it is measured on.
pub(crate) struct Examined<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) classifier: Classifier,
    pub(crate) data: data::Dataset,
}

impl<'a> Examined<'a> {
    /// Reads both. They must fit each other in the size of the images and the number and names of the classes.
    pub(crate) fn load(
        model: Option<&'a Path>,
        source: &data::Source,
        split: data::OfficialSplit,
        part: data::Part,
        max_bad: usize,
        device: &Device,
    ) -> Result<Self> {
        let Some(dir) = model else { bail!(Usage, "model is not set, expected the folder of a classifier") };
        let classifier = Classifier::load(dir, device)?;
        let data = source.load_part(split, part, max_bad)?;
        expect_images(&classifier, dir, source, data.shape)?;
        let (known, named) = (&classifier.config().class_names, &data.class_names);
        let (folder, classes) = (dir.display(), known.len());
        if classes < 2 {
            bail!(Data, "classifier {folder} knows {classes} classes, expected at least 2");
        }
        if classes != named.len() {
            bail!(
                Data,
                "classifier {folder} knows {classes} classes, but {part} of {source} have {}",
                named.len()
            );
        }
        if let Some((i, (known, named))) = known.iter().zip(named).enumerate().find(|(_, (a, b))| a != b) {
            bail!(
                Data,
                "class {i} is '{known}' to classifier {folder}, but '{named}' in {source}; expected the same names in the \
                 same order"
            );
        }
        Ok(Self { dir, classifier, data })
    }

    /// What was read, for the record: the source, its split, the BLAKE3 hash of its files and the rows left out.
    pub(crate) fn data_record(&self, source: &data::Source, split: data::OfficialSplit) -> Result<Value> {
        Ok(serde_json::json!({
            "source": source,
            "split": split,
            "blake3": source.fingerprint(split)?,
            "bad_rows": self.data.bad_rows,
        }))
    }

    /// The BLAKE3 hash of the classifier's weights.
    pub(crate) fn model_blake3(&self) -> Result<String> {
        Ok(fs::hash_file(&self.dir.join("model.safetensors"))?.0)
    }
}

/// Refuses images that the classifier in `dir` does not take. `what` says whose images they are.
pub(crate) fn expect_images(
    classifier: &Classifier,
    dir: &Path,
    what: &dyn std::fmt::Display,
    shape: data::Shape,
) -> Result<()> {
    let taken = classifier.config().architecture.image_shape();
    if taken != (shape.height, shape.width, shape.channels) {
        bail!(
            Data,
            "classifier {} takes {taken:?} images (height, width, channels), but {what} has {shape}",
            dir.display()
        );
    }
    Ok(())
}
