//! The stages, one per file, in folders that follow the data: images are made, judged, chosen, learned from and
//! reported on.
//!
//! A new stage is a file in one of the folders, and its name in the folder's list.

pub mod choosing;
pub mod judging;
pub mod learning;
pub mod making;
pub mod telling;

use crate::stage::StageKind;

/// Every stage, in the order in which a run executes them.
pub fn all() -> impl Iterator<Item = &'static StageKind> {
    [making::STAGES, judging::STAGES, choosing::STAGES, learning::STAGES, telling::STAGES]
        .into_iter()
        .flatten()
}

/// The stage with this name, and its place in the order.
pub fn find(name: &str) -> Option<(usize, &'static StageKind)> {
    all().enumerate().find(|(_, kind)| kind.name == name)
}

/// The names of all stages, in order.
pub fn names() -> Vec<&'static str> {
    all().map(|kind| kind.name).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The settings with all their defaults, some of them overridden.
    fn settings(stage: &str, given: &str) -> Value {
        let (_, kind) = find(stage).unwrap();
        (kind.of_table)(stage, &toml::from_str(given).unwrap()).map(|stage| stage.settings()).unwrap()
    }

    #[test]
    fn the_report_is_last_since_a_run_ends_with_it() {
        assert_eq!(names().last(), Some(&"report"));
    }

    #[test]
    fn every_stage_has_defaults_and_what_it_writes_it_reads() {
        for kind in all() {
            let command = (kind.add_flags)(clap::Command::new(kind.name));
            let flags: Vec<_> = command.get_arguments().map(|flag| flag.get_id()).collect();
            let distinct: std::collections::HashSet<_> = flags.iter().collect();
            assert_eq!(distinct.len(), flags.len(), "two flags of {} have one name: {flags:?}", kind.name);

            let stage = (kind.of_table)(kind.name, &toml::Table::new()).unwrap();
            let written = toml::to_string(&stage.settings()).unwrap();
            assert_eq!(settings(kind.name, &written), stage.settings(), "{}", kind.name);
        }
    }

    #[test]
    fn stages_have_their_own_defaults_of_the_groups_that_they_share() {
        let train = settings("train", "");
        let attack = json!({"norm": "linf", "epsilon": "8/255", "steps": 10, "step_ratio": 2.5});
        let objective = json!({"kind": "pgd-at", "attack": attack, "epsilon_warmup_steps": 0, "attack_batch_norm": "eval"});
        assert_eq!(train["objective"], objective);
        assert_eq!(
            train["architecture"],
            json!({"kind": "small-cnn", "channels": [32, 64, 64], "groups": 8})
        );
        let sgd = json!({"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "grad_clip": 5.0});
        assert_eq!(train["optimizer"], sgd);
        assert_eq!(train["schedule"], json!({"kind": "cosine", "warmup_steps": 100, "final_fraction": 0.01}));
        let resnet = &settings("train", "architecture.kind = 'resnet'")["architecture"]["channels"];
        assert_eq!(*resnet, json!([64, 128, 256, 512]));

        let generator = settings("fit-generator", "");
        let adam = json!({"kind": "adam", "learning_rate": 2e-4, "weight_decay": 0.0, "grad_clip": 1.0});
        assert_eq!(generator["optimizer"], adam);
        assert_eq!(generator["schedule"], json!({"kind": "constant", "warmup_steps": 500}));
        let cosine = &settings("fit-generator", "schedule.kind = 'cosine'")["schedule"];
        assert_eq!(*cosine, json!({"kind": "cosine", "warmup_steps": 500, "final_fraction": 0.0}));

        let nets = settings("fit-discriminator", "");
        let attack = json!({"norm": "linf", "epsilons": [0.0, "4/255", "8/255", "16/255"], "steps": 7, "step_ratio": 2.5});
        assert_eq!(nets["attack"], attack);
        assert_eq!(nets["architecture"], json!({"kind": "small-cnn", "channels": [16, 32, 32], "groups": 8}));
        let adam = json!({"kind": "adam", "learning_rate": 1e-3, "weight_decay": 1e-4, "grad_clip": 5.0});
        assert_eq!(nets["optimizer"], adam);
        assert_eq!(nets["schedule"], json!({"kind": "cosine", "final_fraction": 0.05}));

        let arc = json!({"steps": 20, "step_ratio": 2.5, "restarts": 1, "apgd_steps": 50});
        assert_eq!(settings("arc", "")["attack"], arc);
        let pgd = json!({"kind": "pgd", "norm": "linf", "epsilon": "8/255", "steps": 20, "step_ratio": 2.5, "loss": "ce",
            "restarts": 2});
        assert_eq!(settings("evaluate", "")["attack"], pgd);
        assert_eq!(settings("evaluate", "attack.kind = 'none'")["attack"], json!({"kind": "none"}));
        assert_eq!(settings("generate", "")["sampler"], json!({"kind": "model"}));
    }

    #[test]
    fn settings_without_effect_are_not_in_the_fingerprint() {
        let identity = |stage: &str, given: &str| {
            let (_, kind) = find(stage).unwrap();
            (kind.of_table)(stage, &toml::from_str(given).unwrap()).unwrap().identity()
        };
        assert_eq!(identity("train", "gamma = 0.1"), identity("train", ""));
        assert_ne!(identity("train", "gamma = 0.1\ndata = ['x']"), identity("train", "data = ['x']"));
        assert_eq!(identity("train", "epochs = 3\nsteps = 5"), identity("train", "epochs = 3"));
        assert_eq!(identity("curate", "arm = 'all'\nkeep_per_class = 5"), identity("curate", "arm = 'all'"));
        assert_ne!(identity("curate", "keep_per_class = 5"), identity("curate", ""));
        let mode = "mode.kind = 'predict'";
        assert!(!identity("certify", mode).to_string().contains("n0"));
    }
}
