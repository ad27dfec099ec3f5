//! Whole commands on the CUDA provider: what reaches the device and comes back, not what is computed there.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{NO_COMPILER, Stage, UPDATES_ONLY, staged};

/// A checkpoint of the smallest fixture.
pub(super) fn checkpoint(folder: &Path) -> PathBuf {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/dit-d48-h4-p2");
    let place = folder.join("checkpoint");
    std::fs::create_dir(&place).unwrap();
    for (from, to) in [("config.json", "config.json"), ("weights.safetensors", "model.safetensors")] {
        std::fs::copy(fixture.join(from), place.join(to)).unwrap();
    }
    place
}

fn mudit(stage: &Stage, folder: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mudit-under-test"));
    stage.environment(&mut command).current_dir(folder).args(line.split_whitespace()).output().unwrap()
}

fn succeeds(stage: &Stage, folder: &Path, line: &str) -> String {
    let done = mudit(stage, folder, line);
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "mudit {line}\n{text}\n{}", String::from_utf8_lossy(&done.stderr));
    text
}

#[test]
fn sampling_runs_on_the_gpu_in_every_precision() {
    let Some(stage) = staged("sampling on the stand-in") else { return };
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    for precision in ["f32", "bf16", "f16"] {
        let out = format!("{precision}.npz");
        let line = format!(
            "sample --offline --checkpoint checkpoint --steps 2 --count 3 --provider cuda --precision {precision} --out {out}"
        );
        succeeds(stage, folder.path(), &line);
        assert!(folder.path().join(out).is_file());
    }
}

#[test]
fn an_engine_for_the_gpu_is_compared_before_it_is_seen_and_says_who_runs_it() {
    let Some(stage) = staged("an engine on the stand-in") else { return };
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let line = "build-engine --offline --model checkpoint --weights checkpoint/model.safetensors --program step --batch 2 \
                --precision bf16 --provider cuda --explain --out e";
    // Nothing computes there, so the comparison must fail, and nothing may be left.
    let refused = mudit(stage, folder.path(), line);
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && words.contains("the engine is not published"), "{words}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing but the checkpoint");
    let unproven = format!("{line} --no-validation");
    let told = succeeds(stage, folder.path(), &unproven);
    assert!(told.contains("nodes on CUDAExecutionProvider") && !told.contains("nodes on CPU"), "{told}");
    assert!(succeeds(stage, folder.path(), &unproven).contains("is up to date"));
    let other = mudit(stage, folder.path(), &format!("{unproven} --for sm_90"));
    let differs = String::from_utf8_lossy(&other.stdout);
    assert!(differs.contains("architecture: built from sm_80, asked for sm_90"), "{differs}");
}

#[test]
fn a_replay_on_the_gpu_takes_its_steps_there() {
    let Some(stage) = staged("replay on the stand-in") else { return };
    let folder = tempfile::tempdir().unwrap();
    let place = checkpoint(folder.path());
    let batches = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/dit-d48-h4-p2/batches.safetensors");
    for precision in ["f32", "bf16", "f16"] {
        let line = format!(
            "replay --offline --model checkpoint --weights checkpoint/model.safetensors --batches {} --provider cuda \
             --precision {precision} --out p.safetensors --ema-out e.safetensors --grads-out g.safetensors --json",
            batches.display()
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_mudit-under-test"));
        command.current_dir(folder.path()).args(line.split_whitespace());
        let done = stage.environment(&mut command).env(UPDATES_ONLY.0, UPDATES_ONLY.1).output().unwrap();
        assert!(done.status.success(), "{precision}: {}", String::from_utf8_lossy(&done.stderr));
        let told: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(told["steps"].as_array().unwrap().len(), 3);
        // Gradients are zero there: parameters and average come back as they were given.
        let [start, parameters, average, gradients] =
            [place.join("model.safetensors"), "p".into(), "e".into(), "g".into()].map(|file: PathBuf| {
                let file = folder.path().join(file).with_extension("safetensors");
                runtime::read_safetensors_file(file).unwrap()
            });
        for (name, values) in &start {
            let values = values.to_f32();
            assert!(parameters[name].to_f32() == values, "{precision}: {name}");
            // decay·x + (1 − decay)·x is x but for its rounding.
            let average = average[name].to_f32();
            let near = average.iter().zip(&values).all(|(a, v)| (a - v).abs() <= 1e-6 * v.abs());
            assert!(near, "{precision}: average of {name}");
        }
        assert!(!gradients.is_empty() && gradients.values().all(|g| g.to_f32().iter().all(|v| *v == 0.0)));
    }
}

/// A run's file, and one of a sweep over two widths, on eight images of nothing.
fn runs(folder: &Path) {
    let idx = |magic: u32, sizes: &[u32]| {
        let words = std::iter::once(magic).chain(sizes.iter().copied()).flat_map(u32::to_be_bytes);
        words.chain(vec![0; sizes.iter().product::<u32>() as usize]).collect::<Vec<u8>>()
    };
    std::fs::write(folder.join("train-images-idx3-ubyte"), idx(0x803, &[8, 8, 8])).unwrap();
    std::fs::write(folder.join("train-labels-idx1-ubyte"), idx(0x801, &[8])).unwrap();
    let run = "[model]\npatch_size = 4\nhidden_size = 24\ndepth = 1\nnum_heads = 2\nnum_classes = 2\n[mup]\nbase_width = 12\n\
               [data]\nkind = \"idx\"\npath = \".\"\n[train]\nsteps = 2\nbatch_size = 4\n";
    std::fs::write(folder.join("run.toml"), run).unwrap();
    let sweep = "config = \"run.toml\"\nhead_size = 12\n[parameters]\n\"model.hidden_size\" = { values = [24, 48] }\n\
                 \"train.seed\" = { values = [0, 1] }\n";
    std::fs::write(folder.join("sweep.toml"), sweep).unwrap();
}

#[test]
fn runs_and_sweeps_tell_the_memory_that_they_will_take() {
    let Some(stage) = staged("plans on the stand-in") else { return };
    let folder = tempfile::tempdir().unwrap();
    runs(folder.path());
    let told = |line: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mudit-under-test"));
        command.current_dir(folder.path()).args(line.split_whitespace());
        let done = stage.environment(&mut command).env(UPDATES_ONLY.0, UPDATES_ONLY.1).output().unwrap();
        let words = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{line}: {words}");
        words
    };
    let run = "train --offline --config run.toml --provider cuda --precision bf16";
    let plain = told(&format!("{run} --out plain --set sample.every_steps=0"));
    let pictured = told(&format!("{run} --out pictured --set sample.every_steps=100"));
    for words in [&plain, &pictured] {
        assert!(words.contains("memory of GPU 0") && words.contains("values inside kernels"), "{words}");
    }
    let pictures = "pictures: the average once more";
    assert!(!plain.contains(pictures) && pictured.contains(pictures), "{pictured}");
    // One for each shape of a step, whatever the number of trials.
    let swept = told("sweep run --offline --config sweep.toml --provider cuda --out s");
    assert_eq!(swept.matches("memory of GPU 0").count(), 2, "{swept}");
}

#[test]
fn built_engines_are_run_on_the_gpu() {
    let Some(stage) = staged("engines in use on the stand-in") else { return };
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let build = "build-engine --offline --model checkpoint --weights checkpoint/model.safetensors --provider cuda --no-validation \
                 --precision bf16 --json";
    let built =
        succeeds(stage, folder.path(), &format!("{build} --program step-rows,step --buckets 2,4 --out rows"));
    let built: serde_json::Value = serde_json::from_str(&built).unwrap();
    // The form for all batch sizes, and each by itself; nothing is on the CPU.
    let placements = built["manifest"]["placements"].as_object().unwrap();
    for file in ["step-rows-b2.onnx", "step-rows-b4.onnx", "step-rows.onnx", "step.onnx"] {
        assert!(placements.contains_key(file), "{file}");
    }
    for (file, who) in placements {
        let providers: Vec<&String> = who["nodes"].as_object().unwrap().keys().collect();
        assert_eq!(providers, ["CUDAExecutionProvider"], "{file}");
        assert!(who.get("elsewhere").is_none(), "{file}: {who}");
    }
    succeeds(stage, folder.path(), &format!("{build} --program step --batch 3 --out step"));
    for (engine, provider, cfg) in [
        ("rows", "cuda", "1"),
        ("rows", "cuda+graph", "3"),
        ("step", "cuda", "3"),
        ("step", "cuda+graph", "3"),
    ] {
        let out = format!("{engine}-{provider}-{cfg}.npz");
        let line = format!(
            "sample --offline --engine {engine} --provider {provider} --cfg {cfg} --steps 2 --count 3 --out {out}"
        );
        succeeds(stage, folder.path(), &line);
        assert!(folder.path().join(out).is_file());
    }
    let refused = mudit(stage, folder.path(), "sample --offline --engine rows --provider cpu");
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && words.contains("--provider cuda") && words.contains("--provider cpu"),
        "{words}"
    );
}

#[test]
fn engines_that_carry_their_kernels_ask_for_no_compiler_and_say_once_what_is_not_recorded() {
    let Some(stage) = staged("engines without a compiler on the stand-in") else { return };
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let build = "build-engine --offline --model checkpoint --weights checkpoint/model.safetensors --provider cuda --no-validation \
                 --program step --batch 2 --out e";
    succeeds(stage, folder.path(), build);
    let without_compiler = |line: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mudit-under-test"));
        stage.environment(&mut command).current_dir(folder.path()).args(line.split_whitespace());
        // A cache of its own: what was compiled before must not help.
        command.env("MUDIT_CACHE", folder.path().join("cache"));
        command.env("MUDIT_CUDA_LIBRARIES", stage.folder.with_file_name(NO_COMPILER)).output().unwrap()
    };
    let words = |done: &Output| String::from_utf8_lossy(&done.stderr).into_owned();
    let sample = "sample --offline --steps 2 --count 3 --out x.npz";
    let refused = without_compiler(&format!("{sample} --checkpoint checkpoint --provider cuda"));
    assert!(!refused.status.success() && words(&refused).contains("NVRTC"), "{}", words(&refused));
    let done = without_compiler(&format!("{sample} --engine e"));
    assert!(done.status.success(), "{}", words(&done));

    // What a build has found that no recorded run may have.
    let place = folder.path().join("e/engine.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&place).unwrap()).unwrap();
    manifest["programs"][0]["unrepeatable"] = serde_json::json!(["the node in question"]);
    std::fs::write(&place, manifest.to_string()).unwrap();
    for (provider, times) in [("cuda+graph", 1), ("cuda", 0)] {
        let done = mudit(stage, folder.path(), &format!("{sample} --engine e --provider {provider}"));
        let told = words(&done);
        assert!(done.status.success(), "{told}");
        assert_eq!(told.matches("is not recorded as a CUDA graph").count(), times, "{told}");
        assert_eq!(told.matches("the node in question").count(), times, "{told}");
    }
}
