//! The selector, which takes the first samples of each group in a given order.

use crate::Result;

/// Samples that compete for places: those of a class, or all.
#[derive(Clone, Debug)]
pub struct Group {
    /// Their places in the pool.
    pub rows: Vec<u32>,
    /// The largest number that is kept.
    pub limit: usize,
}

/// Which of `pool` rows are kept: in each group, the `limit` rows with the lowest `ranks`, with equal ones in the
/// order of `ties`.
///
/// `ties(rows)` gives a number for each of the given rows. It is called at most once, for the rows that share a
/// group's last kept rank where not all of them can be kept. Takes O(rows) time and, besides the groups, 1 byte per
/// row and 36 for each of those rows.
pub fn keep_first(
    groups: Vec<Group>,
    ranks: &[u32],
    ties: impl FnOnce(&[u32]) -> Result<Vec<u128>>,
) -> Result<Vec<bool>> {
    let mut kept = vec![false; ranks.len()];
    let (mut tied, mut places): (Vec<u32>, Vec<(usize, usize)>) = Default::default();
    for Group { mut rows, limit } in groups {
        if limit == 0 || rows.is_empty() {
            continue;
        }
        let limit = limit.min(rows.len());
        let rank = |row: u32| ranks[row as usize];
        let last = rank(*rows.select_nth_unstable_by_key(limit - 1, |&row| rank(row)).1);
        let (mut before, first_tied) = (0, tied.len());
        for row in rows {
            if rank(row) < last {
                kept[row as usize] = true;
                before += 1;
            } else if rank(row) == last {
                tied.push(row);
            }
        }
        if tied.len() - first_tied == limit - before {
            tied.drain(first_tied..).for_each(|row| kept[row as usize] = true);
        } else {
            places.push((tied.len() - first_tied, limit - before));
        }
    }
    if !tied.is_empty() {
        let order = ties(&tied)?;
        let mut equals: Vec<(u128, u32)> = order.into_iter().zip(tied).collect();
        let mut rest = equals.as_mut_slice();
        for (members, places) in places {
            let (group, others) = rest.split_at_mut(members);
            group.select_nth_unstable(places);
            group[..places].iter().for_each(|&(_, row)| kept[row as usize] = true);
            rest = others;
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn order(row: u32) -> u128 {
        crate::proxy::fold::uid_order(&format!("u{row}"))
    }

    fn classes(n: u32, limit: usize) -> Vec<Group> {
        (0..4).map(|class| Group { rows: (0..n).filter(|row| row % 4 == class).collect(), limit }).collect()
    }

    #[test]
    fn what_is_kept_is_the_head_of_a_full_sort() {
        for (n, levels, limit) in
            [(2000, 20, 37), (2000, 1, 37), (2000, 100_000, 37), (40, 3, 10), (40, 3, 11)]
        {
            let mut stream = Stream::new(11, levels as u64, 0);
            let ranks: Vec<u32> = (0..n).map(|_| stream.below(levels) as u32).collect();
            let groups = classes(n, limit);
            let mut expected = vec![false; ranks.len()];
            for group in &groups {
                let mut sorted = group.rows.clone();
                sorted.sort_by_key(|&row| (ranks[row as usize], order(row)));
                sorted.iter().take(limit).for_each(|&row| expected[row as usize] = true);
            }
            let ties = |rows: &[u32]| Ok(rows.iter().map(|&row| order(row)).collect());
            assert_eq!(keep_first(groups, &ranks, ties).unwrap(), expected, "{n} {levels} {limit}");
        }
    }

    #[test]
    fn no_uid_is_asked_for_unless_equals_must_be_told_apart() {
        let never = |_: &[u32]| -> Result<Vec<u128>> { panic!("asked") };
        let distinct: Vec<u32> = (0..100).collect();
        assert_eq!(
            keep_first(classes(100, 10), &distinct, never).unwrap().iter().filter(|k| **k).count(),
            40
        );
        assert!(keep_first(classes(100, 25), &[7; 100], never).unwrap().iter().all(|k| *k));
        assert!(keep_first(classes(100, usize::MAX), &[7; 100], never).unwrap().iter().all(|k| *k));
        assert!(!keep_first(classes(100, 0), &[7; 100], never).unwrap().iter().any(|k| *k));
    }
}
