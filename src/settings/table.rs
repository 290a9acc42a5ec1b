//! Settings as a table of a pipeline file.

use serde_json::Value as Json;
use toml::{Table, Value};

use super::flags::{Settings, from_flags};

/// Old keys whose new place does not follow from their name.
const RENAMED: [(&str, &str); 1] = [("cosine", "schedule.kind")];

/// The key that names the kind of a tagged group.
const KIND: &str = "kind";

/// Settings as `given`, and as the flags have them where it says nothing. `name` is that of the table, for messages.
///
/// Fails, naming each of them, at keys that have no effect: keys that there are not, that belong to another kind, or that
/// have another place now; and at a value that cannot be.
pub fn from_table<S: Settings>(name: &str, given: &Table) -> Result<S, String> {
    let kinds = Kinds::of::<S>();
    let flags = kinds.flags(name, given)?;
    let settings = over::<S>(&flags, given).map_err(|problem| {
        // serde does not say at which key: try each of them alone.
        let culprit = leaves(given, &[]).into_iter().find_map(|(path, value)| {
            let problem = over::<S>(&flags, &nested(&path, value.clone())).err()?;
            Some(kinds.misplaced(name, &path, &value).unwrap_or_else(|| {
                let (key, table) = path.split_last().expect("a leaf has a key");
                format!("{} {key}: {problem}", header(name, table))
            }))
        });
        culprit.unwrap_or_else(|| format!("{} {problem}", header(name, &[])))
    })?;
    let known = json(&settings);
    let problems: Vec<String> =
        unknown(given, &known, &[]).iter().map(|path| kinds.describe::<S>(name, path, &known)).collect();
    if problems.is_empty() { Ok(settings) } else { Err(problems.join("; ")) }
}

/// The settings of these flags, with a table laid over.
fn over<S: Settings>(flags: &[String], given: &Table) -> Result<S, String> {
    let base = from_flags::<S>(flags).map_err(|e| e.to_string())?;
    let mut merged = Table::try_from(base).map_err(|e| e.to_string())?;
    lay(&mut merged, given);
    Value::Table(merged).try_into().map_err(|e: toml::de::Error| e.message().trim_end().to_owned())
}

/// Lays one table over another.
fn lay(table: &mut Table, over: &Table) {
    for (key, value) in over {
        match (table.get_mut(key), value) {
            (Some(Value::Table(table)), Value::Table(over)) => lay(table, over),
            _ => drop(table.insert(key.clone(), value.clone())),
        }
    }
}

/// The path of each value that is no table, and the value.
fn leaves(table: &Table, path: &[&str]) -> Vec<(Vec<String>, Value)> {
    let below = table.iter().flat_map(|(key, value)| {
        let path: Vec<&str> = path.iter().copied().chain([key.as_str()]).collect();
        match value {
            Value::Table(table) => leaves(table, &path),
            _ => vec![(path.into_iter().map(str::to_owned).collect(), value.clone())],
        }
    });
    below.collect()
}

/// A table with one value.
fn nested(path: &[String], value: Value) -> Table {
    let mut table = Table::new();
    let [key, rest @ ..] = path else { return table };
    let value = if rest.is_empty() { value } else { Value::Table(nested(rest, value)) };
    table.insert(key.clone(), value);
    table
}

/// The paths of keys that are not among the known ones, in which those that are not set are null.
fn unknown(given: &Table, known: &Json, path: &[String]) -> Vec<Vec<String>> {
    let below = given.iter().flat_map(|(key, value)| {
        let path = [path, std::slice::from_ref(key)].concat();
        match (known.get(key), value) {
            (None, _) => vec![path],
            (Some(known @ Json::Object(_)), Value::Table(given)) => unknown(given, known, &path),
            _ => Vec::new(),
        }
    });
    below.collect()
}

fn json(settings: &impl serde::Serialize) -> Json {
    serde_json::to_value(settings).unwrap_or(Json::Null)
}

/// `[train.optimizer]`.
fn header(name: &str, path: &[String]) -> String {
    let path: String = path.iter().map(|key| format!(".{key}")).collect();
    format!("[{name}{path}]")
}

/// A key and, if not all kinds have it, the kinds that do.
struct Place {
    path: Vec<String>,
    kinds: Vec<String>,
    of_all: bool,
}

/// The tagged groups of some settings: the path of each, and its kinds. The flag of a kind is called as the last key.
struct Kinds(Vec<(Vec<String>, Vec<String>)>);

impl Kinds {
    fn of<S: Settings>() -> Self {
        let command = S::augment_args(clap::Command::new(""));
        let mut found = Vec::new();
        let defaults = from_flags::<S>(&[]).map(|settings| json(&settings)).unwrap_or(Json::Null);
        walk(&defaults, &mut Vec::new(), &mut |path, value| {
            let Some((KIND, group)) = path.split_last().map(|(key, group)| (key.as_str(), group)) else {
                return;
            };
            let flag =
                command.get_arguments().find(|arg| group.last().is_some_and(|last| arg.get_id() == last));
            if let (Some(flag), Json::String(_)) = (flag, value) {
                let kinds =
                    flag.get_possible_values().iter().map(|kind| kind.get_name().to_owned()).collect();
                found.push((group.to_vec(), kinds));
            }
        });
        Self(found)
    }

    /// The flags of the kinds that a table chooses.
    fn flags(&self, name: &str, given: &Table) -> Result<Vec<String>, String> {
        let mut flags = Vec::new();
        for (path, kinds) in &self.0 {
            let group = path.iter().try_fold(given, |table, key| table.get(key)?.as_table());
            let Some(kind) = group.and_then(|group| group.get(KIND)) else { continue };
            match kind.as_str().filter(|kind| kinds.iter().any(|known| known == kind)) {
                Some(kind) => flags.push(format!("--{}={kind}", path.last().expect("a group has a name"))),
                None => {
                    let expected = kinds.join(", ");
                    return Err(format!("{} kind is {kind}, expected one of {expected}", header(name, path)));
                }
            }
        }
        Ok(flags)
    }

    /// What is wrong with a value that stands where there is a group now.
    fn misplaced(&self, name: &str, path: &[String], value: &Value) -> Option<String> {
        let (group, kinds) = self.0.iter().find(|(group, _)| group == path)?;
        let (key, table) = group.split_last()?;
        let of = value.as_str().filter(|kind| kinds.iter().any(|known| known == kind));
        let kind = of.map_or_else(|| kinds.join(" or "), |kind| format!("\"{kind}\""));
        Some(format!("{} {key} is now a table: {} kind = {kind}", header(name, table), header(name, group)))
    }

    /// All keys of the settings, of all kinds.
    fn places<S: Settings>(&self) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::new();
        let mut add = |flags: &[String], within: &[String], kind: &str, of: usize| {
            let Ok(settings) = from_flags::<S>(flags) else { return };
            walk(&json(&settings), &mut Vec::new(), &mut |path, _| {
                if !path.starts_with(within) {
                    return;
                }
                match places.iter_mut().find(|place| place.path == path) {
                    Some(place) => place.kinds.push(kind.to_owned()),
                    None => places.push(Place {
                        path: path.to_vec(),
                        kinds: vec![kind.to_owned()],
                        of_all: false,
                    }),
                }
                for place in places.iter_mut().filter(|place| place.path == path) {
                    place.of_all = place.kinds.len() == of;
                }
            });
        };
        for (group, kinds) in &self.0 {
            let flag = group.last().map(String::as_str).unwrap_or_default();
            for kind in kinds {
                add(&[format!("--{flag}={kind}")], group, kind, kinds.len());
            }
        }
        let mut others = Vec::new();
        if let Ok(settings) = from_flags::<S>(&[]) {
            walk(&json(&settings), &mut Vec::new(), &mut |path, _| others.push(path.to_vec()));
        }
        for path in others {
            if places.iter().all(|place| place.path != path) {
                places.push(Place { path, kinds: Vec::new(), of_all: true });
            }
        }
        places
    }

    /// What is wrong with a key that has no effect.
    fn describe<S: Settings>(&self, name: &str, path: &[String], known: &Json) -> String {
        let Some((key, table)) = path.split_last() else { return String::new() };
        let (here, places) = (header(name, table), self.places::<S>());
        let keys = table.iter().try_fold(known, |known, key| known.get(key));
        if let Some(place) = places.iter().find(|place| place.path == path) {
            let kind = keys.and_then(|keys| keys[KIND].as_str()).unwrap_or_default();
            return format!(
                "{here} {key} has no effect with kind = \"{kind}\"; it belongs to {}",
                place.kinds.join(", ")
            );
        }
        let renamed = RENAMED.iter().find(|(old, _)| old == key).map(|(_, new)| *new);
        let is_it = |place: &&Place| {
            let new = &place.path;
            new.last() == Some(key)
                || new.len() > 1 && new[new.len() - 2..].join("_") == *key
                || renamed.is_some_and(|renamed| new.join(".") == renamed)
        };
        if let Some(Place { path: new, kinds, of_all }) = places.iter().find(is_it)
            && let Some((new_key, new_table)) = new.split_last()
        {
            let of = if *of_all { String::new() } else { format!(", of kind {}", kinds.join(" or ")) };
            return format!("{here} {key} is now {} {new_key}{of}", header(name, new_table));
        }
        let expected: Vec<&str> =
            keys.and_then(Json::as_object).into_iter().flatten().map(|(key, _)| key.as_str()).collect();
        format!("{here} unknown key '{key}', expected one of {}", expected.join(", "))
    }
}

/// Visits every value with its path, tables before what is in them.
fn walk(value: &Json, path: &mut Vec<String>, visit: &mut impl FnMut(&[String], &Json)) {
    if !path.is_empty() {
        visit(path, value);
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        path.push(key.clone());
        walk(value, path, visit);
        path.pop();
    }
}
