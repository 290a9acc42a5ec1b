//! The streaming selector: the first `k` of each class in one order, by bounded heaps.
//!
//! First pass: every row that passes the gates is offered. Then the k-th key of each class is known, and a
//! second pass tells of each row whether it is kept, without a set of what was kept.

use std::collections::BinaryHeap;

use super::rule::{Arm, Candidate};
use crate::proxy::fold::uid_order;

/// How many of a class are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quota {
    /// This many of each class.
    PerClass(usize),
    /// This share of those of the class that pass the gates, rounded up.
    Fraction(f64),
}

/// The place of a sample in its arm's order; lower comes first. Ties are broken by BLAKE3 of the `uid`.
type Key = (u32, u128);

/// Keeps the first of each class. Memory: one key per kept sample.
pub struct Selector {
    arm: Arm,
    seed: u64,
    limits: Vec<usize>,
    heaps: Vec<BinaryHeap<Key>>,
}

impl Selector {
    /// A selector for classes that have `passing[class]` samples behind the gates.
    pub fn new(arm: Arm, seed: u64, quota: Quota, passing: &[u64]) -> Self {
        let limits: Vec<usize> = passing
            .iter()
            .map(|&n| match (arm, quota) {
                (Arm::All, _) => n as usize,
                (_, Quota::PerClass(k)) => k,
                (_, Quota::Fraction(f)) => (n as f64 * f - 1e-9).ceil() as usize,
            })
            .collect();
        Self::with_limits(arm, seed, limits)
    }

    /// A selector of `limits[class]` samples of each class.
    pub fn with_limits(arm: Arm, seed: u64, limits: Vec<usize>) -> Self {
        let heaps = limits.iter().map(|_| BinaryHeap::new()).collect();
        Self { arm, seed, limits, heaps }
    }

    /// How many of each class are wanted.
    pub fn limits(&self) -> &[usize] {
        &self.limits
    }

    /// First pass: offers a row that passed the gates.
    pub fn offer(&mut self, row: &Candidate) {
        let key = self.key(row);
        let (heap, limit) = (&mut self.heaps[row.label as usize], self.limits[row.label as usize]);
        if heap.len() < limit {
            heap.push(key);
        } else if heap.peek().is_some_and(|last| key < *last) {
            heap.pop();
            heap.push(key);
        }
    }

    /// Second pass: whether a row that passed the gates is kept.
    pub fn keeps(&self, row: &Candidate) -> bool {
        self.heaps[row.label as usize].peek().is_some_and(|last| self.key(row) <= *last)
    }

    fn key(&self, row: &Candidate) -> Key {
        let order = uid_order(row.uid);
        match self.arm {
            Arm::Arc => (ascending(row.synthetic_score), order),
            Arm::Confidence => (!ascending(row.confidence), order),
            Arm::Random => (0, uid_order(&format!("{}/{}", self.seed, row.uid))),
            Arm::All => (0, order),
        }
    }
}

/// Bits that sort like the float: `total_cmp` as an unsigned number.
fn ascending(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn rows(n: usize, classes: usize) -> Vec<(String, u32, f32, f32)> {
        let mut stream = Stream::new(11, 0, 0);
        (0..n)
            .map(|i| {
                // Few distinct scores, so that ties matter.
                let score = stream.below(20) as f32 / 20.0;
                (format!("u{i}"), stream.below(classes) as u32, score, stream.uniform() as f32)
            })
            .collect()
    }

    fn candidate((uid, label, score, confidence): &(String, u32, f32, f32)) -> Candidate<'_> {
        Candidate {
            uid,
            label: *label,
            synthetic_score: *score,
            confidence: *confidence,
            agrees: true,
            train_copy: 0.1,
            test_copy: None,
            memorization_ratio: 0.8,
            duplicate: false,
        }
    }

    fn select(rows: &[(String, u32, f32, f32)], arm: Arm, quota: Quota) -> Vec<String> {
        let mut passing = [0; 4];
        rows.iter().for_each(|r| passing[r.1 as usize] += 1);
        let mut selector = Selector::new(arm, 5, quota, &passing);
        rows.iter().for_each(|r| selector.offer(&candidate(r)));
        rows.iter().filter(|r| selector.keeps(&candidate(r))).map(|r| r.0.clone()).collect()
    }

    #[test]
    fn heaps_agree_with_a_full_sort_in_every_arm() {
        let rows = rows(2000, 4);
        for arm in [Arm::Arc, Arm::Confidence] {
            let mut expected = Vec::new();
            for class in 0..4 {
                let mut members: Vec<_> = rows.iter().filter(|r| r.1 == class).collect();
                members.sort_by(|a, b| {
                    let by_value = if arm == Arm::Arc { a.2.total_cmp(&b.2) } else { b.3.total_cmp(&a.3) };
                    by_value.then(uid_order(&a.0).cmp(&uid_order(&b.0)))
                });
                expected.extend(members.into_iter().take(37).map(|r| r.0.clone()));
            }
            let mut found = select(&rows, arm, Quota::PerClass(37));
            expected.sort();
            found.sort();
            assert_eq!(found, expected, "{arm}");
        }
    }

    #[test]
    fn the_order_of_rows_does_not_matter() {
        let mut rows = rows(500, 4);
        for arm in [Arm::Arc, Arm::Confidence, Arm::Random, Arm::All] {
            let mut forward = select(&rows, arm, Quota::Fraction(0.3));
            rows.reverse();
            let mut backward = select(&rows, arm, Quota::Fraction(0.3));
            rows.reverse();
            forward.sort();
            backward.sort();
            assert_eq!(forward, backward, "{arm}");
        }
    }

    #[test]
    fn all_keeps_all_and_random_differs_by_seed_only_in_which() {
        let rows = rows(400, 4);
        assert_eq!(select(&rows, Arm::All, Quota::PerClass(1)).len(), 400);
        assert_eq!(select(&rows, Arm::Random, Quota::PerClass(10)).len(), 40);
    }

    #[test]
    fn a_quota_over_what_there_is_keeps_what_there_is() {
        let rows = rows(100, 4);
        assert_eq!(select(&rows, Arm::Arc, Quota::PerClass(1000)).len(), 100);
        assert_eq!(select(&rows, Arm::Arc, Quota::PerClass(0)).len(), 0);
    }
}
