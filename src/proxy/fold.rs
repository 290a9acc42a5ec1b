//! The pool's folds: what each synthetic image may be used for, decided by its `uid` alone.

/// The role of a pool image for the discriminators of the other folds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldOut {
    /// Stops and calibrates them.
    Stop,
    /// Measures them: they have not seen it in any way before.
    Measure,
}

/// The fold of a pool image, `0..folds`. Discriminators of fold `f` are trained on the images of fold `f`.
pub fn fold_of(uid: &str, folds: usize) -> usize {
    (uid_bits(uid, 0) % folds as u64) as usize
}

/// Whether a pool image that is held out from a fold's training is for stopping or measuring: one in five is for
/// stopping.
pub fn held_out(uid: &str) -> HeldOut {
    if uid_bits(uid, 1).is_multiple_of(5) { HeldOut::Stop } else { HeldOut::Measure }
}

/// Whether a pool image is in a sample of this share of the pool, independently of its fold, its role and its
/// order.
pub fn in_sample(uid: &str, share: f64) -> bool {
    let word = u64::from_be_bytes(first(blake3::hash(format!("sample/{uid}").as_bytes()).as_bytes(), 0));
    (word as f64) < share * 2f64.powi(64)
}

/// The order that breaks ties everywhere: the first 16 bytes of the BLAKE3 hash of the `uid`, big-endian.
pub fn uid_order(uid: &str) -> u128 {
    u128::from_be_bytes(first(blake3::hash(uid.as_bytes()).as_bytes(), 0))
}

fn uid_bits(uid: &str, word: usize) -> u64 {
    u64::from_be_bytes(first(blake3::hash(uid.as_bytes()).as_bytes(), 16 + 8 * word))
}

fn first<const N: usize>(bytes: &[u8; 32], from: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[from + i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_are_even_and_independent_of_the_held_out_role() {
        let mut counts = [[0u32; 2]; 3];
        for i in 0..30_000 {
            let uid = format!("g-{i}");
            counts[fold_of(&uid, 3)][usize::from(held_out(&uid) == HeldOut::Stop)] += 1;
        }
        let sampled = (0..30_000).filter(|i| in_sample(&format!("g-{i}"), 0.1)).count();
        assert!((2800..3200).contains(&sampled), "{sampled}");
        assert!(in_sample("g-1", 1.0) && in_sample("g-2", 7.0) && !in_sample("g-1", 0.0));
        for [measure, stop] in counts {
            assert!((f64::from(measure) - 8000.0).abs() < 300.0, "{counts:?}");
            assert!((f64::from(stop) - 2000.0).abs() < 200.0, "{counts:?}");
        }
    }
}
