//! Counter-based random numbers: noise is a pure function of (seed, sample, step), on every device.
//!
//! The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key is
//! the seed, low word first; the counter is `(sample low, sample high, step, block)`, and block `i` makes elements
//! `4 i .. 4 i + 4`. Images number their elements in CHW order, whatever their layout in memory. There is no state,
//! so any worker can make any sample's noise at any time.
//!
//! # The recipe of a normal, bit for bit
//! Words `(x0, x1)` of a block make elements 0 and 1, `(x2, x3)` elements 2 and 3, by Box and Muller (1958).
//! Every line is one IEEE single-precision operation, rounded to nearest even; `fma` rounds once.
//! ```text
//! u = fma(f32(x0), 2^-32, 2^-33)                         in (0, 1]
//! e = (bits(u) - bits(√½)) >> 23 (signed);  f = float(bits(u) - (e << 23)) - 1;  t = f * f
//! p = Horner with fma over LN                            ln(1 + f) = f - f²/2 + f³ p
//! l = fma(t * f, p, t * -0.5);  l = fma(f32(e), LN2_LOW, l);  l = fma(f32(e), LN2_HIGH, f + l)
//! r = sqrt(l * -2)
//! q = (x1 + 2^29) >> 30 (wrapping);  θ = f32(signed(x1 - (q << 30))) * TURN      in [-π/4, π/4]
//! y = θ * θ;  s = fma(θ * y, Horner over SIN, θ);  c = fma(y * y, Horner over COS, fma(y, -0.5, 1))
//! q odd: swap(s, c);  q in {1, 2}: c = -c;  q in {2, 3}: s = -s
//! elements 0, 1 = r * c, r * s
//! ```

use crate::device::CpuLevel;

/// The `step` words of streams that do not count steps. They are high, because a sampler's steps count up from 0.
///
/// Two draws are independent exactly if their (seed, sample, step) differ, so every use has a constant.
pub mod stream {
    /// The initial noise x_T of a sampler.
    pub const INITIAL: u32 = 0xFFFF_FFFF;
    /// Initial weights; the sample is the number of the tensor.
    pub const INIT: u32 = 0xFFFF_FFFE;
    /// The random start of an attack.
    pub const ATTACK: u32 = 0xFFFF_FFFD;
    /// Crops, flips and other augmentation.
    pub const AUGMENT: u32 = 0xFFFF_FFFC;
    /// The diffusion step of a training image.
    pub const TIMESTEP: u32 = 0xFFFF_FFFB;
    /// The noise of a training image.
    pub const TRAIN_NOISE: u32 = 0xFFFF_FFFA;
    /// The choice of a random subset.
    pub const SUBSET: u32 = 0xFFFF_FFF9;
    /// The order of images in an epoch.
    pub const ORDER: u32 = 0xFFFF_FFF8;
    /// Bootstrap resampling.
    pub const BOOTSTRAP: u32 = 0xFFFF_FFF7;
    /// The noise level of a training image of EDM.
    pub const LEVEL: u32 = 0xFFFF_FFF6;
    /// Whether a training image is shown without its class.
    pub const NULL_CLASS: u32 = 0xFFFF_FFF5;
    /// The dropout of the first block; each further block counts up.
    pub const DROPOUT: u32 = 0xFFFF_0000;
    /// Gaussian augmentation of training images.
    pub const GAUSSIAN: u32 = 0xFFFF_FFF4;
    /// The directions of a hash of features; the sample is the bit.
    pub const DIRECTION: u32 = 0xFFFF_FFF3;
    /// The windows of resized crops.
    pub const CROP: u32 = 0xFFFE_FFFF;
    /// Whether and where a training image shows another.
    pub const CUT_MIX: u32 = 0xFFFE_FFFE;
    /// Which other image that is.
    pub const PARTNER: u32 = 0xFFFE_FFFD;
    /// The first noisy copy of a training image in SmoothAdv; each further copy counts up.
    pub const SMOOTHING: u32 = 0xFFFE_0000;
    /// The keys of a [`super::Permutation`].
    pub const PERMUTATION: u32 = 0xFFFF_FFF2;
}

const PHILOX_MULTIPLIER: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const PHILOX_WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32 with 10 rounds (Salmon et al. 2011, §3.3): the random words of a counter.
#[inline(always)]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let (a, b) = (PHILOX_MULTIPLIER[0] * u64::from(c0), PHILOX_MULTIPLIER[1] * u64::from(c2));
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        k0 = k0.wrapping_add(PHILOX_WEYL[0]);
        k1 = k1.wrapping_add(PHILOX_WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// The position of a draw: all of key and counter except the block.
#[derive(Clone, Copy)]
struct Place {
    key: [u32; 2],
    sample: [u32; 2],
    step: u32,
}

impl Place {
    fn new(seed: u64, sample: u64, step: u32) -> Self {
        Self { key: words(seed), sample: words(sample), step }
    }

    #[inline(always)]
    fn block(self, block: u32) -> [u32; 4] {
        philox4x32([self.sample[0], self.sample[1], self.step, block], self.key)
    }
}

fn words(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// Fills `out` with independent standard normals, the first elements of (seed, sample, step).
///
/// A prefix does not depend on the length, and the bits are the same on every machine: see the
/// [module](self). The error against exact Box-Muller of the same `u` is below 5e-7 of `max(1, |x|)`.
///
/// # Panics
/// If `out` is longer than the 2^34 elements that the counter numbers.
pub fn normals(seed: u64, sample: u64, step: u32, out: &mut [f32]) {
    fill_normals(CpuLevel::get(), Place::new(seed, sample, step), out);
}

fn fill_normals(level: CpuLevel, place: Place, out: &mut [f32]) {
    assert!(out.len() as u64 <= 1 << 34, "{} elements are more than a counter numbers", out.len());
    #[cfg(target_arch = "x86_64")]
    if level >= CpuLevel::Avx2 && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the line above checked both features, the only requirement.
        return unsafe { fill_normals_avx2(place, out) };
    }
    let _ = level;
    fill_normals_with(place, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fill_normals_avx2(place: Place, out: &mut [f32]) {
    fill_normals_with(place, out);
}

/// Number of blocks made together, which fill one AVX2 register.
const LANES: usize = 8;

#[inline(always)]
fn fill_normals_with(place: Place, out: &mut [f32]) {
    for (i, chunk) in out.chunks_mut(4 * LANES).enumerate() {
        let first = (i * LANES) as u32;
        let mut x = [[0u32; LANES]; 4];
        for lane in 0..LANES {
            let words = place.block(first.wrapping_add(lane as u32));
            for (x, word) in x.iter_mut().zip(words) {
                x[lane] = word;
            }
        }
        let mut z = [[0f32; LANES]; 4];
        for pair in [0, 2] {
            for lane in 0..LANES {
                (z[pair][lane], z[pair + 1][lane]) = box_muller(x[pair][lane], x[pair + 1][lane]);
            }
        }
        let mut elements = [0f32; 4 * LANES];
        for (lane, block) in elements.chunks_exact_mut(4).enumerate() {
            block.copy_from_slice(&[z[0][lane], z[1][lane], z[2][lane], z[3][lane]]);
        }
        chunk.copy_from_slice(&elements[..chunk.len()]);
    }
}

const SQRT_HALF_BITS: u32 = 0x3F35_04F3;
/// ln 2 in two parts; the high part has so few bits that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_145_75;
const LN2_LOW: f32 = 1.428_606_8e-6;
/// 2π / 2^32.
const TURN: f32 = 1.462_918_1e-9;
// Minimax polynomials for relative error (Remez exchange in double precision, then rounded), highest power
// first: (ln(1 + f) - f + f²/2) / f³ on [√½ - 1, √2 - 1], (sin θ - θ) / θ³ and (cos θ - 1 + θ²/2) / θ⁴ in θ²
// on [0, (π/4)²]. Their own errors are 6e-9, 4e-9 and 1e-10.
const LN: [f32; 8] = [
    -0.076_344_99,
    0.127_615_78,
    -0.131_601_83,
    0.142_017_57,
    -0.166_233_57,
    0.200_012_27,
    -0.250_008_2,
    0.333_333_3,
];
const SIN: [f32; 3] = [-1.951_528_2e-4, 8.332_16e-3, -0.166_666_55];
const COS: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 0.041_666_646];

#[inline(always)]
fn horner<const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    let mut sum = coefficients[0];
    for c in &coefficients[1..] {
        sum = sum.mul_add(x, *c);
    }
    sum
}

/// The `u` of a radius, in (0, 1].
#[inline(always)]
fn radius_uniform(x: u32) -> f32 {
    (x as f32).mul_add(1.0 / 4_294_967_296.0, 1.0 / 8_589_934_592.0)
}

#[inline(always)]
fn box_muller(x_radius: u32, x_angle: u32) -> (f32, f32) {
    let bits = radius_uniform(x_radius).to_bits();
    let e = bits.wrapping_sub(SQRT_HALF_BITS) as i32 >> 23;
    let f = f32::from_bits(bits.wrapping_sub((e << 23) as u32)) - 1.0;
    let e = e as f32;
    let t = f * f;
    let ln = (t * f).mul_add(horner(LN, f), t * -0.5);
    let ln = e.mul_add(LN2_LOW, ln);
    let ln = e.mul_add(LN2_HIGH, f + ln);
    let radius = (ln * -2.0).sqrt();

    let quadrant = x_angle.wrapping_add(1 << 29) >> 30;
    let theta = x_angle.wrapping_sub(quadrant << 30) as i32 as f32 * TURN;
    let y = theta * theta;
    let sin = (theta * y).mul_add(horner(SIN, y), theta);
    let cos = (y * y).mul_add(horner(COS, y), y.mul_add(-0.5, 1.0));
    let (sin, cos) = if quadrant & 1 == 1 { (cos, sin) } else { (sin, cos) };
    let cos = f32::from_bits(cos.to_bits() ^ ((quadrant + 1) & 2) << 30);
    let sin = f32::from_bits(sin.to_bits() ^ (quadrant & 2) << 30);
    (radius * cos, radius * sin)
}

/// Fills `out` with independent uniforms in [0, 1), multiples of 2^-24: the top bits of one word each.
///
/// # Panics
/// If `out` is longer than the 2^34 elements that the counter numbers.
pub fn uniforms(seed: u64, sample: u64, step: u32, out: &mut [f32]) {
    assert!(out.len() as u64 <= 1 << 34, "{} elements are more than a counter numbers", out.len());
    let place = Place::new(seed, sample, step);
    for (block, chunk) in out.chunks_mut(4).enumerate() {
        for (out, word) in chunk.iter_mut().zip(place.block(block as u32)) {
            *out = (word >> 8) as f32 * (1.0 / 16_777_216.0);
        }
    }
}

/// 64 uniform bits: the first two words of (seed, sample, step), low word first.
pub fn uint(seed: u64, sample: u64, step: u32) -> u64 {
    let [low, high, ..] = Place::new(seed, sample, step).block(0);
    u64::from(high) << 32 | u64::from(low)
}

/// A keyed permutation of `0..len` that takes no memory: a Feistel network on philox, walked until it lands
/// inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
#[derive(Clone, Debug)]
pub struct Permutation {
    key: [u32; 2],
    len: u64,
    half_bits: u32,
}

impl Permutation {
    /// Luby and Rackoff prove that three suffice for random round functions; more make up for the small halves of
    /// short lengths.
    const ROUNDS: u32 = 8;

    /// The permutation of `0..len` with this key; `tweak` is for instance the epoch.
    pub fn new(seed: u64, tweak: u64, len: u64) -> Self {
        let [k0, k1, ..] = Place::new(seed, tweak, stream::PERMUTATION).block(0);
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { key: [k0, k1], len, half_bits: bits.div_ceil(2).max(1) }
    }

    /// The image of `i`.
    ///
    /// # Panics
    /// If `i` is not in `0..len`.
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.len, "position {i} of a permutation of {}", self.len);
        let mut i = self.encrypt(i);
        while i >= self.len {
            i = self.encrypt(i);
        }
        i
    }

    fn encrypt(&self, i: u64) -> u64 {
        let mask = ((1u64 << self.half_bits) - 1) as u32;
        let (mut left, mut right) = ((i >> self.half_bits) as u32, i as u32 & mask);
        for round in 0..Self::ROUNDS {
            let [word, ..] = philox4x32([right, round, 0, 0], self.key);
            (left, right) = (right, left ^ (word & mask));
        }
        u64::from(left) << self.half_bits | u64::from(right)
    }
}

/// A sequence of random numbers from one position, for loops that draw an unknown number of them: resampling,
/// shuffling. Repeats after 2^34 words.
#[derive(Clone)]
pub struct Stream {
    place: Place,
    next: u32,
    words: [u32; 4],
    left: usize,
}

impl Stream {
    /// The stream of (seed, sample, step).
    pub fn new(seed: u64, sample: u64, step: u32) -> Self {
        Self { place: Place::new(seed, sample, step), next: 0, words: [0; 4], left: 0 }
    }

    /// 32 uniform bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.left == 0 {
            self.words = self.place.block(self.next);
            self.next = self.next.wrapping_add(1);
            self.left = 4;
        }
        self.left -= 1;
        self.words[3 - self.left]
    }

    /// 64 uniform bits, low word first.
    pub fn next_u64(&mut self) -> u64 {
        let low = u64::from(self.next_u32());
        u64::from(self.next_u32()) << 32 | low
    }

    /// A uniform in [0, 1), a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// A uniform integer in `0..n`, exactly: draws that would favour some values are rejected (Lemire 2019).
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "a number below 0 was asked for");
        let n = n as u64;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= n.wrapping_neg() % n {
                return (product >> 64) as usize;
            }
        }
    }
}

/// `n` of `len` indices, drawn in a keyed order and returned in ascending order.
pub fn some_of(len: usize, n: usize, seed: u64) -> Vec<usize> {
    let mut chosen = spread(len, n, seed);
    chosen.sort_unstable();
    chosen
}

/// `n` of `len` indices, in a keyed order.
pub fn spread(len: usize, n: usize, seed: u64) -> Vec<usize> {
    let order = Permutation::new(seed, u64::from(stream::SUBSET), len as u64);
    (0..n).map(|i| order.at(i as u64) as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of Random123 1.09, philox4x32-10.
    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]),
            (
                [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
                [0xA409_3822, 0x299F_31D0],
                [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    fn many_normals() -> Vec<f32> {
        let mut out = vec![0.0; 1 << 20];
        normals(7, 3, 11, &mut out);
        out
    }

    #[test]
    fn normals_have_the_moments_of_a_standard_normal() {
        let x = many_normals();
        let moment = |k: i32| x.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / x.len() as f64;
        // Five standard errors: the variance of x^k is E x^2k - (E x^k)².
        for (k, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let bound = 5.0 * f64::sqrt(variance / x.len() as f64);
            assert!((moment(k) - expected).abs() < bound, "moment {k} is {}", moment(k));
        }
        let products = x.chunks_exact(2).map(|p| f64::from(p[0] * p[1])).sum::<f64>() / (x.len() / 2) as f64;
        assert!(products.abs() < 5.0 / f64::sqrt((x.len() / 2) as f64), "pairs correlate: {products}");
    }

    #[test]
    fn normals_pass_a_kolmogorov_smirnov_test() {
        use statrs::distribution::{ContinuousCDF, Normal};
        let mut x = many_normals();
        x.sort_by(f32::total_cmp);
        let normal = Normal::new(0.0, 1.0).unwrap();
        let n = x.len() as f64;
        let distance =
            x.iter().enumerate().map(|(i, &v)| (normal.cdf(f64::from(v)) - (i as f64 + 0.5) / n).abs());
        // The 0.1 % point of the Kolmogorov distribution.
        assert!(distance.fold(0.0, f64::max) < 1.95 / n.sqrt());
    }

    #[test]
    fn normals_are_box_muller_to_5e_7() {
        let corners = [0, 1, 1 << 29, (1 << 29) - 1, 1 << 30, 3 << 29, 1 << 31, u32::MAX - 1, u32::MAX];
        let mut stream = Stream::new(1, 2, 3);
        let mut random: Vec<u32> = (0..2000).map(|_| stream.next_u32()).collect();
        random.extend(corners);
        for (i, &x0) in random.iter().enumerate() {
            let x1 = random[(i * 7 + 5) % random.len()];
            let radius = (-2.0 * f64::from(radius_uniform(x0)).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * f64::from(x1) / 4_294_967_296.0).sin_cos();
            let (z0, z1) = box_muller(x0, x1);
            for (z, expected) in [(z0, radius * cos), (z1, radius * sin)] {
                let error = (f64::from(z) - expected).abs() / expected.abs().max(1.0);
                assert!(error < 5e-7, "({x0:#x}, {x1:#x}): {z}, expected {expected}");
            }
        }
    }

    #[test]
    fn both_paths_give_the_same_bits() {
        for len in [1, 4, 31, 33, 3072] {
            let place = Place::new(0xDEAD_BEEF_0BAD_F00D, 1 << 40, stream::INITIAL);
            let (mut wide, mut plain) = (vec![0.0; len], vec![0.0; len]);
            fill_normals(CpuLevel::Avx2, place, &mut wide);
            fill_normals(CpuLevel::Portable, place, &mut plain);
            let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&wide), bits(&plain));
        }
    }

    /// From an emulation of the recipe in exact rational arithmetic (Python's `fractions`), rounded at each line.
    #[test]
    fn normals_keep_their_bits() {
        let golden: [(u64, u64, u32, [u32; 8]); 3] = [
            (
                0,
                0,
                0,
                [
                    0x3F7D_BB31,
                    0xBF6C_B6B0,
                    0xBF1E_1B9F,
                    0xBEF6_D1B2,
                    0x3FD3_59CB,
                    0x3F58_7C3B,
                    0xBDD1_1910,
                    0xBDEC_D29A,
                ],
            ),
            (
                1,
                2,
                3,
                [
                    0xBE17_88FC,
                    0x3EA5_D4B5,
                    0xBF02_9277,
                    0xC000_EEDC,
                    0xBD9E_9EF9,
                    0x4005_9D61,
                    0xBFAF_7DE7,
                    0x3D57_385E,
                ],
            ),
            (
                0x0123_4567_89AB_CDEF,
                5_000_000_000,
                u32::MAX,
                [
                    0x3F7F_6018,
                    0x3D44_50B6,
                    0x3F9F_CB4C,
                    0xBF4B_9DD6,
                    0xBF72_F5EF,
                    0xBD1A_FE94,
                    0x3FA1_60B4,
                    0x3EB2_8E80,
                ],
            ),
        ];
        for (seed, sample, step, bits) in golden {
            let mut out = [0.0; 8];
            normals(seed, sample, step, &mut out);
            assert_eq!(out.map(f32::to_bits), bits, "({seed}, {sample}, {step})");
        }
    }

    #[test]
    fn a_prefix_does_not_depend_on_the_length() {
        let (mut long, mut short) = (vec![0.0; 101], vec![0.0; 6]);
        normals(5, 6, 7, &mut long);
        normals(5, 6, 7, &mut short);
        assert_eq!(long[..6], short);
        uniforms(5, 6, 7, &mut long);
        uniforms(5, 6, 7, &mut short);
        assert_eq!(long[..6], short);
    }

    #[test]
    fn uniforms_fill_0_to_1_evenly() {
        let mut x = vec![0.0; 1 << 18];
        uniforms(1, 2, 3, &mut x);
        assert!(x.iter().all(|v| (0.0..1.0).contains(v)));
        let mut counts = [0u32; 16];
        for v in &x {
            counts[(v * 16.0) as usize] += 1;
        }
        let expected = x.len() as f64 / 16.0;
        let chi2: f64 = counts.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
        assert!(chi2 < 37.7, "chi² {chi2}"); // 0.1 % point at 15 degrees of freedom
    }

    #[test]
    fn seed_sample_and_step_each_change_the_draw() {
        let draws = [
            uint(1, 2, 3),
            uint(2, 2, 3),
            uint(1, 3, 3),
            uint(1, 2, 4),
            uint(1 << 32, 2, 3),
            uint(1, 2 << 32, 3),
        ];
        for (i, a) in draws.iter().enumerate() {
            assert!(draws[..i].iter().all(|b| a != b));
        }
    }

    #[test]
    fn a_permutation_is_a_bijection_that_depends_on_seed_and_tweak() {
        for len in [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000] {
            let permutation = Permutation::new(9, 1, len);
            let mut image: Vec<u64> = (0..len).map(|i| permutation.at(i)).collect();
            image.sort_unstable();
            assert!(image.into_iter().eq(0..len), "length {len}");
        }
        let order = |seed, tweak| {
            let p = Permutation::new(seed, tweak, 1000);
            (0..1000).map(|i| p.at(i)).collect::<Vec<_>>()
        };
        assert_eq!(order(9, 1), order(9, 1));
        assert_ne!(order(9, 1), order(9, 2));
        assert_ne!(order(9, 1), order(8, 1));
        assert!(Permutation::new(1, 1, u64::MAX).at(12) < u64::MAX);
    }

    #[test]
    fn all_orders_of_three_are_about_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for tweak in 0..6000 {
            let p = Permutation::new(4, tweak, 3);
            *counts.entry([p.at(0), p.at(1), p.at(2)]).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|c| (850..1150).contains(c)), "{counts:?}");
    }

    #[test]
    fn a_stream_counts_words_and_draws_below_without_bias() {
        let mut stream = Stream::new(1, 2, 3);
        let words: Vec<u32> = (0..8).map(|_| stream.next_u32()).collect();
        let place = Place::new(1, 2, 3);
        assert_eq!(words, [place.block(0), place.block(1)].concat());
        assert_eq!(uint(1, 2, 3), u64::from(words[1]) << 32 | u64::from(words[0]));
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7)] += 1;
        }
        let chi2: f64 = counts.iter().map(|&c| (f64::from(c) - 1e4).powi(2) / 1e4).sum();
        assert!(chi2 < 22.5, "{counts:?}"); // 0.1 % point at 6 degrees of freedom
        assert!((0..1000).all(|_| (0.0..1.0).contains(&stream.uniform())));
    }
}
