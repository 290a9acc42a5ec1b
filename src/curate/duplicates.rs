//! Duplicates within a pool: equal pixels, and images that look alike.

use rayon::prelude::*;

/// For each of `hashes`, of which there are fewer than 2³², whether an earlier one is equal. Sorts, with 16 bytes
/// per hash.
pub fn repeated(hashes: &[u64]) -> Vec<bool> {
    let mut sorted: Vec<(u64, u32)> = hashes.iter().copied().zip(0..).collect();
    sorted.par_sort_unstable();
    let mut repeated = vec![false; hashes.len()];
    for pair in sorted.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        repeated[pair[1].1 as usize] = true;
    }
    repeated
}

/// Finds hashes that differ in few bits from one kept earlier, by multi-index hashing (Norouzi et al. 2012).
///
/// Two hashes that differ in at most r bits are equal in at least one of r + 1 pieces of their bits, so only hashes
/// that share a piece are compared.
pub struct NearDuplicates {
    radius: u32,
    /// The hashes kept, by piece and by the piece's value.
    pieces: Vec<Vec<Vec<u64>>>,
}

impl NearDuplicates {
    /// The most bits that may differ: with more, the pieces are so short that each hash shares one with thousands
    /// of others in a large pool.
    pub const MAX_RADIUS: u32 = 3;

    /// Hashes that differ in at most `radius` bits are near-duplicates.
    pub fn new(radius: u32) -> Self {
        assert!(radius <= Self::MAX_RADIUS, "radius is {radius}");
        let pieces =
            (0..=radius).map(|piece| vec![Vec::new(); 1 << Self::bits(radius, piece).len()]).collect();
        Self { radius, pieces }
    }

    /// Whether `hash` is near one kept earlier; if not, it is kept.
    pub fn repeats(&mut self, hash: u64) -> bool {
        let place = |piece: u32| {
            let bits = Self::bits(self.radius, piece);
            (hash >> bits.start & ((1 << bits.len()) - 1)) as usize
        };
        let near = (0..=self.radius).any(|piece| {
            let kept = &self.pieces[piece as usize][place(piece)];
            kept.iter().any(|other| (other ^ hash).count_ones() <= self.radius)
        });
        if !near {
            for piece in 0..=self.radius {
                self.pieces[piece as usize][place(piece)].push(hash);
            }
        }
        near
    }

    /// The bits of a piece, at most 16.
    fn bits(radius: u32, piece: u32) -> std::ops::Range<u32> {
        let pieces = radius + 1;
        let (from, to) = (64 * piece / pieces, 64 * (piece + 1) / pieces);
        from..to.min(from + 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn the_first_of_equals_is_no_duplicate() {
        assert_eq!(repeated(&[3, 1, 3, 2, 1, 3]), [false, false, true, false, true, true]);
        assert_eq!(repeated(&[]), [false; 0]);
    }

    #[test]
    fn near_duplicates_are_those_of_the_plain_search() {
        let mut stream = Stream::new(3, 0, 0);
        let centres: Vec<u64> = (0..40).map(|_| stream.next_u64()).collect();
        let hashes: Vec<u64> = (0..3000)
            .map(|_| {
                let flips = stream.below(12);
                (0..flips).fold(centres[stream.below(40)], |hash, _| hash ^ 1 << stream.below(64))
            })
            .collect();
        for radius in 0..=NearDuplicates::MAX_RADIUS {
            let mut kept: Vec<u64> = Vec::new();
            let mut fast = NearDuplicates::new(radius);
            for &hash in &hashes {
                let near = kept.iter().any(|other| (other ^ hash).count_ones() <= radius);
                if !near {
                    kept.push(hash);
                }
                assert_eq!(fast.repeats(hash), near, "radius {radius}");
            }
        }
    }
}
