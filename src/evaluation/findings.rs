//! The findings for each image, kept as they are made.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{Result, fs::Parts};

/// The findings for some images. Whenever the interval has passed, new findings are written as a part of their own:
/// `key-00000000`, `key-00000001`, …
pub(super) struct Findings<'a> {
    by_row: BTreeMap<usize, Option<Vec<f32>>>,
    kept: Option<(&'a Parts, Duration)>,
    key: String,
    part: usize,
    /// The records for the next part.
    unsaved: Vec<u8>,
    saved: Instant,
}

impl<'a> Findings<'a> {
    /// Reads what was kept under `key` for a data set of `images` images.
    pub(super) fn read(kept: Option<(&'a Parts, Duration)>, key: &str, images: usize) -> Result<Self> {
        let mut findings = Self {
            by_row: BTreeMap::new(),
            kept,
            key: key.to_owned(),
            part: 0,
            unsaved: Vec::new(),
            saved: Instant::now(),
        };
        if let Some((parts, _)) = kept {
            while let Some(bytes) = parts.get(&findings.name())? {
                findings.by_row.extend(decode(&bytes, images).unwrap_or_default());
                findings.part += 1;
            }
        }
        Ok(findings)
    }

    fn name(&self) -> String {
        format!("{}-{:08}", self.key, self.part)
    }

    /// Whether there is a finding for image `row`.
    pub(super) fn has(&self, row: usize) -> bool {
        self.by_row.contains_key(&row)
    }

    /// Records what was found for image `row`.
    pub(super) fn add(&mut self, row: usize, found: Option<&[f32]>) -> Result<()> {
        self.by_row.insert(row, found.map(<[f32]>::to_vec));
        encode(row, found, &mut self.unsaved);
        if self.kept.is_some_and(|(_, interval)| self.saved.elapsed() >= interval) {
            self.save()
        } else {
            Ok(())
        }
    }

    /// Writes what has not been kept yet.
    pub(super) fn save(&mut self) -> Result<()> {
        if let Some((parts, _)) = self.kept
            && !self.unsaved.is_empty()
        {
            parts.put(&self.name(), &self.unsaved)?;
            self.part += 1;
            self.unsaved.clear();
            self.saved = Instant::now();
        }
        Ok(())
    }

    /// What was found for image `row`.
    pub(super) fn take(&mut self, row: usize) -> Option<Vec<f32>> {
        self.by_row.remove(&row).flatten()
    }
}

/// A record in words of four bytes: the image, the number of floats found plus one (0 if nothing was found), and
/// the floats.
fn encode(row: usize, found: Option<&[f32]>, bytes: &mut Vec<u8>) {
    bytes.extend((row as u32).to_le_bytes());
    bytes.extend(found.map_or(0, |found| found.len() as u32 + 1).to_le_bytes());
    bytes.extend(found.unwrap_or_default().iter().flat_map(|v| v.to_le_bytes()));
}

/// The records of a part for a data set of `images` images; `None` if the bytes are not such a part.
fn decode(bytes: &[u8], images: usize) -> Option<Vec<(usize, Option<Vec<f32>>)>> {
    let (mut words, rest) = bytes.as_chunks();
    let mut records = Vec::new();
    while let [row, count, others @ ..] = words {
        let [row, count] = [row, count].map(|word| u32::from_le_bytes(*word) as usize);
        let (floats, others) = others.split_at_checked(count.saturating_sub(1))?;
        let floats = floats.iter().map(|&word| f32::from_le_bytes(word)).collect();
        records.push((row, (count > 0).then_some(floats)));
        words = others;
    }
    let whole = words.is_empty() && rest.is_empty() && records.iter().all(|(row, _)| *row < images);
    whole.then_some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_others_are_no_records() {
        let all =
            [(3, Some(vec![0.5, 1.0])), (0, None), (1, Some(vec![])), (7, Some(vec![f32::MIN_POSITIVE]))];
        let mut bytes = Vec::new();
        all.iter().for_each(|(row, found)| encode(*row, found.as_deref(), &mut bytes));
        assert_eq!(decode(&bytes, 8), Some(all.to_vec()));
        assert_eq!(decode(&bytes, 7), None, "there is no image 7");
        assert_eq!(decode(&bytes[..bytes.len() - 1], 8), None);
        assert_eq!(decode(&[255; 40], 8), None);
        assert_eq!(decode(&[], 8), Some(vec![]));
    }

    #[test]
    fn what_was_kept_is_found_again_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::new(dir.path().to_path_buf());
        let open = |key: &str, interval: Duration| Findings::read(Some((&parts, interval)), key, 9).unwrap();
        let mut at_once = open("a", Duration::ZERO);
        at_once.add(4, Some(&[1.5])).unwrap();
        at_once.add(2, None).unwrap();
        let mut later = open("a", Duration::MAX);
        assert_eq!((later.has(4), later.has(2), later.has(3)), (true, true, false));
        later.add(3, None).unwrap();
        assert!(!open("a", Duration::MAX).has(3));
        later.save().unwrap();
        let mut again = open("a", Duration::MAX);
        assert!(again.has(3) && !open("b", Duration::MAX).has(4));
        assert_eq!((again.take(4), again.take(2)), (Some(vec![1.5]), None));
    }
}
