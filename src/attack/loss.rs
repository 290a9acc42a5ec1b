//! The losses of gradient attacks, with their gradients with respect to the logits.

use super::search::ranking;

/// Added to the denominators of the DLR losses, as in the authors' code.
const TINY: f32 = 1e-12;

/// The loss that an attack maximises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Cross-entropy.
    CrossEntropy,
    /// The margin of the best wrong class, `max_{i≠y} z_i - z_y`.
    Margin,
    /// The margin divided by the difference of the largest and the third largest logit (Croce & Hein 2020, Eq. 6),
    /// invariant to scaling and shifting the logits. With two classes, where that is undefined, the margin itself.
    Dlr,
    /// The margin of one class, `z_t - z_y`.
    TargetedMargin(usize),
    /// That margin divided by the difference of the largest logit and the mean of the third and fourth largest
    /// (Croce & Hein 2020, Eq. 7). With fewer than four classes, where that is undefined, the margin itself.
    TargetedDlr(usize),
}

impl Loss {
    /// The loss, and its gradient with respect to the logits. `label`: the right class.
    ///
    /// The classes that the DLR losses pick by rank are treated as fixed: the gradient goes through their logits,
    /// not through the order.
    ///
    /// # Panics
    /// If there are fewer than two classes, or if `label` is not one of them.
    pub fn of(self, logits: &[f32], label: usize) -> (f32, Vec<f32>) {
        let class = match self {
            Self::CrossEntropy => return cross_entropy(logits, label),
            Self::Margin | Self::Dlr => best_wrong(logits, label),
            Self::TargetedMargin(class) | Self::TargetedDlr(class) => class,
        };
        // What the margin is divided by, and the classes that it depends on with their weights.
        let (span, parts) = match self {
            Self::Dlr if logits.len() >= 3 => {
                let order = ranking(logits);
                let span = logits[order[0]] - logits[order[2]] + TINY;
                (span, vec![(order[0], 1.0), (order[2], -1.0)])
            }
            Self::TargetedDlr(_) if logits.len() >= 4 => {
                let order = ranking(logits);
                let span = logits[order[0]] - 0.5 * (logits[order[2]] + logits[order[3]]) + TINY;
                (span, vec![(order[0], 1.0), (order[2], -0.5), (order[3], -0.5)])
            }
            _ => (1.0, Vec::new()),
        };
        let loss = (logits[class] - logits[label]) / span;
        let mut gradient = vec![0.0; logits.len()];
        gradient[class] += 1.0 / span;
        gradient[label] -= 1.0 / span;
        for (class, weight) in parts {
            gradient[class] -= weight * loss / span;
        }
        (loss, gradient)
    }
}

fn cross_entropy(logits: &[f32], label: usize) -> (f32, Vec<f32>) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = logits.iter().map(|z| f64::from(z - largest).exp()).collect();
    let total: f64 = exps.iter().sum();
    let mut gradient: Vec<f32> = exps.iter().map(|e| (e / total) as f32).collect();
    // The sum over the other classes, not 1 - p: for a confident prediction that would cancel.
    let others: f64 = (0..exps.len()).filter(|&i| i != label).map(|i| exps[i]).sum();
    gradient[label] = -(others / total) as f32;
    ((total.ln() - f64::from(logits[label] - largest)) as f32, gradient)
}

/// The wrong class with the largest logit.
pub(super) fn best_wrong(logits: &[f32], label: usize) -> usize {
    let wrong = (0..logits.len()).filter(|&i| i != label);
    wrong.reduce(|best, i| if logits[i] > logits[best] { i } else { best }).expect("there are two classes")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.5, -0.25, 3.0, 0.5, 2.25];

    const ALL: [Loss; 5] =
        [Loss::CrossEntropy, Loss::Margin, Loss::Dlr, Loss::TargetedMargin(1), Loss::TargetedDlr(3)];

    #[test]
    fn values_are_the_formulas() {
        // Right class 0; in order 2, 4, 0, 3, 1.
        let total: f32 = LOGITS.iter().map(|z| z.exp()).sum();
        let expected = [
            total.ln() - 1.5,
            3.0 - 1.5,
            (3.0 - 1.5) / (3.0 - 1.5),
            -0.25 - 1.5,
            (0.5 - 1.5) / (3.0 - 0.5 * (1.5 + 0.5)),
        ];
        for (loss, expected) in ALL.into_iter().zip(expected) {
            let (found, _) = loss.of(&LOGITS, 0);
            assert!((found - expected).abs() < 1e-6, "{loss:?}: {found}, expected {expected}");
        }
        // If the right class is first, the margin is that of the second.
        assert!((Loss::Dlr.of(&LOGITS, 2).0 - (2.25 - 3.0) / (3.0 - 1.5)).abs() < 1e-6);
    }

    #[test]
    fn gradients_are_finite_differences_whatever_class_is_right() {
        for loss in ALL {
            for label in [0, 2, 4] {
                let (_, gradient) = loss.of(&LOGITS, label);
                for i in 0..LOGITS.len() {
                    let at = |d: f32| {
                        let mut logits = LOGITS;
                        logits[i] += d;
                        loss.of(&logits, label).0
                    };
                    let difference = (at(0.01) - at(-0.01)) / 0.02;
                    assert!(
                        (gradient[i] - difference).abs() < 2e-3,
                        "{loss:?} of {label} by {i}: {}, expected {difference}",
                        gradient[i]
                    );
                }
            }
        }
    }

    #[test]
    fn the_dlr_losses_do_not_see_scale_and_shift() {
        let moved = LOGITS.map(|z| 30.0 * z - 7.0);
        for loss in [Loss::Dlr, Loss::TargetedDlr(3)] {
            assert!((loss.of(&LOGITS, 0).0 - loss.of(&moved, 0).0).abs() < 1e-5);
        }
    }

    #[test]
    fn a_sure_answer_still_has_a_gradient_of_cross_entropy() {
        let (loss, gradient) = Loss::CrossEntropy.of(&[40.0, 0.0], 0);
        assert!(gradient[0] < 0.0 && gradient[0] > -1e-16 && loss >= 0.0, "{gradient:?}");
    }
}
