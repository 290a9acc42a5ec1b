//! The layers: which module imports which. The list of layers is that in ARCHITECTURE.md.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use crate::run::files;

/// A module by its path, such as `["attack", "pgd"]`; the crate's root is empty.
type Module = Vec<String>;
/// A name with its path as it stands in a source text.
type Name = Vec<String>;

/// The rows of the first code block after "## Layers", from top to bottom.
fn layers() -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let block = text.split("## Layers").nth(1).unwrap().split("```").nth(1).unwrap();
    let rows = block.lines().filter(|line| !line.trim().is_empty());
    rows.map(|row| row.split('|').map(|module| module.trim().to_owned()).collect()).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The code compiled outside tests, without comments.
fn code(text: &str) -> String {
    let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..tests].lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The names of a `use` tree: `a::{b, c::D}` is `a::b` and `a::c::D`.
fn names(tree: &str) -> Vec<Name> {
    let tree = tree.trim();
    let path =
        |text: &str| text.split("::").map(|part| part.trim().to_owned()).filter(|p| !p.is_empty()).collect();
    let Some((before, inner)) = tree.split_once('{') else {
        return vec![path(tree.split(" as ").next().unwrap())];
    };
    let inner = inner.strip_suffix('}').unwrap_or(inner);
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in inner.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if c == ',' && depth == 0 {
            parts.push(String::new());
        } else {
            parts.last_mut().unwrap().push(c);
        }
    }
    let before: Name = path(before);
    let of = |part: &String| names(part).into_iter().map(|name| [before.clone(), name].concat());
    parts.iter().filter(|part| !part.trim().is_empty()).flat_map(of).collect()
}

/// All modules with their code, and what they export under names of their own.
struct Source {
    code: BTreeMap<Module, String>,
    exports: BTreeMap<Module, BTreeMap<String, Module>>,
}

impl Source {
    fn read() -> Self {
        let of = |(path, bytes): (std::path::PathBuf, Vec<u8>)| -> Option<(Module, String)> {
            let mut module: Module =
                path.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
            let rust = path.extension().is_some_and(|e| e == "rs");
            if !rust || module == ["lib"] || module == ["main"] {
                return None;
            }
            module.pop_if(|last| last == "mod");
            Some((module, code(&String::from_utf8(bytes).unwrap())))
        };
        let code = files(&root().join("src")).into_iter().filter_map(of).collect();
        let mut source = Self { code, exports: BTreeMap::new() };
        for (module, text) in &source.code {
            let mut own = BTreeMap::new();
            for (public, tree) in uses(text).into_iter().filter(|(public, _)| *public) {
                assert!(public);
                for name in names(&tree) {
                    if let Some((found, _)) =
                        source.resolve(module, &name).filter(|(m, _)| m.starts_with(module))
                    {
                        own.insert(name.last().unwrap().clone(), found);
                    }
                }
            }
            source.exports.insert(module.clone(), own);
        }
        source
    }

    /// The module that a name leads into, and the rest of the name there; `None` for other crates.
    fn resolve(&self, from: &Module, name: &Name) -> Option<(Module, Name)> {
        let mut rest = name.as_slice();
        let mut at = match rest.first()?.as_str() {
            "crate" => Vec::new(),
            "self" | "super" => from.clone(),
            child if self.code.contains_key(&[from.clone(), vec![child.into()]].concat()) => from.clone(),
            _ => return None,
        };
        while let Some((first, more)) = rest.split_first() {
            match first.as_str() {
                "crate" | "self" => {}
                "super" => drop(at.pop()),
                child => {
                    let deeper = [at.clone(), vec![child.into()]].concat();
                    if !self.code.contains_key(&deeper) {
                        break;
                    }
                    at = deeper;
                }
            }
            rest = more;
        }
        Some((at, rest.to_vec()))
    }

    /// The module that a name is defined in: what a module re-exports from a child counts as the child's.
    fn home(&self, from: &Module, name: &Name) -> Option<Module> {
        let (mut at, rest) = self.resolve(from, name)?;
        while let Some(deeper) = rest.first().and_then(|name| self.exports.get(&at)?.get(name)) {
            at.clone_from(deeper);
        }
        Some(at)
    }

    /// Which modules each one imports, `super::` and paths in the code included. Re-exports from its own children
    /// are not imports.
    fn imports(&self) -> BTreeMap<Module, BTreeSet<Module>> {
        let of = |(module, text): (&Module, &String)| {
            let trees = uses(text).into_iter().filter(|(public, _)| !public);
            let used = trees.flat_map(|(_, tree)| names(&tree));
            let children =
                self.code.keys().filter(|child| child.len() == module.len() + 1 && child.starts_with(module));
            let children: Vec<&str> = children.map(|child| child[module.len()].as_str()).collect();
            let found = used.chain(paths(text, &children)).filter_map(|name| self.home(module, &name));
            (module.clone(), found.filter(|home| home != module && !home.is_empty()).collect())
        };
        self.code.iter().map(of).collect()
    }
}

/// Where the `use` trees of a text are, and whether they export.
fn use_spans(text: &str) -> Vec<(bool, std::ops::Range<usize>)> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("use ") {
        let line = text[..at].rsplit('\n').next().unwrap().trim();
        if line.is_empty() || line.starts_with("pub") {
            let start = at + "use ".len();
            found.push((!line.is_empty(), start..start + text[start..].find(';').unwrap()));
        }
    }
    found
}

/// The `use` trees of a text, and whether they export.
fn uses(text: &str) -> Vec<(bool, String)> {
    use_spans(text).into_iter().map(|(exports, span)| (exports, text[span].to_owned())).collect()
}

/// The paths from `crate`, `super`, `self` and child modules that stand in the code outside of `use`.
fn paths(text: &str, children: &[&str]) -> Vec<Name> {
    let mut found = Vec::new();
    let spans = use_spans(text);
    let is_used = |at: usize| spans.iter().any(|(_, span)| span.contains(&at));
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    for start in ["crate", "super", "self"].iter().chain(children) {
        for (at, _) in text.match_indices(&format!("{start}::")) {
            if is_used(at) || text[..at].ends_with(|c| is_word(c) || c == ':') {
                continue;
            }
            let path: String = text[at..].chars().take_while(|&c| is_word(c) || c == ':').collect();
            found.push(path.split("::").filter(|p| !p.is_empty()).map(str::to_owned).collect());
        }
    }
    found
}

#[test]
fn use_trees_and_paths_are_read_rightly() {
    let text = "use crate::{\n Error, data::{self, table},\n nn::Params };\nlet x = crate::rng::uint(1);\npub use self::a::B;";
    let read = uses(text);
    assert_eq!((read.len(), read[0].0, read[1].0), (2, false, true));
    let joined: Vec<String> = names(&read[0].1).iter().map(|name| name.join("::")).collect();
    assert_eq!(joined, ["crate::Error", "crate::data::self", "crate::data::table", "crate::nn::Params"]);
    assert!(paths(text, &[]).contains(&vec!["crate".into(), "rng".into(), "uint".into()]));
}

#[test]
fn every_folder_imports_only_what_is_below_it() {
    let layers = layers();
    let layer = |module: &str| {
        let found = layers.iter().position(|row| row.iter().any(|m| m == module));
        found.unwrap_or_else(|| panic!("{module} is in no layer of ARCHITECTURE.md"))
    };
    let mut seen = 0;
    for (module, imports) in Source::read().imports() {
        for import in imports.iter().filter(|import| import[0] != module[0]) {
            let (upper, lower) = (layer(&module[0]), layer(&import[0]));
            assert!(
                lower > upper,
                "{} imports {}, which is not below it",
                module.join("::"),
                import.join("::")
            );
            seen += 1;
        }
    }
    assert!(seen > 300, "only {seen} imports were found: this test reads nothing");
}

#[test]
fn no_modules_import_each_other_in_a_circle() {
    let mut imports = Source::read().imports();
    // Repeatedly removes modules that import none of the remaining ones, until none can be removed.
    loop {
        let left: BTreeSet<Module> = imports.keys().cloned().collect();
        imports.values_mut().for_each(|of| of.retain(|import| left.contains(import)));
        let before = imports.len();
        imports.retain(|_, of| !of.is_empty());
        if imports.len() == before {
            break;
        }
    }
    let circle: Vec<String> = imports
        .iter()
        .map(|(m, of)| {
            let of: Vec<String> = of.iter().map(|i| i.join("::")).collect();
            format!("{} imports {}", m.join("::"), of.join(", "))
        })
        .collect();
    assert!(circle.is_empty(), "modules in a circle, or above one:\n{}", circle.join("\n"));
}

#[test]
fn the_feature_cuda_is_asked_about_in_the_device_and_the_kernels_only() {
    for (path, bytes) in files(&root().join("src")) {
        let text = String::from_utf8_lossy(&bytes);
        let allowed = path.starts_with("kernels") || path == Path::new("device.rs");
        assert!(allowed || !text.contains("feature = \"cuda\""), "{}", path.display());
    }
}

#[test]
fn clap_is_in_the_command_line_and_in_settings_only() {
    for (path, bytes) in files(&root().join("src")) {
        let text = String::from_utf8_lossy(&bytes);
        let allowed = ["cli", "stages", "stage", "settings"].iter().any(|top| path.starts_with(top));
        assert!(allowed || !code(&text).contains("clap::"), "{}", path.display());
    }
}

#[test]
fn files_get_their_names_in_fs_only() {
    for (path, bytes) in files(&root().join("src")) {
        let text = code(&String::from_utf8_lossy(&bytes));
        assert!(path == Path::new("fs.rs") || !text.contains("std::fs::rename("), "{}", path.display());
    }
}
