//! muP as commands: the table, the coordinate check, refusals, and a plain checkpoint from a muP one.

use std::fs;
use std::path::Path;
use std::time::Duration;

use mudit_tests::execution::within;
use runtime::read_safetensors_file;

use crate::process::mudit;
use crate::scene::Scene;
use crate::tiny_run::TinyRun;

const LIMIT: Duration = Duration::from_mins(3);

#[test]
fn the_coordinate_check_passes_under_mup_and_fails_without() {
    let scene = Scene::new();
    let check = |parameterisation: &str| {
        scene.mudit(&format!(
            "coord-check --offline --model DiT-S/8@16x16x1:4 --set model.depth=2 --head-size 24 --widths 24,48,96,192 \
             --seeds 2 --batch 8 --parameterisation {parameterisation} --out {parameterisation}"
        ))
    };
    let passed = check("mup").json();
    assert_eq!(passed["passed"].as_bool(), Some(true), "{:#}", passed["verdict"]);
    let layers = passed["verdict"].as_array().unwrap();
    for (name, role) in
        [("blocks.1.mlp.fc2", "hidden"), ("final_layer.linear", "output"), ("y_embedder", "input")]
    {
        let layer =
            layers.iter().find(|v| v["layer"] == name).unwrap_or_else(|| panic!("{name} is not judged"));
        assert_eq!(layer["role"], role, "{name}");
        assert!(layer["update"]["slope"].is_number(), "{name} moves: {layer}");
    }
    let failed = check("sp").run();
    failed.refuses(1, &["the coordinate check fails in", "worst in `", "goes as width^"]);
    assert!(failed.stdout.contains("FAILS"), "{failed}");
    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(scene.path("sp/coord-check.json")).unwrap()).unwrap();
    assert_eq!(report["passed"].as_bool(), Some(false));
    let worst = report["worst"].as_str().unwrap();
    assert!(failed.error().contains(worst), "the worst layer is named: {worst}");
    for plot in ["mup/coord-check.svg", "mup/coord-check-updates.svg", "sp/coord-check.svg"] {
        let svg = fs::read_to_string(scene.path(plot)).unwrap();
        assert!(svg.contains("after step 4") && svg.contains("blocks.1.mlp.fc2"), "{plot}");
    }
    scene.refuses("coord-check --offline --widths 72 --out none", 2, &["two or more widths"]);
    scene.refuses(
        "coord-check --offline --head-size 36 --widths 72,100 --out none",
        2,
        &["head size 36", "100"],
    );
}

fn base_width(value: &serde_json::Value) -> (Option<bool>, Option<u64>, Option<u64>) {
    (value["enabled"].as_bool(), value["width"].as_u64(), value["base_width"].as_u64())
}

#[test]
fn the_table_is_derived_and_saved_with_checkpoints_and_engines() {
    let tiny = TinyRun::new();
    let run = tiny.text("run");
    tiny.train("run", &["train.steps=2", "mup.weight_decay=constant"]).succeeds();
    let row = |table: &serde_json::Value, name: &str| -> serde_json::Value {
        let rows = table["parameters"].as_array().unwrap();
        rows.iter().find(|r| r["name"] == name).unwrap_or_else(|| panic!("{name}")).clone()
    };
    let saved = mudit(["inspect", &run, "--mup"]).json();
    assert_eq!(base_width(&saved), (Some(true), Some(24), Some(12)));
    assert_eq!(saved["conventions"]["weight_decay"], "constant");
    let hidden = row(&saved, "blocks.1.mlp.fc1.weight");
    assert_eq!((hidden["role"].as_str(), hidden["lr"].as_f64()), (Some("hidden"), Some(0.5)));
    assert_eq!((hidden["weight_decay"].as_f64(), hidden["multiplier"].as_f64()), (Some(1.0), Some(1.0)));
    let [std, base] = ["init_std", "base_init_std"].map(|key| hidden[key].as_f64().unwrap());
    assert!((std - 24f64.powf(-0.5)).abs() < 1e-9 && (base - 12f64.powf(-0.5)).abs() < 1e-9, "{hidden}");
    assert_eq!(row(&saved, "final_layer.linear.weight")["multiplier"].as_f64(), Some(0.5));

    let checkpoint = format!("{run}/checkpoints/latest");
    let engine = tiny.text("engine");
    let build =
        ["build-engine", "--provider", "none", "--program", "loss", "--model", &checkpoint, "--out", &engine];
    mudit(build).succeeds();
    let of_engine = mudit(["inspect", &engine, "--mup"]).json();
    assert_eq!(base_width(&of_engine), base_width(&saved));
    assert_eq!(row(&of_engine, "final_layer.linear.weight"), row(&saved, "final_layer.linear.weight"));

    let text = mudit(["inspect", "DiT-S/2", "--mup", "--base-width", "96"]).succeeds();
    assert!(text.contains("m = 4") && text.contains("blocks.11.attn.qkv.weight"), "{text}");
    mudit(["inspect", &run, "--mup", "--base-width", "96"]).run().refuses(2, &["--base-width"]);
}

/// The checkpoint of a short run, with its configuration changed as a user's editor would.
fn with_config(tiny: &TinyRun, name: &str, edit: impl Fn(String) -> String) -> String {
    let (from, to) = (tiny.path("run/checkpoints/latest"), tiny.path(name));
    fs::create_dir_all(&to).unwrap();
    for file in ["config.json", "model.safetensors", "ema.safetensors"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let text = fs::read_to_string(to.join("config.json")).unwrap();
    fs::write(to.join("config.json"), edit(text)).unwrap();
    tiny.text(name)
}

#[test]
fn weights_of_another_base_width_are_refused_with_the_reason() {
    let tiny = TinyRun::new();
    tiny.train("run", &["train.steps=1"]).succeeds();
    let same = with_config(&tiny, "same", |text| text);
    let other = with_config(&tiny, "other", |text| text.replace("\"base_width\": 12", "\"base_width\": 24"));
    let out = tiny.text("x.png");
    let sample = |from: &str| {
        mudit(["sample", "--offline", "--checkpoint", from, "--steps", "2", "-n", "4", "--out", &out])
    };
    sample(&same).succeeds();
    fs::remove_file(&out).unwrap();
    let reason = ["base width 12", "base width 24", "scaled by 1 instead of 0.5", "--fold-output-multiplier"];
    sample(&other).run().refuses(1, &reason);
    assert!(!Path::new(&out).exists());
    let (weights, engine) = (format!("{other}/model.safetensors"), tiny.text("engine"));
    let build = [
        "build-engine",
        "--provider",
        "none",
        "--program",
        "denoise",
        "--model",
        &other,
        "--weights",
        &weights,
    ];
    mudit(build.into_iter().chain(["--out", &engine])).run().refuses(1, &reason);
    tiny.train("run", &["train.steps=2", "mup.base_width=24"])
        .run()
        .refuses(1, &["mup.base_width: 12 before, 24 now"]);
}

#[test]
fn a_plain_checkpoint_computes_what_the_mup_one_does() {
    let tiny = TinyRun::new();
    tiny.train("run", &["train.steps=6", "mup.output_multiplier=3.0", "train.learning_rate=1e-2"]).succeeds();
    let (run, plain) = (tiny.text("run"), tiny.text("plain"));
    let convert = || mudit(["convert", "--fold-output-multiplier", "--checkpoint", &run, "--out", &plain]);
    let report = convert().json();
    assert_eq!(report["scale"].as_f64(), Some(1.5));
    let config = fs::read_to_string(tiny.path("plain/config.json")).unwrap();
    assert!(!config.contains("base_width"), "{config}");
    for weights in ["model", "ema"] {
        let samples = |from: &str| {
            let out = tiny.text(&format!("{weights}.safetensors"));
            let line = [
                "sample",
                "--offline",
                "--checkpoint",
                from,
                "--weights",
                weights,
                "--steps",
                "4",
                "-n",
                "4",
            ];
            mudit(line.into_iter().chain(["--out", &out])).succeeds();
            read_safetensors_file(&out).unwrap()["samples"].to_f32()
        };
        let (mup, folded) = (samples(&run), samples(&plain));
        let distance = |a: &[f32], b: &[f32]| -> f64 {
            let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let size = distance(&mup, &vec![0.0; mup.len()]);
        assert!(distance(&mup, &folded) < 1e-5 * size, "{} of {size}", distance(&mup, &folded));
        // Without the fold it would be another model.
        let bare = with_config(&tiny, "bare", |text| {
            text.replace("\"output_multiplier\": 3.0", "\"output_multiplier\": 1.0")
        });
        mudit(["sample", "--offline", "--checkpoint", &bare, "--out", &tiny.text("y.png")])
            .run()
            .refuses(1, &["output multiplier 3", "output multiplier 1"]);
    }
    convert().run().refuses(1, &["holds a checkpoint already"]);
    mudit(["convert", "--fold-output-multiplier", "--checkpoint", &plain, "--out", &tiny.text("again")])
        .run()
        .refuses(2, &["plain checkpoint already"]);
}

#[test]
fn a_step_that_runs_share_gives_the_bits_of_their_own() {
    use models::{InitScheme, Model, MupConfig};
    use mudit_tests::execution::onnx_runtime;
    use train_engine::config::TrainConfig;
    use train_engine::data::{Batch, Dataset as _, GaussianImages};
    use train_engine::step::read_lock;
    use train_engine::trainer::Trainer;

    within(LIMIT, "sharing a step", || {
        let runtime = onnx_runtime();
        let model = |mup: Option<MupConfig>, init| Model { mup, init, ..crate::tiny::config("ddpm") };
        let images = GaussianImages::new(8, 1, 4, 3);
        let mut x0 = vec![0.0; 8 * 16];
        let y: Vec<i64> = (0..8)
            .map(|i| {
                let mut stream =
                    train_engine::random::Stream::new(0, train_engine::random::Purpose::VaeDraw, 0, 0);
                images.read(i, false, &mut stream, &mut x0[i * 16..(i + 1) * 16]).unwrap()
            })
            .collect();
        let runs = [
            (model(Some(MupConfig { base_width: 3, output_multiplier: 1.7 }), InitScheme::Mup), 1, 1e-2),
            (model(None, InitScheme::Original), 2, 3e-3),
            (model(Some(MupConfig { base_width: 24, output_multiplier: 0.3 }), InitScheme::Mup), 1, 5e-2),
        ];
        let config = |seed, rate| {
            let mut config = TrainConfig::default();
            (config.train.seed, config.train.learning_rate) = (seed, rate);
            (config.train.batch_size, config.train.threads, config.train.weight_decay) = (8, 1, 0.1);
            config
        };
        let train = |trainer: &mut Trainer| -> Vec<f32> {
            for step in 0..3 {
                trainer.step(&Batch { step, indices: vec![], x0: x0.clone(), y: y.clone() }).unwrap();
            }
            let average = trainer.average().unwrap();
            let host = trainer.compiled().host().unwrap();
            let (parameters, ema) = (read_lock(&host.parameters).unwrap(), read_lock(&average).unwrap());
            [&parameters, &ema].iter().flat_map(|a| a.iter().flat_map(|(_, _, v)| v.to_vec())).collect()
        };
        let mut shared: Option<Trainer> = None;
        for (model, seed, rate) in &runs {
            let config = config(*seed, *rate);
            let own = train(&mut Trainer::new(&runtime, &config, model).unwrap());
            let shared = match &mut shared {
                Some(shared) => {
                    shared.restart(&config, model).unwrap();
                    shared
                }
                none => none.insert(Trainer::shared(&runtime, &config, model).unwrap()),
            };
            assert!(train(shared) == own, "seed {seed}, rate {rate}");
        }
        let other = crate::tiny::changed(&runs[0].0, |dit| dit.depth = 2);
        assert!(shared.unwrap().restart(&config(1, 1e-2), &other).is_err(), "another shape");
    });
}
