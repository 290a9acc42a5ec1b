//! The layers: each module uses only what is below it.

use std::path::Path;

use crate::run::files;

/// From top to bottom; modules of one row may use one another.
const LAYERS: [&[&str]; 12] = [
    &["cli"],
    &["pipeline"],
    &["stages"],
    &["training", "tables"],
    &["stage"],
    &["settings"],
    &["evaluation"],
    &["objective", "certify", "proxy", "curate"],
    &["diffusion", "attack"],
    &["nn", "data"],
    &["kernels"],
    &["rng", "device", "fs", "error", "progress", "stats", "plot", "text"],
];

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The modules that follow `crate::` in a source text, in `use` trees too.
fn used_modules(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let Some(tree) = rest.strip_prefix('{') else {
            found.push(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
            continue;
        };
        let (mut depth, mut name) = (1, String::new());
        for c in tree.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 1 && (c.is_alphanumeric() || c == '_') {
                name.push(c);
            } else if depth <= 1 && c == ',' || depth == 0 {
                found.push(std::mem::take(&mut name));
            } else if depth == 1 && c == ':' && !name.is_empty() {
                found.push(std::mem::take(&mut name));
                name.push('!'); // what follows the module's name is not a module
            }
            if depth == 0 {
                break;
            }
        }
    }
    found.retain(|name| layer_of(name).is_some());
    found
}

#[test]
fn use_trees_are_read_rightly() {
    let text =
        "use crate::{\n Error, data::{self, table},\n fs,\n nn::Params };\nlet x = crate::rng::uint(1);";
    assert_eq!(used_modules(text), ["data", "fs", "nn", "rng"]);
}

#[test]
fn every_module_uses_only_what_is_below_it() {
    let mut seen = 0;
    for (path, bytes) in files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        let first = path.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
        let (Some(layer), Ok(text)) = (layer_of(&first), String::from_utf8(bytes)) else { continue };
        for used in used_modules(&text) {
            let below = layer_of(&used).unwrap();
            assert!(below >= layer, "{} uses crate::{used}, which is above it", path.display());
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} uses were found: this test reads nothing");
}

#[test]
fn the_feature_cuda_is_asked_about_in_the_device_and_the_kernels_only() {
    for (path, bytes) in files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        let text = String::from_utf8_lossy(&bytes);
        let allowed = path.starts_with("kernels") || path == Path::new("device.rs");
        assert!(allowed || !text.contains("feature = \"cuda\""), "{}", path.display());
    }
}
