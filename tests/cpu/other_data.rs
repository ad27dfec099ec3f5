//! What a run goes on with: the data, schedule and paths that it began with, or a refusal by name; and what a new run
//! begins with.

use std::fs;
use std::path::Path;

use train_engine::checkpoint;

use crate::process::mudit;
use crate::scene::Scene;
use crate::tiny_run::{TinyRun, assert_same_result, idx, losses, result};

/// Writes a folder of classes with eight pictures each.
fn pictures(scene: &Scene, folder: &str, classes: &[&str], seed: u8) {
    for (c, class) in classes.iter().enumerate() {
        let place = scene.path(folder).join(class);
        fs::create_dir_all(&place).unwrap();
        for i in 0..8_u8 {
            let colour = [seed ^ i, 40 * c as u8, 200 - i];
            image::RgbImage::from_pixel(8, 8, image::Rgb(colour))
                .save(place.join(format!("{i}.png")))
                .unwrap();
        }
    }
}

const FOLDER: &str = "train --offline --config run.toml --set data.kind=folder --set data.image_size=8";

/// A folder's name, what is changed in it, and what is told of that.
type Change = (&'static str, fn(&Path), &'static [&'static str]);

#[test]
fn a_changed_folder_is_refused_by_what_changed() {
    let scene = Scene::new();
    let changes: [Change; 5] = [
        (
            "renamed",
            |at| fs::rename(at.join("dog"), at.join("aardvark")).unwrap(),
            &["`dog` is gone", "`aardvark`"],
        ),
        (
            "more",
            |at| assert!(fs::copy(at.join("cat/1.png"), at.join("cat/9.png")).is_ok()),
            &["17 images", "`cat` has 9"],
        ),
        (
            "swapped",
            |at| {
                fs::rename(at.join("cat/1.png"), at.join("x")).unwrap();
                fs::rename(at.join("dog/1.png"), at.join("cat/1.png")).unwrap();
                fs::rename(at.join("x"), at.join("dog/1.png")).unwrap();
            },
            &["names or sizes"],
        ),
        ("named", |at| fs::rename(at.join("cat/1.png"), at.join("cat/11.png")).unwrap(), &["names or sizes"]),
        (
            "class",
            |at| {
                fs::create_dir(at.join("bird")).unwrap();
                fs::copy(at.join("cat/1.png"), at.join("bird/1.png")).unwrap();
            },
            &["3 classes instead of 2", "`bird` is new", "`train.from`"],
        ),
    ];
    pictures(&scene, "set", &["cat", "dog"], 0);
    scene.mudit(&format!("{FOLDER} --set data.path=set --out r")).succeeds();
    for (name, change, parts) in changes {
        pictures(&scene, name, &["cat", "dog"], 0);
        change(&scene.path(name));
        let on = format!("{FOLDER} --set data.path={name} --set train.steps=4 --out r");
        scene.refuses(&on, 1, &[parts, &["r/checkpoints/step-00000002"]].concat());
    }
    // A copy, of another name and time, is the same data; a change that is accepted is told.
    pictures(&scene, "elsewhere/copy", &["cat", "dog"], 0);
    let done =
        scene.mudit(&format!("{FOLDER} --set data.path=elsewhere/copy --set train.steps=3 --out r")).run();
    assert!(done.code == Some(0) && !done.stderr.contains("data set"), "{done}");
    let accepted = "--set data.path=renamed --set train.steps=4 --accept-data-change --out r";
    let done = scene.mudit(&format!("{FOLDER} {accepted}")).run();
    assert!(
        done.code == Some(0) && done.stderr.contains("going on with another data set, as asked"),
        "{done}"
    );
    // From then on it is the run's data.
    scene.mudit(&format!("{FOLDER} --set data.path=renamed --set train.steps=5 --out r")).succeeds();
    let never = "--set data.path=class --set train.steps=6 --accept-data-change --out r";
    scene.refuses(&format!("{FOLDER} {never}"), 1, &["the model has 2 classes and keeps them"]);
}

#[test]
fn one_changed_label_or_pixel_is_refused_and_old_checkpoints_are_told_of() {
    let scene = Scene::new();
    let line = |steps: u32| format!("train --offline --config run.toml --set train.steps={steps} --out r");
    scene.mudit(&line(2)).succeeds();
    for (file, part) in [
        ("data/train-labels-idx1-ubyte", "the labels are others"),
        ("data/train-images-idx3-ubyte", "content"),
    ] {
        let good = fs::read(scene.path(file)).unwrap();
        let mut other = good.clone();
        let last = other.len() - 1;
        other[last] ^= 1;
        scene.write(file, &other);
        scene.refuses(&line(3), 1, &["the data set is not the one", part, "--accept-data-change"]);
        scene.write(file, &good);
    }
    // A checkpoint from before fingerprints has none.
    let path = scene.path("r/checkpoints/step-00000002/state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(state.as_object_mut().unwrap().shift_remove("data").is_some());
    fs::write(&path, state.to_string()).unwrap();
    let done = scene.mudit(&line(3)).run();
    assert!(done.code == Some(0) && done.stderr.contains("older than fingerprints"), "{done}");
    let done = scene.mudit(&line(4)).run();
    assert!(done.code == Some(0) && !done.stderr.contains("fingerprints"), "{done}");
}

#[test]
fn a_sweep_keeps_its_data() {
    let scene = Scene::new();
    scene.write("sweep.toml", "config = \"run.toml\"\n[parameters]\n\"train.seed\" = { values = [0, 1] }\n");
    let line = "sweep run --offline --config sweep.toml --out s --set train.steps";
    scene.mudit(&format!("{line}=2")).succeeds();
    let labels = "data/train-labels-idx1-ubyte";
    let good = fs::read(scene.path(labels)).unwrap();
    scene.write(labels, idx(0x801, &[16], &[1; 16]));
    let done = scene.mudit(&format!("{line}=3 --set model.num_classes=4")).run();
    done.refuses(1, &["the data set is not the one", "choose another folder with --out"]);
    scene.write(labels, good);
    scene.mudit(&format!("{line}=3")).succeeds();
}

#[test]
fn a_decaying_run_has_its_length() {
    let tiny = TinyRun::new();
    for schedule in ["linear", "cosine"] {
        let set = format!("train.schedule={schedule}");
        let train = |more: &[&str]| tiny.train(schedule, &[&[set.as_str()], more].concat());
        train(&["train.steps=10", "checkpoint.every_steps=0"]).succeeds();
        for steps in ["train.steps=20", "train.steps=11"] {
            train(&[steps])
                .run()
                .refuses(1, &["step 10", "to step", "`train.decay_steps = 10`", "train.from="]);
        }
        let said = train(&["train.steps=10"]).succeeds();
        assert!(said.contains("--set train.from=") && !said.contains("train.steps=20"), "{said}");
        train(&["train.steps=12", "train.decay_steps=10", "train.final_fraction=0.0"]).succeeds();
        assert_eq!(losses(&tiny.path(schedule)).last().unwrap().1["lr"].as_f64(), Some(0.0));
    }
    // The first part of a long decay, then the rest of it: the same bytes as at once.
    let long = ["train.schedule=cosine", "train.decay_steps=30"];
    tiny.train("parts", &[&long[..], &["train.steps=10"]].concat()).succeeds();
    tiny.train("parts", &[&long[..], &["train.steps=20"]].concat()).succeeds();
    tiny.train("whole", &[&long[..], &["train.steps=20"]].concat()).succeeds();
    assert_same_result(&tiny.path("parts"), &tiny.path("whole"), "a decay in two parts");
}

#[test]
fn a_new_run_begins_with_given_weights() {
    let tiny = TinyRun::new();
    tiny.train("old", &["train.steps=10"]).succeeds();
    let (run, file) = (tiny.text("old"), tiny.text("old/checkpoints/latest/ema.safetensors"));
    // A rate so small that nothing moves: what the new run saves is what it began with.
    let still = |from: &str| {
        [format!("train.from={from}"), "train.steps=1".into(), "train.learning_rate=1e-30".into()]
    };
    for (name, from) in [("of-run", &run), ("of-file", &file)] {
        let set = still(from);
        tiny.train(name, &set.iter().map(String::as_str).collect::<Vec<_>>()).succeeds();
        let old = result(&tiny.path("old"));
        assert!(result(&tiny.path(name))["model.safetensors"] == old["ema.safetensors"], "{name}");
    }
    // The refusal of another rate names the way; a run that began otherwise does not take it silently.
    tiny.train("old", &["train.steps=20", "train.learning_rate=2e-3"])
        .run()
        .refuses(1, &["train.learning_rate", "--set train.from="]);
    tiny.train("old", &["train.steps=20", &format!("train.from={file}")])
        .run()
        .refuses(1, &["train.from: unset before", "when a run begins"]);
    let missing = tiny.text("nowhere");
    tiny.train("new", &[&format!("train.from={missing}")]).run().refuses(1, &["nowhere", "check the path"]);
    assert!(!tiny.path("new/config.toml").exists());

    // Other classes: the rows of those that are still there by name, the others drawn.
    let labels: Vec<u8> = (0..64).map(|i| i % 6).collect();
    fs::write(tiny.path("train-labels-idx1-ubyte"), idx(0x801, &[64], &labels)).unwrap();
    let set = still(&run);
    let done = tiny.train("more", &set.iter().map(String::as_str).collect::<Vec<_>>()).run();
    assert!(done.code == Some(0) && done.stderr.contains("4 of 6 rows of the label table"), "{done}");
    let table = |run: &str, file: &str| {
        let path = checkpoint::list(&tiny.path(run)).unwrap().pop().unwrap().1.join(file);
        crate::scene::tensors(&path)["y_embedder.embedding_table.weight"].to_f32()
    };
    let (old, new) = (table("old", "ema.safetensors"), table("more", "model.safetensors"));
    assert_eq!((old.len(), new.len()), (5 * 24, 7 * 24));
    assert_eq!((&old[..4 * 24], &old[4 * 24..]), (&new[..4 * 24], &new[6 * 24..]));
    assert!(new[4 * 24..6 * 24].iter().any(|v| *v != 0.0));
}

#[test]
fn a_run_goes_on_from_any_directory() {
    let scene = Scene::new();
    scene.mudit("train --offline --config run.toml --out r").succeeds();
    let out = scene.path("r").display().to_string();
    mudit(["train", "--offline", "--out", &out, "--set", "train.steps=3"]).within(Path::new("/")).succeeds();
    // A path that is given relative, and is not there, is told from where.
    let config = scene.path("run.toml").display().to_string();
    mudit(["train", "--offline", "--config", &config, "--out", &out])
        .within(Path::new("/"))
        .run()
        .refuses(1, &["`data`", "working directory `/`"]);
}
