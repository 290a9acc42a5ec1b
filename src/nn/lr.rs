//! Learning rates by step.

use std::f64::consts::PI;

/// How the learning rate decays after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LrDecay {
    /// It stays constant.
    Constant,
    /// Half a cosine down to `min` at the last step (Loshchilov & Hutter 2017, Eq. 5, without restarts).
    Cosine {
        /// The final learning rate.
        min: f64,
    },
    /// The rate of PyTorch's `OneCycleLR` without its change of momentum: up along half a cosine from a 25th of the
    /// peak during the warm-up, then down along another to 10⁻⁴ times that start at the last step (Smith & Topin
    /// 2018).
    OneCycle,
}

/// A learning rate for every optimiser step: a warm-up, linear except with [`LrDecay::OneCycle`], then a decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LrSchedule {
    /// The highest learning rate, reached at the end of the warm-up.
    pub peak: f64,
    /// How many steps the warm-up takes; step 0 then has `peak / warmup_steps` (with [`LrDecay::OneCycle`], a 25th
    /// of the peak).
    pub warmup_steps: usize,
    /// The total number of steps, including the warm-up.
    pub total_steps: usize,
    /// What follows the warm-up.
    pub decay: LrDecay,
}

impl LrSchedule {
    /// The learning rate of `step`, counted from 0. From `total_steps` on it keeps its final value.
    pub fn at(&self, step: usize) -> f64 {
        let one_cycle = || {
            let (start, top) = (self.peak / 25.0, self.warmup_steps as f64 - 1.0);
            let (step, last) = (step as f64, self.total_steps as f64 - 1.0);
            let curve =
                |from: f64, to: f64, at: f64| to + 0.5 * (from - to) * (1.0 + (PI * at.min(1.0)).cos());
            if step < top {
                curve(start, self.peak, step / top)
            } else {
                curve(self.peak, start / 1e4, (step - top.max(0.0)) / (last - top.max(0.0)).max(1.0))
            }
        };
        if step < self.warmup_steps && self.decay != LrDecay::OneCycle {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.decay {
            LrDecay::OneCycle => one_cycle(),
            LrDecay::Constant => self.peak,
            LrDecay::Cosine { min } => {
                let span = self.total_steps.saturating_sub(self.warmup_steps).max(1);
                let progress = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
                min + 0.5 * (self.peak - min) * (1.0 + (PI * progress).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_starts_at_the_peak_is_halfway_at_the_midpoint_and_ends_at_the_minimum() {
        let lr = LrSchedule {
            peak: 0.1,
            warmup_steps: 0,
            total_steps: 100,
            decay: LrDecay::Cosine { min: 0.001 },
        };
        assert_eq!(lr.at(0), 0.1);
        assert!((lr.at(50) - 0.0505).abs() < 1e-15);
        assert!((lr.at(100) - 0.001).abs() < 1e-15);
        assert_eq!(lr.at(1_000), lr.at(100));
    }

    #[test]
    fn warm_up_is_linear_and_never_zero() {
        let lr = LrSchedule { peak: 2e-4, warmup_steps: 4, total_steps: 10, decay: LrDecay::Constant };
        let rates: Vec<_> = (0..6).map(|step| lr.at(step) / 2e-4).collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn the_cosine_spans_what_the_warm_up_leaves() {
        let lr =
            LrSchedule { peak: 1.0, warmup_steps: 20, total_steps: 120, decay: LrDecay::Cosine { min: 0.0 } };
        assert!((lr.at(70) - 0.5).abs() < 1e-15);
    }

    /// torch.optim.lr_scheduler.OneCycleLR(max_lr=0.2, total_steps=10, pct_start=0.3) of PyTorch 2.11.
    #[test]
    fn one_cycle_is_pytorchs() {
        let schedule = LrSchedule { peak: 0.2, warmup_steps: 3, total_steps: 10, decay: LrDecay::OneCycle };
        let expected = [
            0.008000000000000007,
            0.10400000000000001,
            0.2,
            0.19009692640269477,
            0.1623491307899526,
            0.12225240438725786,
            0.07774839561274215,
            0.0376516692100474,
            0.009903873597305258,
            8e-07,
        ];
        for (step, expected) in expected.into_iter().enumerate() {
            assert!((schedule.at(step) - expected).abs() < 1e-9, "{step}: {}", schedule.at(step));
        }
    }
}
