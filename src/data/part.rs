//! Which images of a split are used.

use std::{collections::BTreeMap, fmt};

use crate::rng::{Permutation, stream};

/// The images of a split that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of them.
    All,
    /// This many from the first on.
    First(usize),
    /// This many, drawn evenly over the classes.
    Drawn(usize),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all images"),
            Self::First(n) => write!(f, "the first {n} images"),
            Self::Drawn(n) => write!(f, "{n} images drawn evenly over the classes"),
        }
    }
}

/// `n` of the rows with these labels, ascending; all of them if there are not more.
///
/// The rows of each label have a keyed order, and the draw takes the first of each label, then the second of each, and so
/// on: the counts of two labels differ by at most 1, unless one has no more rows. It depends on the order of the rows
/// within each label, not on that of the labels in the file; `n` rows are among the `n + 1` that would be drawn.
pub(super) fn drawn<L: Ord>(labels: &[L], n: usize) -> Vec<usize> {
    let mut classes: BTreeMap<&L, Vec<usize>> = BTreeMap::new();
    for (row, label) in labels.iter().enumerate() {
        classes.entry(label).or_default().push(row);
    }
    let mut turns = Vec::with_capacity(labels.len());
    for (class, rows) in classes.values().enumerate() {
        let tweak = (u64::from(stream::SUBSET) << 32) | class as u64;
        let order = Permutation::new(0, tweak, rows.len() as u64);
        turns.extend((0..rows.len()).map(|turn| (turn, class, rows[order.at(turn as u64) as usize])));
    }
    turns.sort_unstable();
    let mut chosen: Vec<usize> = turns.into_iter().take(n).map(|(.., row)| row).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Dataset, Shape};

    #[test]
    fn a_draw_is_even_over_the_labels_until_one_has_no_more_rows() {
        let labels: Vec<u32> = (0..100).map(|i| if i < 3 { 0 } else { 1 + i % 2 }).collect();
        for (n, counts) in
            [(2, [1, 1, 0]), (9, [3, 3, 3]), (10, [3, 4, 3]), (61, [3, 29, 29]), (1000, [3, 48, 49])]
        {
            let rows = drawn(&labels, n);
            let count = |label| rows.iter().filter(|&&row| labels[row] == label).count();
            assert_eq!([0, 1, 2].map(count), counts, "{n}");
            assert!(rows.is_sorted());
        }
        assert_eq!(drawn(&labels, 100), (0..100).collect::<Vec<_>>());
        assert!(drawn(&labels, 20).iter().all(|row| drawn(&labels, 21).contains(row)));
        assert_ne!(drawn(&[0; 100], 10), (0..10).collect::<Vec<_>>(), "not the first ones");
    }

    /// What a file holds is drawn alike, sorted by class or not.
    #[test]
    fn a_draw_does_not_depend_on_how_the_classes_are_interleaved() {
        let mixed: Vec<(u32, usize)> = (0..60).map(|i| ((i * 7 % 3) as u32, i)).collect();
        let mut sorted = mixed.clone();
        sorted.sort();
        let images = |rows: &[(u32, usize)]| {
            let labels: Vec<u32> = rows.iter().map(|(label, _)| *label).collect();
            let mut images: Vec<usize> = drawn(&labels, 13).into_iter().map(|row| rows[row].1).collect();
            images.sort_unstable();
            images
        };
        assert_eq!(images(&mixed), images(&sorted));
    }

    #[test]
    fn classes_without_an_image_are_named() {
        let shape = Shape { height: 1, width: 1, channels: 1 };
        let mut data = Dataset::empty(shape, (0..12).map(|class| class.to_string()).collect());
        data.push(&[0], 3);
        assert_eq!(data.left_out(Part::All), None);
        let said = data.left_out(Part::First(1)).unwrap();
        assert!(
            said.starts_with("the first 1 images have none of 11 of the 12 classes: '0', '1', '2', '4'"),
            "{said}"
        );
        assert!(said.ends_with("'10', …"), "{said}");
        (0..12).for_each(|class| data.push(&[0], class));
        assert_eq!(data.left_out(Part::First(13)), None);
    }
}
