//! Only what makes its next step wrong ends a run; what it has done before that is saved.

use std::fs;
use std::path::Path;

use indexmap::IndexMap;
use runtime::HostTensor;
use train_engine::checkpoint;

use crate::process::Finished;
use crate::scene::{Scene, save};
use crate::tiny_run::{TinyRun, assert_same_result};

/// What is done to the directory of a run between its two halves, and what the second is warned of.
type Spoiled = (&'static str, fn(&Path), Option<&'static str>);

fn directory(path: &Path) {
    drop(fs::remove_file(path));
    fs::create_dir(path).unwrap();
    fs::write(path.join("mine"), "").unwrap();
}

#[test]
fn nothing_but_the_next_step_ends_a_run() {
    let cases: [Spoiled; 8] = [
        ("a copy that followed links", |run| follow(&run.join("checkpoints")), None),
        (
            "a user's directory",
            |run| directory(&run.join("checkpoints/latest")),
            Some("`latest` does not lead"),
        ),
        (
            "no place for pictures",
            |run| fs::write(run.join("samples"), "").unwrap(),
            Some("no sample pictures"),
        ),
        (
            "no place for the settings",
            |run| directory(&run.join("config.toml")),
            Some("the settings are not"),
        ),
        (
            "no place for metrics",
            |run| directory(&run.join("metrics.jsonl")),
            Some("`metrics.jsonl` lacks steps"),
        ),
        (
            "metrics of something else",
            |run| fs::write(run.join("metrics.jsonl"), "hello\n").unwrap(),
            Some("unreadable-1"),
        ),
        ("no place for the plot", |run| directory(&run.join("loss.svg")), Some("the loss is not drawn")),
        ("a hidden file", |run| fs::write(run.join("checkpoints/.step-00000001.new-1"), "").unwrap(), None),
    ];
    let short = ["checkpoint.keep=2", "sample.every_steps=2", "sample.steps=2", "sample.per_class=1"];
    let with = |steps: &'static str| [&[steps], &short[..]].concat();
    let tiny = TinyRun::new();
    tiny.train("undisturbed", &with("train.steps=10")).succeeds();
    for (k, (what, spoil, told)) in cases.into_iter().enumerate() {
        let out = format!("run-{k}");
        let run = tiny.path(&out);
        tiny.train(&out, &[&with("train.steps=5")[..], &["sample.every_steps=0"]].concat()).succeeds();
        spoil(&run);
        let done = tiny.train(&out, &with("train.steps=10")).run();
        assert_eq!(done.code, Some(0), "{what}: {done}");
        let warnings: Vec<&str> = done
            .stderr
            .lines()
            .filter(|line| line.starts_with("warning: ") && !line.contains("conventions"))
            .collect();
        let count = |part: &str| warnings.iter().filter(|line| line.contains(part)).count();
        assert_eq!(told.map_or(1, count), 1, "{what} is told once: {done}");
        assert_eq!(warnings.len(), usize::from(told.is_some()), "{what}: {done}");
        let [kept, whole] = [&run, &tiny.path("undisturbed")]
            .map(|run| fs::read(run.join("checkpoints/step-00000010/model.safetensors")).unwrap());
        assert!(kept == whole, "{what}: other weights");
    }
}

/// Replaces the link by what it leads to.
fn follow(checkpoints: &Path) {
    let latest = checkpoints.join("latest");
    let newest = fs::canonicalize(&latest).unwrap();
    fs::remove_file(&latest).unwrap();
    fs::create_dir(&latest).unwrap();
    for name in checkpoint::FILES {
        fs::copy(newest.join(name), latest.join(name)).unwrap();
    }
}

#[test]
fn pictures_that_no_solver_can_draw_are_refused_before_the_first_step() {
    let scene = Scene::new();
    for (overrides, words) in [
        ("objective.kind=ddpm sample.steps=1001", "ddim"),
        ("objective.kind=ddpm sample.sampler=ddpm sample.steps=1", "ddpm"),
        ("objective.kind=ddpm sample.sampler=dpm++2m sample.steps=5000", "dpm++2m"),
        ("objective.kind=flow sample.sampler=sde sample.steps=1", "sde"),
        ("objective.kind=flow sample.sampler=heun sample.steps=1001", "heun"),
    ] {
        let set = format!(" --set {}", overrides.replace(' ', " --set "));
        for line in [
            "train --offline --config run.toml --out r --dry-run",
            "train --offline --config run.toml --out r",
        ] {
            scene.refuses(&format!("{line}{set} --set sample.every_steps=1"), 2, &["sample.steps", words]);
        }
    }
    scene.refuses(
        "train --config run.toml --out r --set sample.per_class=1000000000",
        2,
        &["sample.per_class", "1000"],
    );
}

/// Writes 24 latents of 1 × 8 × 8; row 17 holds `value` in f16.
fn latents(scene: &Scene, value: f32) {
    let mut values: Vec<f32> = (0..24 * 64).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    values[17 * 64 + 5] = value;
    let mut tensors = IndexMap::new();
    tensors.insert("latents".to_owned(), HostTensor::f32([24, 1, 8, 8], values).unwrap());
    tensors.insert("labels".to_owned(), HostTensor::i64([24], (0..24).map(|i| i % 4).collect()).unwrap());
    save(&scene.path("latents.safetensors"), &tensors);
}

#[test]
fn a_value_that_is_not_finite_is_found_in_the_data_and_the_steps_before_are_saved() {
    let scene = Scene::new();
    let run = "[model]\npatch_size = 4\nhidden_size = 16\ndepth = 1\nnum_heads = 2\n\
               [data]\nkind = \"latents\"\npath = \"latents.safetensors\"\nflip = false\n\
               [train]\nsteps = 60\nbatch_size = 2\n[checkpoint]\nevery_steps = 1000\n[log]\nevery_steps = 1\n";
    scene.write("latents.toml", run);
    for (k, (value, word)) in
        [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")].into_iter().enumerate()
    {
        latents(&scene, value);
        let (out, mut total) = (format!("r{k}"), 0);
        let again = |scene: &Scene| -> Finished {
            let line = format!("train --offline --config latents.toml --out {out} --accept-data-change");
            scene.mudit(&line).run()
        };
        let done = again(&scene);
        done.refuses(1, &["the data set holds", word, "row 17 of `latents.safetensors`", "value 5"]);
        let saved = checkpoint::list(&scene.path(&out)).unwrap();
        let rows =
            fs::read_to_string(scene.path(&out).join("metrics.jsonl")).map_or(0, |text| text.lines().count());
        assert_eq!(saved.last().map_or(0, |(step, _)| *step as usize), rows, "{done}");
        assert!(!done.stderr.contains("learning_rate"), "{done}");
        total += rows;
        assert!(total > 0 || k > 0 || rows == 0, "{done}");
        // Mended, the same command goes on.
        latents(&scene, 0.5);
        let done = again(&scene);
        assert_eq!(done.code, Some(0), "{done}");
        assert_eq!(done.stderr.contains(&format!("going on after step {rows} ")), rows > 0, "{done}");
    }
}

#[test]
fn each_step_is_in_tensorboards_curves_after_any_number_of_resumptions() {
    let tiny = TinyRun::new();
    for steps in ["train.steps=3", "train.steps=7", "train.steps=8"] {
        tiny.train("run", &[steps, "log.tensorboard=true"]).succeeds();
    }
    let mut files: Vec<_> = fs::read_dir(tiny.path("run"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("tfevents"))
        .collect();
    files.sort_by_key(|path| fs::metadata(path).unwrap().modified().unwrap());
    assert_eq!(files.len(), 3);
    let mut shown: Vec<u64> = Vec::new();
    for event in files.iter().flat_map(|path| events(&fs::read(path).unwrap())) {
        match event {
            // As TensorBoard does: a start drops what older files hold from its step on.
            Event { step, starts: true, .. } => shown.retain(|s| *s < step),
            Event { step, scalars: true, .. } => shown.push(step),
            _ => {}
        }
    }
    assert_eq!(shown, (1..=8).collect::<Vec<_>>());
}

/// What of an event file's record is looked at here.
struct Event {
    step: u64,
    starts: bool,
    scalars: bool,
}

/// The records of an event file: length, checksum, protobuf, checksum.
fn events(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let (event, rest) = rest[4..].split_at(u64::from_le_bytes(*length) as usize);
        bytes = &rest[4..];
        let (mut fields, mut seen) = (event, Event { step: 0, starts: false, scalars: false });
        while !fields.is_empty() {
            let key = varint(&mut fields);
            let skipped = match key & 7 {
                0 => {
                    let value = varint(&mut fields);
                    if key >> 3 == 2 {
                        seen.step = value;
                    }
                    0
                }
                1 => 8,
                5 => 4,
                _ => varint(&mut fields),
            };
            seen.scalars |= key >> 3 == 5;
            seen.starts |= key >> 3 == 7;
            fields = &fields[skipped as usize..];
        }
        events.push(seen);
    }
    events
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 127) << shift;
        shift += 7;
        if byte < 128 {
            return value;
        }
    }
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_the_work() {
    let scene = Scene::new();
    scene.write("file", "");
    scene.write("images.npz", "");
    let models = "--checkpoint checkpoint --steps 2 --count 1";
    for (line, part) in [
        (format!("sample {models} --out x.npz,file/x.npz"), "file/x.npz"),
        (format!("sample {models} --save-trajectory file/t.safetensors"), "file/t.safetensors"),
        ("fid ref data --preset fashion --out file/ref.npz".into(), "file/ref.npz"),
        ("fid calc images.npz --ref images.npz --preset fashion --out file/fid.json".into(), "file/fid.json"),
        ("coord-check --model checkpoint --widths 24,48 --out file".into(), "file/coord-check.json"),
        ("profile DiT-S/2 --svg file/x.svg".into(), "file/x.svg"),
        ("profile DiT-S/2 --json file/x.json".into(), "file/x.json"),
        ("quickstart --out file/q".into(), "file/q"),
        (
            "replay --model checkpoint --weights checkpoint/model.safetensors --batches batches.safetensors --out o \
             --ema-out file/e"
                .into(),
            "file/e",
        ),
        (
            "build-engine --model checkpoint --weights checkpoint/model.safetensors --program denoise --out file/e".into(),
            "file/e",
        ),
        ("data check --kind idx --path data --grid file/g.png".into(), "file/g.png"),
    ] {
        // Without a library nothing can be computed: what is told first is what was looked at first.
        let line = if line.starts_with("data") || line.starts_with("build") { line } else { format!("{line} --offline") };
        scene.untouched(scene.mudit(&line).env("ORT_DYLIB_PATH", "/nowhere.so"), 1, &["cannot write", part]);
    }
}

#[test]
fn where_files_cannot_be_locked_a_file_names_the_process() {
    let tiny = TinyRun::new();
    tiny.train("run", &["train.steps=5"]).succeeds();
    let note = tiny.path("run/.lock.owner");
    // Of a machine that cannot be asked.
    fs::write(&note, r#"{"host":"node-7","pid":12,"started":3,"realm":"elsewhere"}"#).unwrap();
    let done = tiny.train("run", &["train.steps=10"]).run();
    done.refuses(1, &["process 12 on node-7", "run/.lock.owner", "remove that file if the process is gone"]);
    fs::remove_file(&note).unwrap();
    tiny.train("run", &["train.steps=10"]).succeeds();
    tiny.train("plain", &["train.steps=10"]).succeeds();
    assert_same_result(&tiny.path("run"), &tiny.path("plain"), "after a lock");
}

#[test]
fn printed_commands_can_be_copied() {
    let tiny = TinyRun::new();
    for name in ["a run", "it's", "$HOME"] {
        tiny.train(name, &["train.steps=5"]).succeeds();
        let said = tiny.train(name, &["train.steps=5"]).succeeds();
        let command = said.trim().split_once("to go on: mudit ").unwrap().1;
        let words =
            std::process::Command::new("bash").args(["-c", &format!("printf '%s\\n' {command}")]).output();
        let words = String::from_utf8(words.unwrap().stdout).unwrap();
        let expected = format!("train\n--out\n{}\n--set\ntrain.steps=10\n", tiny.text(name));
        assert_eq!(words, expected, "{said}");
    }
}
