//! Which class a name or a number on the command line means.

use std::fs;

use crate::scene::{Scene, tensors};

/// The ten classes of the checkpoint get names.
fn scene(names: &[&str]) -> Scene {
    let scene = Scene::new();
    let config = fs::read_to_string(scene.path("checkpoint/config.json")).unwrap();
    let names = serde_json::to_string(names).unwrap();
    scene.write("checkpoint/config.json", config.replacen('{', &format!("{{\"class_names\": {names},"), 1));
    scene
}

/// The labels of the samples that are made for `--classes` and this text.
fn labels(scene: &Scene, classes: &str) -> Vec<i64> {
    let line = "sample --offline --checkpoint checkpoint --steps 2 --count 3 --out x.safetensors --classes";
    scene.mudit(line).with(classes).succeeds();
    tensors(&scene.path("x.safetensors"))["y"].to_i64().unwrap()
}

#[test]
fn numbers_that_are_names_of_other_classes_are_refused() {
    let scene = scene(&["0", "1", "10", "11", "2", "3", "x,y", "E\u{301}te\u{301}", "Вой", "y"]);
    for (classes, expected) in [
        ("0,1,10", [0, 1, 2]),
        ("@2,@2,@4", [2, 2, 4]),
        ("x,y,9,@6", [6, 9, 6]),
        ("\u{e9}t\u{e9},ВОЙ,вои\u{306}", [7, 8, 8]),
    ] {
        assert_eq!(labels(&scene, classes), expected, "{classes}");
    }
    fs::remove_file(scene.path("x.safetensors")).unwrap();
    let sample = "sample --offline --checkpoint checkpoint --steps 2 --count 1 --out y.npz --classes";
    for (classes, parts) in [
        ("2", &["`2` means more than one class", "named `10` (write `@2`)", "named `2` (write `@4`)"][..]),
        ("0,3", &["`3` means", "`@3`", "`@5`"]),
        ("12", &["class 12 is not in 0 to 9"]),
        ("@12", &["`@12`", "0 to 9"]),
        ("ete", &["no class is called `ete`"]),
    ] {
        scene.refuses(&format!("{sample} {classes}"), 2, parts);
    }
    let fid = "fid calc --offline --checkpoint checkpoint -n 4 --few --ref absent.npz --classes 2";
    scene.refuses(fid, 2, &["`@2`", "`@4`"]);
}
