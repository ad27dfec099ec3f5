//! Every command, run as a user would.

use std::collections::BTreeSet;
use std::fs;

use mudit::commands::Command;
use mudit::fid::metrics::moments::Gaussian;
use mudit::fid::statistics::Statistics;

use crate::process::{Mudit, mudit};
use crate::scene::Scene;
use crate::tiny_run::idx;

/// A run of each command that succeeds without any network.
const RUNS: [&str; 14] = [
    "quickstart --offline --out quick --minutes 0.01 --set data.path=fashion --set train.batch_size=8 \
     --set model.hidden_size=16 --set model.depth=1 --set model.num_heads=2 --set sample.steps=2 --set train.warmup_steps=1 \
     --fid-images 0",
    "doctor --json",
    "inspect DiT-S/8@8x8x1:10 --json",
    "profile DiT-S/8@8x8x1:10 --offline --batch 2 --repeat 2 --svg p.svg --json",
    "build-engine --offline --model checkpoint --program loss --batch 2 --out e --json",
    "train --offline --config run.toml --out r --json",
    "replay --offline --model checkpoint --weights checkpoint/model.safetensors --batches batches.safetensors \
     --out o.safetensors --json",
    "sample --offline --checkpoint checkpoint --steps 3 --count 2 --out x.png --json",
    "coord-check --offline --model DiT-S/8@8x8x1:10 --set model.depth=1 --head-size 16 --widths 16,32 --seeds 1 --steps 1 \
     --out c --tolerance 9 --json",
    "convert --fold-output-multiplier --checkpoint r --out CONVERTED --json",
    "sweep run --offline --config sweep.toml --out w --json",
    "transfer --offline --config sweep.toml --out t --json",
    "data check --offline --kind idx --path data --grid g.png --json",
    "fid calc statistics.npz --ref statistics.npz --out fid.json --json",
];

/// Commands that do not end by themselves or need a server; `serve/process.rs` runs them.
const SERVERS: [&str; 2] = ["serve", "bench-serve"];

#[test]
fn every_command_runs() {
    let scene = Scene::new();
    fashion(&scene);
    let rates = "[parameters]\n\"train.learning_rate\" = { octaves = [-9, -8] }\n";
    scene.write("sweep.toml", format!("config = \"run.toml\"\n{rates}[target]\n\"train.seed\" = 1\n"));
    let pool = Gaussian::new(vec![0.0; 2], &[1.0, 0.5, 0.5, 1.0]).unwrap();
    let statistics = Statistics { pool, spatial: None, features: Vec::new(), about: None };
    statistics.write(&scene.path("statistics.npz")).unwrap();
    for line in RUNS {
        let text = scene.mudit(line).succeeds();
        assert!(!text.is_empty(), "{line}");
        if line.ends_with("--json") {
            serde_json::from_str::<serde_json::Value>(&text)
                .unwrap_or_else(|e| panic!("{line}: {e}: {text}"));
        }
        // The same for people.
        let plain = scene.mudit(&line.trim_end_matches("--json").replace("CONVERTED", "again")).succeeds();
        assert!(!plain.is_empty(), "{line}");
    }
    let names = RUNS.iter().map(|line| line.split(' ').next().unwrap()).chain(SERVERS);
    let run: BTreeSet<String> = names.map(str::to_owned).collect();
    assert_eq!(run, Command::names().into_iter().collect(), "a command has no run");
}

/// A stand-in for Fashion-MNIST: 32 training and 8 test images of its size and classes.
fn fashion(scene: &Scene) {
    for (name, count) in [("train", 32), ("t10k", 8)] {
        let pixels: Vec<u8> = (0..count * 784).map(|i| (i * 31 % 256) as u8).collect();
        let labels: Vec<u8> = (0..count).map(|i| (i % 10) as u8).collect();
        scene.write(&format!("fashion/{name}-images-idx3-ubyte"), idx(0x803, &[count, 28, 28], &pixels));
        scene.write(&format!("fashion/{name}-labels-idx1-ubyte"), idx(0x801, &[count], &labels));
    }
}

#[test]
fn quickstart_makes_what_it_promises() {
    let scene = Scene::new();
    fashion(&scene);
    let quickstart = || scene.mudit(RUNS[0]);
    let said = quickstart().succeeds();
    for name in ["samples.png", "loss.svg", "metrics.jsonl", "checkpoints/latest", "config.toml"] {
        assert!(scene.path("quick").join(name).exists() && said.contains(name), "{name}: {said}");
    }
    let picture = image::open(scene.path("quick/samples.png")).unwrap();
    assert!(picture.width() >= 280 && picture.height() >= 280, "ten columns of ten images of 28 × 28");
    assert!(said.contains("next:") && said.contains("mudit sample --checkpoint quick"), "{said}");
    let pictures = fs::read(scene.path("quick/samples.png")).unwrap();
    let said = quickstart().succeeds();
    assert!(said.contains("quick is finished"), "{said}");
    assert!(fs::read(scene.path("quick/samples.png")).unwrap() == pictures);
    // What it says comes next works.
    scene
        .mudit("sample --offline --checkpoint quick --classes 5,Bag,9 --cfg 3 --steps 2 --out more.png")
        .succeeds();
}

#[test]
fn inspect_tells_signatures_and_counts() {
    let json = |args: &[&str]| mudit(["inspect"].iter().chain(args)).json();
    let counts = json(&["DiT-XL/2"]);
    assert_eq!(counts["trainable_parameters"].as_u64(), Some(674_834_720));
    assert!((counts["forward_gmacs"].as_f64().unwrap() - 118.62).abs() <= 0.02, "{counts}");
    let text = mudit(["inspect", "DiT-S/2"]).succeeds();
    assert!(text.contains("32.87 M trainable") && text.contains("blocks.*.attn"), "{text}");
    for (program, inputs, outputs) in [
        ("denoise", &["x", "t", "y"][..], &["out"][..]),
        ("denoise-cfg", &["x", "t", "y", "guidance"], &["out"]),
        (
            "step",
            &["x", "t", "y", "guidance", "coef", "noise", "history"],
            &["x_next", "x0_hat", "history_next"],
        ),
        (
            "loss",
            &["x0", "noise", "t", "y", "hp.output_multiplier", "hp.vb_weight"],
            &["loss", "loss.mse", "loss.vb"],
        ),
    ] {
        let signature = json(&["DiT-S/4", "--program", program, "--batch", "3"]);
        let names = |side: &str| -> Vec<String> {
            let all = signature[side].as_array().unwrap().iter();
            all.map(|spec| spec["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!((names("inputs"), names("outputs")), (owned(inputs), owned(outputs)), "{program}");
        mudit(["inspect", "DiT-S/4", "--program", program]).succeeds();
    }
    let text = mudit(["inspect", "DiT-S/8", "--program", "train-step", "--graph"]).succeeds();
    assert!(text.contains("return grad.final_layer.linear.bias = %"), "the graph has its gradients");
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

#[test]
fn data_is_counted_and_shown() {
    let scene = Scene::new();
    let check = |line: &str| -> Mudit { scene.mudit(&format!("data check --offline {line}")) };
    let report = check("--kind idx --path data --grid g.png").json();
    assert_eq!((report["images"].as_u64(), &report["shape"]), (Some(16), &serde_json::json!([1, 8, 8])));
    assert_eq!(report["per_class"], serde_json::json!([4, 4, 4, 4]));
    assert!(image::open(scene.path("g.png")).unwrap().width() >= 32);
    let images = "--kind idx --path data/train-images-idx3-ubyte --labels data/train-labels-idx1-ubyte";
    assert_eq!(check(images).json()["images"], report["images"]);
    fashion(&scene);
    let report = check("--path fashion").json();
    assert_eq!((report["images"].as_u64(), report["classes"][9].as_str()), (Some(32), Some("Ankle boot")));
    let found = scene.mudit("data fetch --offline --path fashion").succeeds();
    assert_eq!(found.lines().count(), 4, "{found}");
}
