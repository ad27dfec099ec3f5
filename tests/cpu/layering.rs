//! The arrows between the rooms point down only, in the manifests and in the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every room, its folder and what it may use.
const ROOMS: [(&str, &str, &[&str]); 6] = [
    ("graph-builder", "graph-builder", &[]),
    ("runtime", "runtime", &["graph-builder"]),
    ("models", "models", &["graph-builder"]),
    ("train-engine", "train-engine", &["graph-builder", "models", "runtime"]),
    ("mudit", "app", &["graph-builder", "models", "runtime", "train-engine"]),
    ("mudit-tests", "tests", &["graph-builder", "models", "mudit", "runtime", "train-engine"]),
];

/// What the runtime may know of the graph builder: programs, their signatures and types, but no graphs.
const PROGRAM_TYPES: [&str; 10] = [
    "DType",
    "NativeCall",
    "NativeKernel",
    "NativeName",
    "OnnxProgram",
    "OpenProgram",
    "OpenSpec",
    "Shape",
    "TensorSpec",
    "Type",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn manifest(folder: &str) -> toml::Table {
    let path = root().join(folder).join("Cargo.toml");
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).parse().unwrap()
}

/// All Rust files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The lines of a file without comments, with the file's path for messages.
fn code(path: &Path) -> impl Iterator<Item = String> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(|l| l.split("//").next().unwrap_or_default().to_owned()).collect::<Vec<_>>().into_iter()
}

/// Whether a line names a crate: `name::` not inside a longer word or path.
fn names_crate(line: &str, name: &str) -> bool {
    line.match_indices(&format!("{name}::")).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
    })
}

/// Words that name one family of networks.
const FAMILIES: [&str; 2] = ["Dit", "DitConfig"];
/// Files of `models` that may: the family's own, and the registry.
const KNOW_FAMILIES: [&str; 3] = ["models/src/dit.rs", "models/src/network.rs", "models/src/lib.rs"];

/// A new family is one file and one line: no other room may know what a network is inside.
#[test]
fn no_room_but_the_models_names_a_family() {
    for folder in ["graph-builder", "runtime", "models", "train-engine", "app"] {
        for path in sources(&root().join(folder).join("src")) {
            let place = path.strip_prefix(root()).unwrap().display().to_string();
            if KNOW_FAMILIES.contains(&place.as_str()) || place.ends_with("tests.rs") {
                continue;
            }
            for line in code(&path).take_while(|line| !line.contains("mod tests {")) {
                let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
                let named = words.any(|word| FAMILIES.contains(&word))
                    || line.contains("::dit::")
                    || names_crate(&line, "dit");
                assert!(!named, "{place}: {line}");
            }
        }
    }
}

#[test]
fn the_workspace_has_these_rooms() {
    let workspace = manifest(".");
    let members: BTreeSet<&str> =
        workspace["workspace"]["members"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    assert_eq!(members, ROOMS.map(|(_, folder, _)| folder).into());
    for (name, folder, _) in ROOMS {
        assert_eq!(manifest(folder)["package"]["name"].as_str(), Some(name), "{folder}");
    }
}

#[test]
fn manifests_point_down() {
    for (name, folder, allowed) in ROOMS {
        let manifest = manifest(folder);
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section) else { continue };
            for dependency in dependencies.as_table().unwrap().keys() {
                let room = ROOMS.iter().any(|(n, ..)| n == dependency);
                assert!(
                    !room || allowed.contains(&dependency.as_str()),
                    "{name} has {dependency} in {section}"
                );
            }
        }
    }
}

#[test]
fn sources_point_down() {
    for (name, folder, allowed) in ROOMS.iter().filter(|(_, folder, _)| *folder != "tests") {
        // A crate may have a module called like a room; a path to it starts with `crate` or `self`.
        let forbidden = ROOMS.iter().map(|(n, ..)| *n).filter(|n| n != name && !allowed.contains(n));
        let forbidden: Vec<String> = forbidden.map(|n| n.replace('-', "_")).collect();
        for path in sources(&root().join(folder).join("src")) {
            for line in code(&path) {
                if let Some(other) = forbidden.iter().find(|n| names_crate(&line, n)) {
                    panic!("{} uses {other}: {line}", path.display());
                }
            }
        }
    }
}

#[test]
fn the_runtime_knows_programs_but_no_graphs() {
    for path in sources(&root().join("runtime/src")) {
        // Tests may build the programs that they run.
        if path.file_stem().is_some_and(|s| s == "tests" || s == "test_models") {
            continue;
        }
        let text: Vec<String> = code(&path).take_while(|l| l.trim() != "#[cfg(test)]").collect();
        let text = text.join(" ");
        for (at, _) in text.match_indices("graph_builder::") {
            let rest = &text[at + "graph_builder::".len()..];
            let end = if rest.starts_with('{') {
                rest.find('}')
            } else {
                rest.find([';', ' ', '(', ')', '>', ','])
            };
            let used = rest[..end.unwrap_or(rest.len())].trim_matches(['{', '}']);
            for item in used.split(',').map(str::trim).filter(|i| !i.is_empty()) {
                assert!(PROGRAM_TYPES.contains(&item), "{} uses graph_builder::{item}", path.display());
            }
        }
    }
}

#[test]
fn users_of_the_library_do_not_know_each_other() {
    let app = root().join("app/src");
    let users = ["serve", "fid"];
    for user in users {
        let other = users.iter().find(|u| **u != user).unwrap();
        let own = |p: &PathBuf| {
            let inside = p.strip_prefix(&app).unwrap();
            inside.components().any(|c| Path::new(&c).file_stem().is_some_and(|s| s == user))
        };
        for path in sources(&app).into_iter().filter(own) {
            for line in code(&path) {
                assert!(
                    !names_crate(&line, other) && !line.contains(&format!("::{other}::")),
                    "{}: {line}",
                    path.display()
                );
            }
        }
    }
}
