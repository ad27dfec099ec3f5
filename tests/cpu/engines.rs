//! Engine directories: the same bytes every time, weights that no checkpoint shares, and programs that run.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;

use half::f16;
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::{array, onnx_runtime, within};
use mudit_tests::tolerance::MODEL_REACHED;
use runtime::{Binding, Engine, HostData, HostTensor, SessionOptions};

use crate::process::mudit;
use crate::scene::{Scene, contents, fixture, tensors};

const FIXTURE: &str = "dit-d48-h4-p2";

#[test]
fn the_same_command_gives_the_same_bytes() {
    let scene = Scene::new();
    let build = |out: &str| {
        let programs = "denoise,denoise-cfg,step,step-rows,loss,train-step --buckets 1,3";
        let line = format!(
            "build-engine --model checkpoint --weights checkpoint/model.safetensors --program {programs}"
        );
        scene.mudit(&format!("{line} --provider none --out {out}")).succeeds();
        let named = contents(&scene.path(out)).into_iter();
        named.map(|(p, b)| (p.strip_prefix(scene.path(out)).unwrap().to_owned(), b)).collect::<Vec<_>>()
    };
    let first = build("first");
    assert_eq!(first.len(), 12 + 2, "six programs of two sizes, the manifest and the weights");
    assert!(first == build("second"));
    // A directory that is there is replaced as a whole.
    assert!(first == build("first"));
    scene.mudit("inspect first").succeeds();
    Engine::open(scene.path("first")).unwrap().verify().unwrap();
}

#[test]
fn the_largest_training_step_is_small_and_quick() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("engine").display().to_string();
    let line = ["build-engine", "--model", "DiT-XL/2", "--program", "train-step", "--batch", "4"];
    let done = mudit(line.into_iter().chain(["--provider", "none", "--out", &out])).run();
    assert_eq!(done.code, Some(0), "{done}");
    let bytes: u64 = contents(folder.path()).keys().map(|p| fs::metadata(p).unwrap().len()).sum();
    let (memory, seconds) = (done.peak_bytes, done.seconds);
    println!(
        "DiT-XL/2 train-step: {:.1} MB in {seconds:.2} s and {} MB of memory",
        bytes as f64 / 1e6,
        memory >> 20
    );
    assert!(seconds < 5.0, "{seconds} s");
    assert!(bytes < 20 << 20, "{bytes} bytes");
    assert!(memory < 1 << 30, "{memory} bytes of memory");
}

#[test]
fn whoever_writes_to_an_engine_or_a_repository_leaves_the_checkpoint_alone() {
    let scene = Scene::new();
    let build = "build-engine --model checkpoint --program denoise --weights checkpoint/model.safetensors";
    let checkpoint = scene.path("checkpoint/model.safetensors");
    let before = fs::read(&checkpoint).unwrap();
    for (options, weights) in [
        ("--provider none --out e", "e/model.safetensors"),
        ("--provider none --inline --out i", "i/model.safetensors"),
        // The second build replaces the first.
        ("--provider none --inline --no-validation --out e", "e/model.safetensors"),
        ("--export triton --out r", "r/denoise-b1/1/model.safetensors"),
    ] {
        scene.mudit(&format!("{build} {options}")).succeeds();
        let engine = fs::metadata(scene.path(weights)).unwrap();
        assert_eq!((engine.nlink(), engine.len()), (1, before.len() as u64), "{options}");
        // As a tool does that adds a tensor to a file of external data.
        let mut file = fs::OpenOptions::new().append(true).open(scene.path(weights)).unwrap();
        file.write_all(b"more").unwrap();
        assert!(fs::read(&checkpoint).unwrap() == before, "{options}");
    }
    let size = fs::metadata(scene.path("e/denoise-b1.onnx")).unwrap().len();
    assert!(size < 200_000, "{size} bytes without weights");
}

#[test]
fn weights_are_linked_on_request_and_read_only_then() {
    let scene = Scene::new();
    let build = "build-engine --model checkpoint --program denoise --provider none --link-weights --weights";
    scene.mudit(&format!("{build} checkpoint/model.safetensors --out e")).succeeds();
    let at = |name: &str| fs::metadata(scene.path(name)).unwrap();
    assert_eq!(at("e/model.safetensors").ino(), at("checkpoint/model.safetensors").ino());
    assert!(at("e/model.safetensors").permissions().readonly());
}

#[test]
fn an_inlined_engine_has_standard_nodes_alone_and_the_same_answers() {
    let scene = Scene::new();
    let build = "build-engine --offline --model checkpoint --program denoise --batch 4 --weights";
    for (options, out) in [("", "functions"), ("--inline", "inlined")] {
        scene.mudit(&format!("{build} checkpoint/model.safetensors {options} --out {out}")).succeeds();
    }
    let manifest =
        |engine: &str| Engine::open(scene.path(engine)).unwrap().manifest().programs[0].native_ops.clone();
    assert!(!manifest("functions").is_empty() && manifest("inlined").is_empty());
    let [want, got] = ["functions", "inlined"].map(|engine| answer(&scene, engine, 4));
    let error = relative_l2(&array(&[got.len()], &got), &array(&[want.len()], &want));
    assert!(error <= MODEL_REACHED, "{error:e}");
    let again =
        scene.mudit(&format!("{build} checkpoint/model.safetensors --inline --out functions --explain"));
    assert!(again.succeeds().contains("functions"), "the key tells what differs");
}

/// The answer of an engine's `denoise` for the fixture's first samples.
fn answer(scene: &Scene, engine: &str, batch: usize) -> Vec<f32> {
    let inputs = tensors(&fixture(FIXTURE, "inputs.safetensors"));
    let folder = scene.path(engine);
    within(std::time::Duration::from_mins(1), "running an engine", move || {
        let engine = Engine::open(folder).unwrap_or_else(|e| panic!("{e}"));
        let options = SessionOptions { threads: 1, spinning: false, ..SessionOptions::default() };
        let session = engine.session(&onnx_runtime(), "denoise", batch, &options);
        let mut binding = Binding::owned(&session.unwrap_or_else(|e| panic!("{e}"))).unwrap();
        binding.set_input("x", &inputs["forward_x"].to_f32()[..batch * 256]).unwrap();
        binding.set_input("t", &inputs["forward_t"].to_f32()[..batch]).unwrap();
        binding.set_input("y", &inputs["forward_y"].to_i64().unwrap()[..batch]).unwrap();
        binding.run().unwrap_or_else(|e| panic!("{e}"));
        binding.output_f32("out").unwrap().to_vec()
    })
}

#[test]
fn an_engine_answers_as_the_reference_does() {
    let scene = Scene::new();
    let build =
        "build-engine --offline --model checkpoint --program denoise --buckets 2,4 --provider cpu --weights";
    let report = scene.mudit(&format!("{build} checkpoint/model.safetensors --out e")).json();
    assert_eq!(report["first_runs"].as_array().unwrap().len(), 2, "each program is loaded and run once");
    let want = tensors(&fixture(FIXTURE, "expected.safetensors"))["forward_out"].to_f32();
    for batch in [2, 4] {
        let got = answer(&scene, "e", batch);
        let error = relative_l2(&array(&[got.len()], &got), &array(&[got.len()], &want[..got.len()]));
        assert!(error <= MODEL_REACHED, "batch {batch}: {error:e}");
    }
}

#[test]
fn weights_of_half_precision_are_converted() {
    let scene = Scene::new();
    scene.spoiled("half", |all| {
        for tensor in all.values_mut() {
            let values = tensor.to_f32().into_iter().map(f16::from_f32).collect();
            *tensor = HostTensor::new(tensor.shape().clone(), HostData::F16(values)).unwrap();
        }
    });
    // The same numbers, once more in f32.
    scene.spoiled("whole", |all| {
        for tensor in all.values_mut() {
            let values = tensor.to_f32().into_iter().map(|v| f16::from_f32(v).to_f32()).collect();
            *tensor = HostTensor::f32(tensor.shape().clone(), values).unwrap();
        }
    });
    for name in ["half", "whole"] {
        let line = format!(
            "build-engine --model {name} --weights {name}/model.safetensors --program denoise --batch 4"
        );
        scene.mudit(&format!("{line} --provider none --out engine-of-{name}")).succeeds();
    }
    assert!(answer(&scene, "engine-of-half", 4) == answer(&scene, "engine-of-whole", 4));
    let kept = tensors(&scene.path("half/model.safetensors"));
    assert!(kept.values().all(|t| matches!(t.data(), HostData::F16(_))), "the file itself is as it was");
}

#[test]
fn a_triton_repository_holds_models_that_run() {
    let scene = Scene::new();
    let line = "build-engine --model checkpoint --weights checkpoint/model.safetensors --program denoise --buckets 1,3";
    let report = scene.mudit(&format!("{line} --export triton --out repository --json")).succeeds();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["models"].as_array().unwrap().len(), 2);
    scene.mudit(&format!("{line} --out engine --provider none")).succeeds();
    let (repository, engine) = (scene.path("repository"), Engine::open(scene.path("engine")).unwrap());
    let config = fs::read_to_string(repository.join("denoise-b3/config.pbtxt")).unwrap();
    assert!(config.contains("{ name: \"x\" data_type: TYPE_FP32 dims: [ 3, 4, 8, 8 ] }"), "{config}");
    // The weights are the checkpoint's own file, and the model finds them.
    let outputs = within(std::time::Duration::from_mins(1), "two runs", move || {
        let (runtime, options) = (onnx_runtime(), SessionOptions::default());
        let file = repository.join("denoise-b3/1/model.onnx");
        let sessions = [
            runtime::Session::load_file(&runtime, file, None, &options),
            engine.session(&runtime, "denoise", 3, &options),
        ];
        sessions.map(|session| {
            let mut binding = Binding::owned(&session.unwrap()).unwrap();
            binding.input_f32("x").unwrap().fill(0.5);
            binding.set_input("y", &[1_i64, 2, 3]).unwrap();
            binding.run().unwrap();
            binding.output_f32("out").unwrap().to_vec()
        })
    });
    assert!(outputs[0] == outputs[1] && outputs[0].iter().any(|v| *v != 0.0));
    scene.refuses(&format!("{line} --export triton --out repository"), 1, &["repository", "exists"]);
    scene.refuses(
        "build-engine --model checkpoint --program loss --export triton --out other",
        2,
        &["loss", "sampling programs"],
    );
}

#[test]
fn a_built_engine_was_compared_with_the_plain_program_before_it_was_seen() {
    let scene = Scene::new();
    let line = "build-engine --offline --model checkpoint --weights checkpoint/model.safetensors --buckets 1,3 \
                --program denoise,denoise-cfg,step,step-rows,loss,train-step";
    let report = scene.mudit(&format!("{line} --out e")).json();
    let outputs = |program: &str| {
        let runs = report["first_runs"].as_array().unwrap();
        runs.iter().find(|r| r["program"] == program).unwrap()["validation"]["outputs"].as_u64().unwrap()
    };
    assert_eq!((outputs("step"), outputs("loss")), (3, 3));
    assert!(outputs("train-step") > 30, "each gradient by itself");
    let runs = report["first_runs"].as_array().unwrap();
    assert_eq!(runs.len(), 12);
    for run in runs {
        let (validation, batch) = (&run["validation"], &run["batch"]);
        let difference = validation["difference"].as_f64().unwrap();
        assert!(difference > 0.0 && difference < 1e-4, "{run}");
        let trains = run["program"] == "loss" || run["program"] == "train-step";
        let expected = if trains || batch == 1 { serde_json::Value::Null } else { true.into() };
        assert_eq!(validation["slots_independent"], expected, "{run}");
    }
    assert_eq!(report["manifest"]["extra"]["validation"].as_array().unwrap().len(), 12);

    // One weight that is not a number: the build fails, and nothing of it stays.
    scene.spoiled("broken", |all| {
        let tensor = all.values_mut().next().unwrap();
        let mut values = tensor.to_f32();
        values.fill(f32::NAN);
        *tensor = HostTensor::f32(tensor.shape().clone(), values).unwrap();
    });
    let before = contents(&scene.path("."));
    let line = "build-engine --offline --model broken --weights broken/model.safetensors --program denoise";
    scene.refuses(&format!("{line} --out bad"), 1, &["denoise-b1.onnx", "not finite"]);
    assert!(contents(&scene.path(".")) == before, "neither an engine nor litter");
    scene.mudit(&format!("{line} --out bad --no-validation")).succeeds();
}

#[test]
fn a_second_build_has_nothing_to_do_and_says_what_differs() {
    let scene = Scene::new();
    let line = "build-engine --offline --model checkpoint --program step --explain --out e --weights";
    let first = format!("{line} checkpoint/model.safetensors --batch 2");
    assert!(scene.mudit(&first).succeeds().contains("everything is built"));
    let built = contents(&scene.path("e"));
    let again = scene.mudit(&first).run();
    assert!(again.code == Some(0) && again.seconds < 2.0, "{again}");
    assert!(again.to_string().contains("is up to date"), "{again}");
    // Who runs what is kept: an engine that is up to date tells it too, in words and in JSON.
    let who = "step-b2.onnx: ";
    let line_of = again.stdout.lines().find(|l| l.starts_with(who)).unwrap();
    assert!(line_of.contains(" nodes on CPUExecutionProvider: ") && line_of.contains(" mudit."), "{line_of}");
    let kept: serde_json::Value =
        serde_json::from_str(&scene.mudit(&format!("{first} --json")).succeeds()).unwrap();
    let ops = &kept["manifest"]["placements"]["step-b2.onnx"]["nodes"]["CPUExecutionProvider"];
    assert!(ops["Concat"].as_u64().unwrap() > 0 && kept["up_to_date"] == true, "{ops}");
    assert!(contents(&scene.path("e")) == built);

    let other = scene.mudit(&format!("{line} checkpoint/model.safetensors --batch 3")).succeeds();
    for words in ["step-b2.onnx: built from", "step-b3.onnx: built from nothing, asked for"] {
        assert!(other.contains(words), "{other}");
    }
    assert!(!other.contains("weights: built") && !other.contains("precision"), "{other}");
    scene.spoiled("tuned", |all| {
        let tensor = all.values_mut().next().unwrap();
        let values = tensor.to_f32().into_iter().map(|v| v * 1.5).collect();
        *tensor = HostTensor::f32(tensor.shape().clone(), values).unwrap();
    });
    let tuned = scene.mudit(&format!("{line} tuned/model.safetensors --batch 3")).succeeds();
    assert!(tuned.contains("weights: built from") && !tuned.contains("step-b3.onnx: built"), "{tuned}");
    // What is asked for twice is built once, and an engine that is there stays whole.
    let twice = line.replace("--program step", "--program step,step");
    scene.mudit(&format!("{twice} tuned/model.safetensors --buckets 3,3")).succeeds();
    assert_eq!(Engine::open(scene.path("e")).unwrap().manifest().programs.len(), 1);
    // An engine that lost a file is built again.
    fs::remove_file(scene.path("e/step-b3.onnx")).unwrap();
    scene.mudit(&format!("{line} tuned/model.safetensors --batch 3")).succeeds();
    Engine::open(scene.path("e")).unwrap().verify().unwrap();
}

#[test]
fn programs_of_low_precision_are_emitted_with_weights_of_their_type() {
    let scene = Scene::new();
    for (precision, dtype) in [("bf16", safetensors::Dtype::BF16), ("f16", safetensors::Dtype::F16)] {
        let line = format!(
            "build-engine --model checkpoint --weights checkpoint/model.safetensors --program step,denoise-cfg,train-step \
             --batch 2 --precision {precision} --provider none --out {precision}"
        );
        scene.mudit(&line).succeeds();
        let engine = Engine::open(scene.path(precision)).unwrap();
        let weights = engine.manifest().weights.as_ref().unwrap();
        let bytes = fs::read(scene.path(precision).join(&weights.file)).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("blocks.0.attn.qkv.weight").unwrap().dtype(), dtype);
        let step = engine.manifest().programs.iter().find(|p| p.name == "step").unwrap();
        assert!(
            step.inputs.iter().chain(&step.outputs).all(|t| t.dtype.bytes() != 2),
            "the contract's types stay"
        );
    }
}

#[test]
fn only_the_cuda_provider_asks_whether_mudits_kernels_take_a_head() {
    let scene = Scene::new();
    let config = fs::read_to_string(scene.path("checkpoint/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    (config["hidden_size"], config["num_heads"]) = (272.into(), 2.into());
    scene.write("wide.json", config.to_string());
    let line = "build-engine --offline --model wide.json --program train-step --batch 2 --precision bf16 --out e --provider";
    scene.mudit(&format!("{line} none")).succeeds();
    let refused = ["136 features a head", "use provider `cpu`"];
    scene.mudit(&format!("{line} cuda --for sm_90")).run().refuses(1, &refused);
}

#[test]
fn an_engine_for_gpus_elsewhere_carries_their_kernels() {
    let scene = Scene::new();
    let line = "build-engine --model checkpoint --program train-step --precision bf16 --provider cuda --for sm_90 --out e";
    let fetches = std::env::var_os("MUDIT_NEEDS_NVRTC").is_some();
    let built = scene.mudit(&if fetches { line.to_owned() } else { format!("{line} --offline") }).run();
    if !fetches && built.code == Some(1) && built.stderr.contains("NVRTC") {
        assert!(!scene.path("e").exists());
        return println!("not tried: there is no NVRTC here");
    }
    assert!(built.stdout.contains("not tried out: this machine has no GPU of sm_90"), "{built}");
    let engine = Engine::open(scene.path("e")).unwrap();
    engine.verify().unwrap();
    let kernels = &engine.manifest().kernels;
    assert!(kernels.iter().any(|k| k.file == "attention-sm_90.cubin") && kernels.len() == 6);
    let again = scene.mudit(&format!("{line} --offline")).run();
    assert!(again.stdout.contains("is up to date") && again.seconds < 2.0, "{again}");
}
