//! Nothing is written but where it was told. That nothing is sent, `tests/peers/privacy.sh` holds.

use std::fs;
use std::path::Path;

use runtime::library::cache_directory;

use crate::process::Mudit;
use crate::scene::{Scene, contents};

/// Commands that load ONNX Runtime, each in another way.
const COMMANDS: [&str; 4] = [
    "train --config run.toml --out run --offline",
    "sample --checkpoint checkpoint --steps 2 --count 1 --out pictures.npz --offline",
    "build-engine --model checkpoint --weights checkpoint/model.safetensors --program denoise --out engine --offline",
    "doctor",
];

/// The command for a user whose home is a new folder; what was fetched before is found all the same.
fn at_home(scene: &Scene, line: &str, home: &Path) -> Mudit {
    fs::create_dir_all(home).unwrap();
    let command = scene.mudit(line).env("MUDIT_CACHE", cache_directory().unwrap());
    // Whoever sets the variable otherwise is not asked.
    let command = command.env("ORT_DISABLE_TELEMETRY", "0");
    ["HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "TMPDIR"]
        .into_iter()
        .fold(command, |command, name| command.env(name, home))
}

#[test]
fn a_home_stays_empty() {
    let scene = Scene::new();
    for (i, line) in COMMANDS.into_iter().enumerate() {
        let home = scene.path(&format!("home{i}"));
        let done = at_home(&scene, line, &home).run();
        assert_eq!(done.code, Some(0), "{done}");
        let left: Vec<_> = contents(&home).into_keys().collect();
        assert!(left.is_empty(), "`{line}` left {left:?}");
    }
}
