//! What a training run computes, refuses and keeps.

use std::fs;
use std::path::Path;

use mudit_tests::difference::relative_l2;
use mudit_tests::execution::array;
use runtime::read_safetensors_file;
use train_engine::checkpoint;

use crate::process::mudit;
use crate::tiny_run::{TinyRun, losses};

/// Relative distance of two files' tensors, all but the K third of the `qkv` biases: their gradient is rounding noise,
/// which AdamW turns into whole steps.
fn distance(got: &Path, want: &Path) -> f64 {
    let [got, want] = [got, want].map(|path| read_safetensors_file(path).unwrap_or_else(|e| panic!("{e}")));
    assert!(got.keys().eq(want.keys()));
    let mut values = [Vec::new(), Vec::new()];
    for (name, tensor) in &want {
        for (all, tensor) in values.iter_mut().zip([&got[name], tensor]) {
            let part = tensor.to_f32();
            let third = part.len() / 3;
            if name.ends_with("qkv.bias") {
                all.extend([&part[..third], &part[2 * third..]].concat());
            } else {
                all.extend(part);
            }
        }
    }
    let [got, want] = values.map(|v| array(&[v.len()], &v));
    relative_l2(&got, &want)
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let tiny = TinyRun::new();
    for accumulate in [1, 2, 4] {
        let (name, set) = (format!("by-{accumulate}"), format!("train.accumulate={accumulate}"));
        tiny.train(&name, &["train.steps=8", "mup.init=mup", &set]).succeeds();
    }
    let whole = losses(&tiny.path("by-1"));
    for name in ["by-2", "by-4"] {
        let parts = losses(&tiny.path(name));
        assert_eq!(parts.len(), 8);
        let mut worst: f64 = 0.0;
        for ((_, part), (_, whole)) in parts.iter().zip(&whole) {
            for key in ["loss", "loss.mse", "loss.vb", "grad_norm"] {
                let (part, whole) = (part[key].as_f64().unwrap(), whole[key].as_f64().unwrap());
                worst = worst.max((part - whole).abs() / whole.abs());
            }
        }
        let file = "checkpoints/latest/model.safetensors";
        let apart = distance(&tiny.path(name).join(file), &tiny.path("by-1").join(file));
        println!("{name}: losses {worst:.1e}, parameters {apart:.1e} apart");
        assert!(worst <= 1e-5 && apart <= 1e-5, "{name}: losses {worst:e}, parameters {apart:e}");
    }
}

#[test]
fn another_configuration_is_refused_by_its_keys() {
    let tiny = TinyRun::new();
    tiny.train("run", &["train.steps=5"]).succeeds();
    let before = fs::read(tiny.path("run/config.toml")).unwrap();
    let done = tiny.train("run", &["train.steps=10", "train.learning_rate=0.5", "mup.base_width=24"]).run();
    done.refuses(1, &["train.learning_rate: 0.001 before, 0.5 now", "mup.base_width: 12 before, 24 now"]);
    assert_eq!(fs::read(tiny.path("run/config.toml")).unwrap(), before);
    // What does not change the steps already done may change.
    let free =
        ["train.steps=10", "log.every_steps=3", "checkpoint.keep=1", "train.threads=2", "sample.per_class=1"];
    tiny.train("run", &free).succeeds();
    assert_eq!(checkpoint::list(&tiny.path("run")).unwrap().len(), 1);
}

#[test]
fn the_configuration_of_a_run_is_enough_to_go_on() {
    let tiny = TinyRun::new();
    tiny.train("run", &["train.steps=5", "train.seed=3"]).succeeds();
    let out = tiny.text("run");
    mudit(["train", "--offline", "--out", &out, "--set", "train.steps=7"]).succeeds();
    let shown = mudit(["train", "--out", &out, "--dry-run"]).succeeds();
    assert!(shown.contains("seed = 3") && shown.contains("steps = 7"), "{shown}");
    assert_eq!(losses(&tiny.path("run")).len(), 7);
}

#[test]
fn without_regular_checkpoints_the_end_is_saved() {
    let tiny = TinyRun::new();
    tiny.train("run", &["train.steps=7", "checkpoint.every_steps=0"]).succeeds();
    let steps: Vec<u64> = checkpoint::list(&tiny.path("run")).unwrap().into_iter().map(|(s, _)| s).collect();
    assert_eq!(steps, [7]);
}

#[test]
fn pictures_plots_and_events_are_drawn_on_the_way() {
    let tiny = TinyRun::new();
    let sampling = ["sample.every_steps=6", "sample.steps=3", "sample.per_class=2", "log.tensorboard=true"];
    tiny.train("run", &[&["train.steps=12"], &sampling[..]].concat()).succeeds();
    for name in ["samples/step-00000006.png", "samples/step-00000012.png"] {
        let picture = image::open(tiny.path("run").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(picture.width() > 4 * 8 && picture.height() > 2 * 8);
    }
    let plot = fs::read_to_string(tiny.path("run/loss.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"));
    let files = fs::read_dir(tiny.path("run")).unwrap().map(|e| e.unwrap().file_name());
    assert_eq!(files.filter(|n| n.to_string_lossy().contains("tfevents")).count(), 1);
    // Pictures change nothing of the run.
    tiny.train("plain", &["train.steps=12"]).succeeds();
    assert_eq!(losses(&tiny.path("run")), losses(&tiny.path("plain")));
}

#[test]
fn a_step_that_is_not_finite_stops_the_run_with_its_evidence() {
    let tiny = TinyRun::new();
    let run = tiny.path("run");
    // Steps of this size square beyond f32 within a few updates.
    let wild =
        ["train.learning_rate=1e12", "train.clip=0", "checkpoint.every_steps=1", "checkpoint.keep=100"];
    let done = tiny.train("run", &wild).run();
    let saved = checkpoint::list(&run).unwrap();
    let (last, path) = saved.last().unwrap();
    let step = last + 1;
    let evidence = run.join(format!("not-finite-step-{step:08}"));
    let remedy = "try a lower `train.learning_rate`";
    done.refuses(1, &[&format!("step {step}: the loss is"), evidence.to_str().unwrap(), remedy]);
    for (_, path) in &saved {
        checkpoint::verify(path).unwrap_or_else(|e| panic!("{e}"));
    }
    // The parameters of the evidence are those of the checkpoint before: nothing was updated.
    let [kept, before] = [&evidence, path].map(|d| fs::read(d.join("model.safetensors")).unwrap());
    assert!(kept == before);
    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(evidence.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["step"].as_u64(), Some(step));
    assert_eq!(report["images"].as_array().unwrap().len(), 8);
    assert!(losses(&run).iter().all(|(s, row)| *s < step && row["loss"].is_number()));

    // The batch replays from finite parameters, and fails again from its own.
    let replay = |weights: &Path, out: &str| {
        let batches = evidence.join("batch.safetensors").display().to_string();
        let [model, weights] = [path.clone(), weights.to_path_buf()].map(|p| p.display().to_string());
        let out = tiny.text(out);
        mudit(["replay", "--model", &model, "--weights", &weights, "--batches", &batches, "--out", &out])
    };
    tiny.train("sane", &["train.steps=5"]).succeeds();
    replay(&tiny.path("sane/checkpoints/latest/model.safetensors"), "after.safetensors").succeeds();
    assert!(tiny.path("after.safetensors").is_file());
    let again = replay(&evidence.join("model.safetensors"), "never.safetensors").run();
    again.refuses(1, &["step `step0`: a gradient is not finite; nothing was written"]);
    assert!(!tiny.path("never.safetensors").exists());
}
