//! Text forms of the programs against files that were read by a person.
//!
//! Set `UPDATE_GOLDEN=1` to rewrite the files; read the difference before committing it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use graph_builder::Graph;
use models::{Guidance, Model, Network, ProgramKind, ProgramSpec};
use runtime::file::sha256_bytes;

use crate::tiny;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.txt"))
}

/// Compares a text with a golden file, or rewrites the file.
fn check(name: &str, text: &str) {
    let path = golden(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        return;
    }
    let want = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}; run with UPDATE_GOLDEN=1"));
    let difference = want.lines().zip(text.lines()).position(|(want, got)| want != got);
    if let Some(i) = difference {
        let line = |text: &str| text.lines().nth(i).unwrap_or_default().to_owned();
        panic!("{name}, line {}:\n want {}\n  got {}", i + 1, line(&want), line(text));
    }
    assert_eq!(text.lines().count(), want.lines().count(), "{name}: number of lines");
}

fn optimised(graph: &Graph) -> Graph {
    graph.optimised().unwrap()
}

#[test]
fn tiny_programs_have_the_reviewed_text() {
    for variant in ["ddpm", "flow"] {
        for kind in ProgramKind::ALL {
            check(&format!("tiny-{variant}.{kind}"), &optimised(&tiny::graph(variant, kind)).text());
        }
    }
}

#[test]
fn preset_programs_have_the_recorded_hashes() {
    let mut table = String::from("preset program nodes-built nodes-emitted sha256-of-text\n");
    for preset in Network::presets() {
        let cfg = Model::preset(preset).unwrap();
        for kind in ProgramKind::ALL {
            let built = cfg.program(&ProgramSpec::new(kind, 2).guided(Guidance::First(3))).unwrap();
            let graph = optimised(&built);
            let (before, after) = (built.nodes().len(), graph.nodes().len());
            let hash = sha256_bytes(graph.text().as_bytes());
            writeln!(table, "{preset} {kind} {before} {after} {hash}").unwrap();
        }
    }
    check("presets", &table);
}
