//! Training, the distance of its samples and a sweep as commands on the GPU, compared with the same commands on the CPU.
//! With `MUDIT_TRY_ON_CPU` set they run there twice, which tries this file where no GPU is.

use std::fs;
use std::path::Path;

use mudit_tests::draws::Draws;
use mudit_tests::pictures::pictures_and_network;
use serde_json::Value;
use tempfile::TempDir;

use super::commands::succeeds;
use super::on_gpu;

const SIDE: usize = 8;
const IMAGES: usize = 64;

/// The provider that is proven, and the precisions it has with the relative error that each may have.
fn proven(what: &str) -> Option<(&'static str, &'static [(&'static str, f64)])> {
    if std::env::var_os("MUDIT_TRY_ON_CPU").is_some() {
        return Some(("cpu", &[("f32", 0.0)]));
    }
    // In f16 a step may be left out.
    on_gpu(what).map(|_| ("cuda", [("f32", 1e-4), ("bf16", 5e-2), ("f16", 5e-2)].as_slice()))
}

/// A folder with pictures under MNIST's names, a run's configuration and a sweep's.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    let idx = |magic: u32, sizes: &[usize], data: Vec<u8>| -> Vec<u8> {
        let words = std::iter::once(magic).chain(sizes.iter().map(|s| *s as u32));
        words.flat_map(u32::to_be_bytes).chain(data).collect()
    };
    let mut draws = Draws::named("pictures");
    let pixels = (0..IMAGES * SIDE * SIDE).map(|_| draws.below(256) as u8).collect();
    write("train-images-idx3-ubyte", &idx(0x803, &[IMAGES, SIDE, SIDE], pixels));
    let labels = (0..IMAGES).map(|i| (i % 4) as u8).collect();
    write("train-labels-idx1-ubyte", &idx(0x801, &[IMAGES], labels));
    let run = "[model]\npatch_size = 2\nhidden_size = 48\ndepth = 2\nnum_heads = 4\n[data]\nkind = \"idx\"\npath = \".\"\n\
               [train]\nsteps = 20\nbatch_size = 16\nlearning_rate = 1e-3\nclip = 1.0\nema_decay = 0.9\n\
               [log]\nevery_steps = 1\n";
    write("run.toml", run.as_bytes());
    let sweep = "config = \"run.toml\"\nmethod = \"grid\"\n[parameters]\n\"train.learning_rate\" = { values = [1e-3, 2e-3] }\n\
                 \"train.seed\" = { values = [0, 1] }\n";
    write("sweep.toml", sweep.as_bytes());
    folder
}

/// The losses of a run, step by step.
fn losses(run: &Path) -> Vec<f64> {
    let rows = train_engine::metrics::read(&run.join("metrics.jsonl")).unwrap_or_else(|e| panic!("{e}"));
    rows.iter().filter_map(|(_, row)| row.get("loss")?.as_f64()).collect()
}

#[allow(clippy::print_stdout, reason = "what is measured is told")]
fn near(got: &[f64], want: &[f64], limit: f64, what: &str) {
    assert!(!want.is_empty() && got.len() == want.len(), "{what}: {got:?} for {want:?}");
    let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max);
    println!("{what}: {apart:.1e} from the CPU's");
    assert!(apart <= limit, "{what}: {got:?} for {want:?}");
}

#[test]
fn a_run_is_the_cpus() {
    let Some((provider, precisions)) = proven("train") else { return };
    let folder = folder();
    succeeds(folder.path(), "train --offline --config run.toml --provider cpu --out host");
    let want = losses(&folder.path().join("host"));
    for (precision, limit) in precisions {
        let line = format!(
            "train --offline --config run.toml --provider {provider} --precision {precision} --out {precision}"
        );
        succeeds(folder.path(), &line);
        near(&losses(&folder.path().join(precision)), &want, *limit, &format!("losses in {precision}"));
    }
}

fn distance(file: &Path) -> [f64; 1] {
    let result: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    [result["metrics"]["fid"].as_f64().unwrap_or_else(|| panic!("{result}"))]
}

#[test]
fn distances_are_the_cpus() {
    let Some((provider, precisions)) = proven("fid") else { return };
    let folder = folder();
    pictures_and_network(folder.path(), IMAGES, SIDE);
    let fid = |line: &str, provider: &str| {
        succeeds(
            folder.path(),
            &format!("fid {line} --provider {provider} --offline --few --network net.onnx"),
        )
    };
    let mut providers = vec![("host", "cpu"), ("gpu", provider)];
    if provider != "cpu" && "tensorrt".parse::<runtime::Provider>().unwrap().check().is_ok() {
        providers.push(("engine", "tensorrt"));
    }
    let of = |name: &str| distance(&folder.path().join(format!("{name}.json")));
    for (name, provider) in providers {
        fid(&format!("ref real.npz --out {name}.npz"), provider);
        fid(&format!("calc fake.npz --ref {name}.npz --out {name}.json"), provider);
        near(&of(name), &of("host"), 1e-3, &format!("FID of pictures on {provider}"));
    }
    // Straight from a checkpoint: the same samples up to rounding.
    succeeds(folder.path(), "train --offline --config run.toml --provider cpu --out run");
    let sampled = "calc --checkpoint run --steps 5 -n 40 --ref host.npz";
    fid(&format!("{sampled} --out samples.json"), "cpu");
    for (precision, limit) in precisions {
        fid(&format!("{sampled} --precision {precision} --out {precision}.json"), provider);
        near(&of(precision), &of("samples"), limit.max(1e-2), &format!("FID of samples in {precision}"));
    }
}

#[test]
fn a_sweep_is_the_cpus() {
    let Some((provider, precisions)) = proven("sweep") else { return };
    let folder = folder();
    let results = |provider: &str, precision: &str, out: &str| {
        let options = format!("--offline --provider {provider} --precision {precision} --out {out}");
        succeeds(folder.path(), &format!("sweep run --config sweep.toml {options}"));
        let told: Value =
            serde_json::from_str(&succeeds(folder.path(), &format!("sweep collect --out {out} --json")))
                .unwrap();
        assert_eq!(told["done"], 4, "{told}");
        let points = told["curves"][0]["points"].as_array().unwrap();
        let means = points.iter().map(|point| point["mean"].as_f64().unwrap_or_else(|| panic!("{told}")));
        means.collect::<Vec<_>>()
    };
    let want = results("cpu", "f32", "host");
    for (precision, limit) in precisions {
        near(&results(provider, precision, precision), &want, *limit, &format!("a sweep in {precision}"));
    }
}
