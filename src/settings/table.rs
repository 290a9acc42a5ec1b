//! Settings as a table of a pipeline file.

use serde::Serialize;
use serde_json::Value as Json;
use toml::{Table, Value};

use super::flags::{Settings, from_flags};

/// Old keys whose new place does not follow from their names.
const RENAMED: [(&str, &str); 3] =
    [("cosine", "schedule.kind"), ("split", "official_split"), ("part", "official_split")];

/// Settings from the table `given`, with the flags' defaults where it says nothing. `name` is the table's name, for
/// messages.
///
/// Fails if keys have no effect, naming each of them (keys that do not exist, belong to another kind, or have
/// moved), and if a value is impossible.
pub fn from_table<S: Settings>(name: &str, given: &Table) -> Result<S, String> {
    expect_plain(name, given)?;
    let groups = groups::<S>();
    let mut flags = Vec::new();
    for (group, kinds) in &groups {
        let key = format!("{group}.kind");
        let Some(kind) = at(given, &key) else { continue };
        match kind.as_str().filter(|kind| kinds.iter().any(|known| known == kind)) {
            Some(kind) => flags.push(kind_flag(group, kind)),
            None => {
                return Err(format!("{} is {kind}, expected one of {}", shown(name, &key), kinds.join(", ")));
            }
        }
    }
    let paths = keys(&json(given));
    let settings = over::<S>(&flags, given).map_err(|problem| {
        // serde does not say which key is at fault: try each of them alone.
        let alone = |path: &String| {
            let value = at(given, path).filter(|value| !value.is_table())?;
            let table = path
                .rsplit('.')
                .fold(value.clone(), |value, key| Table::from_iter([(key.into(), value)]).into());
            let problem = over::<S>(&flags, table.as_table()?).err()?;
            let here = shown(name, path);
            let Some((_, kinds)) = groups.iter().find(|(group, _)| group == path) else {
                return Some(format!("{here}: {problem}"));
            };
            let kind = value.as_str().filter(|kind| kinds.iter().any(|known| known == kind));
            let kind = kind.map_or_else(|| kinds.join(" or "), |kind| format!("\"{kind}\""));
            Some(format!("{here} is now a table: {} = {kind}", shown(name, &format!("{path}.kind"))))
        };
        paths.iter().find_map(alone).unwrap_or(problem)
    })?;
    let known = json(&settings);
    let is_known = |path: &str| known.pointer(&pointer(path)).is_some();
    let unknown = paths
        .iter()
        .filter(|path| !is_known(path) && path.rsplit_once('.').is_none_or(|(table, _)| is_known(table)));
    let problems: Vec<_> = unknown.map(|path| without_effect::<S>(name, path, &known, &groups)).collect();
    if problems.is_empty() { Ok(settings) } else { Err(problems.join("; ")) }
}

/// Refuses keys in quotes that look like paths: `"optimizer.momentum"` is one key, which no settings have.
fn expect_plain(name: &str, given: &Table) -> Result<(), String> {
    given.iter().try_for_each(|(key, value)| {
        if key.contains(['.', '/', '~']) {
            return Err(format!("[{name}] \"{key}\" is not known: what is in quotes is one key"));
        }
        value.as_table().map_or(Ok(()), |table| expect_plain(&format!("{name}.{key}"), table))
    })
}

/// The settings of these flags, overridden by a table.
fn over<S: Settings>(flags: &[String], given: &Table) -> Result<S, String> {
    fn lay(table: &mut Table, over: &Table) {
        for (key, value) in over {
            match (table.get_mut(key), value) {
                (Some(Value::Table(table)), Value::Table(over)) => lay(table, over),
                _ => drop(table.insert(key.clone(), value.clone())),
            }
        }
    }
    let base = from_flags::<S>(flags).map_err(|e| e.to_string())?;
    let mut merged = Table::try_from(base).map_err(|e| e.to_string())?;
    lay(&mut merged, given);
    Value::Table(merged).try_into().map_err(|e: toml::de::Error| e.message().trim_end().to_owned())
}

/// What is wrong with a key that has no place among the `known` ones.
fn without_effect<S: Settings>(name: &str, path: &str, known: &Json, groups: &[Group]) -> String {
    let (here, places) = (shown(name, path), places::<S>(groups));
    let (table, key) = path.rsplit_once('.').unwrap_or(("", path));
    let siblings = known.pointer(&pointer(table)).unwrap_or(known);
    if let Some((_, kinds)) = places.iter().find(|(place, _)| place == path) {
        let kind = &siblings["kind"];
        return format!("{here} has no effect with kind = {kind}; it belongs to {}", kinds.join(", "));
    }
    let renamed = RENAMED.iter().find(|(old, _)| *old == key).map(|(_, new)| *new);
    let moved = places.iter().find(|(place, _)| {
        let parts: Vec<&str> = place.rsplitn(3, '.').collect();
        parts[0] == key
            || parts.len() > 1 && format!("{}_{}", parts[1], parts[0]) == key
            || renamed == Some(place)
    });
    match moved {
        Some((place, kinds)) if kinds.is_empty() => format!("{here} is now {}", shown(name, place)),
        Some((place, kinds)) => {
            format!("{here} is now {}, of kind {}", shown(name, place), kinds.join(" or "))
        }
        None => {
            let expected: Vec<_> =
                siblings.as_object().into_iter().flat_map(|keys| keys.keys().cloned()).collect();
            format!("{here} is not known, expected one of {}", expected.join(", "))
        }
    }
}

/// The path of a group with kinds, and the kinds. The flag of the kind has the group's name.
type Group = (String, Vec<String>);

fn groups<S: Settings>() -> Vec<Group> {
    let command = S::augment_args(clap::Command::new(""));
    let group = |path: String| {
        let group = path.strip_suffix(".kind")?;
        let flag =
            command.get_arguments().find(|arg| group.rsplit('.').next() == Some(arg.get_id().as_str()))?;
        let kinds = flag.get_possible_values().iter().map(|kind| kind.get_name().to_owned()).collect();
        Some((group.to_owned(), kinds))
    };
    with_flags::<S>(&[]).into_iter().filter_map(group).collect()
}

/// Every key of the settings, whatever the kind, with the kinds that have it; `None` if all do.
fn places<S: Settings>(groups: &[Group]) -> Vec<(String, Vec<String>)> {
    let mut places: Vec<_> = with_flags::<S>(&[]).into_iter().map(|path| (path, Vec::new())).collect();
    for (group, kinds) in groups {
        let paths = kinds.iter().map(|kind| with_flags::<S>(&[kind_flag(group, kind)]));
        let of_kinds: Vec<_> = kinds.iter().zip(paths).collect();
        for path in of_kinds.iter().flat_map(|(_, paths)| paths) {
            let owners = of_kinds.iter().filter(|(_, paths)| paths.contains(path));
            let place = (path.clone(), owners.map(|(kind, _)| kind.to_string()).collect::<Vec<_>>());
            let is_of_all = !path.starts_with(&format!("{group}.")) || place.1.len() == kinds.len();
            if !is_of_all && !places.contains(&place) {
                places.retain(|(known, _)| known != path);
                places.push(place);
            }
        }
    }
    places
}

fn kind_flag(group: &str, kind: &str) -> String {
    format!("--{}={kind}", group.rsplit('.').next().unwrap_or(group))
}

fn with_flags<S: Settings>(flags: &[String]) -> Vec<String> {
    from_flags::<S>(flags).map_or_else(|_| Vec::new(), |settings| keys(&json(&settings)))
}

/// The paths of all keys, tables before the keys in them.
fn keys(value: &Json) -> Vec<String> {
    let below = value.as_object().into_iter().flatten().flat_map(|(key, value)| {
        let inner = keys(value).into_iter().map(move |below| format!("{key}.{below}"));
        std::iter::once(key.clone()).chain(inner)
    });
    below.collect()
}

fn json(settings: &impl Serialize) -> Json {
    serde_json::to_value(settings).unwrap_or(Json::Null)
}

fn at<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    match path.split_once('.') {
        Some((key, below)) => at(table.get(key)?.as_table()?, below),
        None => table.get(path),
    }
}

fn pointer(path: &str) -> String {
    format!("/{}", path.replace('.', "/"))
}

/// `[train.optimizer] momentum`.
fn shown(name: &str, path: &str) -> String {
    match path.rsplit_once('.') {
        Some((table, key)) => format!("[{name}.{table}] {key}"),
        None => format!("[{name}] {path}"),
    }
}
