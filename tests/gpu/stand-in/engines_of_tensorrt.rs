//! ONNX Runtime's real TensorRT provider above a stand-in for TensorRT, which runs engines by ONNX Runtime's CPU kernels: what
//! the provider is told, what it builds, keeps and loads, and that the values are the CPU's.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use graph_builder::{Graph, Precision, Weights};
use models::classifier::Classifier;
use models::inception::{SIDE, Taps, features};
use models::{Guidance, Model, ProgramKind, ProgramSpec};
use mudit_tests::difference::relative_l2;
use mudit_tests::draws::Draws;
use mudit_tests::execution::array;
use mudit_tests::pictures::pictures_and_network;
use runtime::{
    Binding, HostTensor, Provider, Recording, Runtime, RuntimeOptions, Session, SessionOptions,
    TensorRtOptions, read_safetensors_file, write_safetensors_file,
};
use serde_json::{Value, json};

use super::commands::checkpoint;
use super::{Stage, proven, staged};

/// Where the stand-in notes what it was asked for.
const JOURNAL: &str = "MUDIT_STAND_IN_TENSORRT";
const FAILS: &str = "MUDIT_STAND_IN_TENSORRT_FAILS";
const REFUSES: &str = "MUDIT_STAND_IN_TENSORRT_REFUSES";
const F32_PRODUCTS: (&str, &str) = ("NVIDIA_TF32_OVERRIDE", "0");
/// The builder's flags for types that it may compute in.
const FP16: u64 = 1;
const BF16: u64 = 1 << 17;

/// The entries of one kind since the journal was read last.
fn noted(folder: &Path, kind: &str) -> Vec<Value> {
    let file = folder.join("journal");
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|entry| entry.get(kind).cloned()).collect()
}

fn forget(folder: &Path) {
    drop(std::fs::remove_file(folder.join("journal")));
}

/// A command with a journal and a cache of its own in `folder`, where it runs.
fn command(stage: &Stage, folder: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mudit-under-test"));
    stage.environment(&mut command).current_dir(folder).args(line.split_whitespace());
    command.env(JOURNAL, folder.join("journal")).env("MUDIT_CACHE", folder.join("cache"));
    command
}

fn mudit(stage: &Stage, folder: &Path, line: &str) -> Output {
    command(stage, folder, line).output().unwrap()
}

fn succeeds(stage: &Stage, folder: &Path, line: &str) -> String {
    let done = mudit(stage, folder, line);
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "mudit {line}\n{text}\n{}", String::from_utf8_lossy(&done.stderr));
    text
}

/// A stage, with a folder that holds a checkpoint.
fn stage_and_folder(name: &str) -> Option<(&'static Stage, tempfile::TempDir)> {
    let stage = staged(name)?;
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    Some((stage, folder))
}

const BUILD: &str =
    "build-engine --offline --model checkpoint --weights checkpoint/model.safetensors --provider tensorrt";

#[test]
fn one_engine_serves_all_batch_sizes_and_is_built_once() {
    let Some((stage, folder)) = stage_and_folder("an engine of TensorRT") else { return };
    let folder = folder.path();
    let line =
        format!("{BUILD} --program step --buckets 1,2,4 --builder-level 4 --workspace 2 --explain --out e");
    let told = succeeds(stage, folder, &line);
    let providers: Vec<&str> = told.lines().filter(|l| l.contains(" nodes on ")).collect();
    let [only] = providers.as_slice() else { panic!("{told}") };
    assert!(only.starts_with("step.onnx: ") && only.contains("on TensorrtExecutionProvider"), "{told}");
    assert_eq!(told.matches("of the plain program").count(), 3, "{told}");
    let [built] = noted(folder, "built").try_into().unwrap();
    assert_eq!(built["profile"]["x"], json!([[1, 4, 8, 8], [4, 4, 8, 8], [4, 4, 8, 8]]), "{built}");
    assert_eq!((&built["level"], &built["workspace"]), (&json!(4), &json!(2_u64 << 30)), "{built}");
    assert!(built["measured"].as_u64().unwrap() > 10, "{built}");
    let files: Vec<String> = std::fs::read_dir(folder.join("e"))
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains(".tensorrt"))
        .collect();
    for end in [".tensorrt.onnx", ".engine", ".profile"] {
        assert_eq!(files.iter().filter(|name| name.ends_with(end)).count(), 1, "{files:?}");
    }

    forget(folder);
    let start = Instant::now();
    assert!(succeeds(stage, folder, &line).contains("is up to date"));
    // The command itself takes a sixth of a second; other proofs run beside.
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(noted(folder, "built").is_empty() && noted(folder, "loaded").is_empty());

    // What kernels took is known from then on, for the same kind of work.
    succeeds(stage, folder, &line.replace("--out e", "--out again"));
    succeeds(stage, folder, &line.replace("--out e", "--out other").replace("level 4", "level 5"));
    let measured: Vec<bool> = noted(folder, "built").iter().map(|b| b["measured"] != json!(0)).collect();
    assert_eq!(measured, [false, true]);
}

/// A checkpoint of random weights whose heads are of a size for which attention is one op.
fn checkpoint_of_fused_heads(folder: &Path) {
    let fixture: Value =
        serde_json::from_slice(&std::fs::read(folder.join("checkpoint/config.json")).unwrap()).unwrap();
    let mut config = fixture.clone();
    (config["hidden_size"], config["num_heads"]) = (json!(32), json!(2));
    std::fs::write(folder.join("checkpoint/config.json"), config.to_string()).unwrap();
    let model = Model::resolve(folder.join("checkpoint/config.json").to_str().unwrap()).unwrap();
    let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, 1)).unwrap();
    let mut draws = Draws::named("fused heads");
    let tensors = graph.parameters().iter().map(|p| {
        let values = draws.uniform(p.shape().dims(), -0.15, 0.15);
        let values = values.iter().map(|v| *v as f32).collect();
        (p.name.clone(), HostTensor::f32(p.shape(), values).unwrap())
    });
    let tensors = tensors.collect();
    write_safetensors_file(folder.join("checkpoint/model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

#[test]
fn an_engine_for_older_gpus_is_built_on_a_newer_one() {
    let Some((stage, folder)) = stage_and_folder("engines of TensorRT for other GPUs") else { return };
    let folder = folder.path();
    let on = |capability: &str, line: &str| {
        command(stage, folder, line).env("MUDIT_STAND_IN_CAPABILITY", capability).output().unwrap()
    };
    let build = format!("{BUILD} --program step --batch 2 --for sm_80 --out e");
    let built = on("90", &build);
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let [built] = noted(folder, "built").try_into().unwrap();
    assert_eq!(built["compatible"], json!(1), "{built}");
    for capability in ["90", "80"] {
        forget(folder);
        let sampled = on(capability, "sample --offline --engine e --steps 2 --count 2 --out s.npz");
        assert!(sampled.status.success(), "{}", String::from_utf8_lossy(&sampled.stderr));
        assert!(noted(folder, "built").is_empty() && !noted(folder, "ran").is_empty(), "{capability}");
    }
    let newer = on("80", &build.replace("sm_80", "sm_90"));
    let words = String::from_utf8_lossy(&newer.stderr);
    assert!(!newer.status.success() && words.contains("build for sm_90 on such a machine"), "{words}");
}

#[test]
fn samples_of_engines_are_the_cpus() {
    samples_are_the_cpus(&|_| ());
}

#[test]
fn samples_of_engines_with_fused_attention_are_the_cpus() {
    samples_are_the_cpus(&checkpoint_of_fused_heads);
}

fn samples_are_the_cpus(altered: &dyn Fn(&Path)) {
    let Some((stage, folder)) = stage_and_folder("samples on TensorRT") else { return };
    let folder = folder.path();
    altered(folder);
    let samples = |from: &str| {
        let line =
            format!("sample --offline {from} --sampler ddim --steps 4 --count 7 --cfg 2 --out s.safetensors");
        succeeds(stage, folder, &line);
        let found =
            read_safetensors_file(folder.join("s.safetensors")).unwrap().shift_remove("samples").unwrap();
        array(found.shape().dims(), &found.to_f32())
    };
    let want = samples("--checkpoint checkpoint --provider cpu");
    for (precision, limit) in [("f32", 1e-5), ("bf16", 3e-2), ("f16", 3e-3)] {
        forget(folder);
        succeeds(
            stage,
            folder,
            &format!("{BUILD} --program step --buckets 2,4 --precision {precision} --out {precision}"),
        );
        let [built] = noted(folder, "built").try_into().unwrap();
        let allowed = match precision {
            "bf16" => BF16,
            "f16" => FP16,
            _ => 0,
        };
        assert_eq!(built["flags"].as_u64().unwrap() & (FP16 | BF16), allowed, "{precision}: {built}");
        for (from, recordings) in [
            (format!("--engine {precision}"), 0),
            (format!("--engine {precision} --provider tensorrt+graph"), 1),
            (format!("--checkpoint checkpoint --provider tensorrt --precision {precision}"), 0),
        ] {
            forget(folder);
            let error = relative_l2(&samples(&from), &want);
            assert!(error <= limit, "{from}: {error:e}");
            // Two batches of four steps.
            let [recorded, played] = ["recorded", "played"].map(|kind| noted(folder, kind).len());
            assert!(recorded == recordings && (played >= 6) == (recordings > 0), "{recorded}, {played}");
        }
        // Straight from the checkpoint: built by the first run, taken from the cache by the second.
        forget(folder);
        samples(&format!("--checkpoint checkpoint --provider tensorrt --precision {precision}"));
        assert!(noted(folder, "built").is_empty() && !noted(folder, "ran").is_empty());
    }
}

#[test]
fn weights_that_were_left_out_are_filled_in_when_the_engine_is_loaded() {
    let Some((stage, folder)) = stage_and_folder("stripped engines of TensorRT") else { return };
    let folder = folder.path();
    let line = format!("{BUILD} --program step --buckets 1,4 --strip-weights --out e");
    // The build compares it with the plain program.
    succeeds(stage, folder, &line);
    let [built] = noted(folder, "built").try_into().unwrap();
    let stripped = built["stripped_weights"].as_u64().unwrap();
    assert!(stripped > 20, "{built}");
    assert_eq!(noted(folder, "refitted"), [json!(stripped)], "every weight is found by its name");
    let size = |path: &str| std::fs::metadata(folder.join(path)).unwrap().len();
    assert!(size("e/step.tensorrt.onnx") < size("checkpoint/model.safetensors") / 4);
    forget(folder);
    let sample = "sample --offline --engine e --steps 2 --count 3 --out s.npz";
    succeeds(stage, folder, sample);
    assert_eq!((noted(folder, "built").len(), noted(folder, "refitted")), (0, vec![json!(stripped)]));

    // ONNX Runtime has such engines built for the weights that they had: others are another build.
    let mut tensors = read_safetensors_file(folder.join("checkpoint/model.safetensors")).unwrap();
    for tensor in tensors.values_mut() {
        let values = tensor.to_f32().into_iter().map(|v| v * 1.25).collect();
        *tensor = HostTensor::f32(tensor.shape().clone(), values).unwrap();
    }
    write_safetensors_file(folder.join("tuned.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    forget(folder);
    succeeds(stage, folder, &line.replace("checkpoint/model.safetensors", "tuned.safetensors"));
    let [built] = noted(folder, "built").try_into().unwrap();
    assert_eq!(built["measured"], json!(0), "kernels were measured by the first build");
    succeeds(stage, folder, sample);
}

#[test]
fn a_build_that_fails_tells_tensorrts_words_and_leaves_nothing() {
    let Some((stage, folder)) = stage_and_folder("failures of TensorRT") else { return };
    let folder = folder.path();
    let before = std::fs::read_dir(folder).unwrap().count();
    let failed = |variable: &str, line: &str| {
        let done = command(stage, folder, line).env(variable, "1").output().unwrap();
        assert_eq!(done.status.code(), Some(1));
        String::from_utf8_lossy(&done.stderr).into_owned()
    };
    let build = format!("{BUILD} --program step --batch 2 --out e");
    let words = failed(FAILS, &build);
    assert!(words.contains("TensorRT: could not find any implementation"), "{words}");
    // Nothing falls to another provider in silence.
    for line in [&build, "sample --offline --checkpoint checkpoint --provider tensorrt --steps 2 --count 1"] {
        let words = failed(REFUSES, line);
        assert!(words.contains("TensorRT took none of its nodes") && words.contains("`cuda`"), "{words}");
    }
    drop(std::fs::remove_dir_all(folder.join("cache")));
    forget(folder);
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), before);
}

#[test]
fn distances_are_the_cpus() {
    let Some((stage, folder)) = stage_and_folder("fid on TensorRT") else { return };
    let folder = folder.path();
    pictures_and_network(folder, 64, 8);
    let mut found = Vec::new();
    for provider in ["cpu", "tensorrt"] {
        let fid = |line: &str| {
            let common = "--offline --few --network net.onnx";
            succeeds(stage, folder, &format!("fid {line} --provider {provider} {common}"))
        };
        fid(&format!("ref real.npz --out {provider}.npz"));
        fid(&format!("calc fake.npz --ref {provider}.npz --out {provider}.json"));
        let result = std::fs::read(folder.join(format!("{provider}.json"))).unwrap();
        let result: Value = serde_json::from_slice(&result).unwrap();
        found.push(result["metrics"]["fid"].as_f64().unwrap());
    }
    assert!(!noted(folder, "built").is_empty() && noted(folder, "ran").len() > 10);
    let [want, got] = found.try_into().unwrap();
    assert!((got - want).abs() <= 1e-3 * want && want > 0.0, "{got} for {want}");
}

/// A server that is stopped in the end.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn each_batch_size_of_a_server_has_its_own_recording() {
    let Some((stage, folder)) = stage_and_folder("a server on TensorRT") else { return };
    let folder = folder.path();
    succeeds(stage, folder, &format!("{BUILD} --program step-rows --buckets 1,2,4 --out e"));
    for (provider, loads) in [("tensorrt", 1), ("tensorrt+graph", 3)] {
        forget(folder);
        let line = format!("serve --offline --engine e --provider {provider} --no-deterministic --port 0");
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let server = command(stage, folder, &line).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let _server = Server(server);
        let start = Instant::now();
        let log = loop {
            let log = std::fs::read_to_string(folder.join("log")).unwrap();
            if log.contains("ready after") {
                break log;
            }
            assert!(start.elapsed() < Duration::from_mins(1), "{log}");
            std::thread::sleep(Duration::from_millis(50));
        };
        let address = log.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
        let bench = format!("bench-serve --url {address} --requests 6 --concurrency 3 --steps 3");
        succeeds(stage, folder, &bench);
        assert_eq!(noted(folder, "loaded").len(), loads, "{provider}");
        let recordings = if provider.ends_with("+graph") { loads } else { 0 };
        assert!(
            noted(folder, "recorded").len() >= recordings
                && noted(folder, "played").is_empty() == (recordings == 0)
        );
        let ran = noted(folder, "ran");
        // It tries all of them, and uses those that are worth it.
        for rows in [1, 2, 4] {
            let times = ran.iter().filter(|r| **r == json!(rows)).count();
            assert!(times > 0, "{provider}: no run of {rows} rows");
        }
    }
}

#[test]
fn every_node_is_in_one_engine_in_every_precision() {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal");
    let variables = [F32_PRODUCTS, (JOURNAL, journal.to_str().unwrap())];
    proven("engines_of_tensorrt::whole_programs", &variables);
}

#[test]
fn a_recorded_session_has_one_binding() {
    proven("engines_of_tensorrt::one_recording", &[F32_PRODUCTS]);
}

fn runtime_with_tensorrt() -> std::sync::Arc<Runtime> {
    Runtime::start(&RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() }).unwrap()
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn whole_programs() {
    let runtime = runtime_with_tensorrt();
    let mut programs: Vec<(String, Graph, Precision)> = Vec::new();
    let model = Model::resolve("DiT-S/2").unwrap();
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        for (kind, guidance) in [
            (ProgramKind::Denoise, Guidance::Off),
            (ProgramKind::DenoiseCfg, Guidance::First(3)),
            (ProgramKind::Step, Guidance::All),
            (ProgramKind::StepRows, Guidance::Off),
            (ProgramKind::TrainStep, Guidance::Off),
        ] {
            let graph = model.compiled(&ProgramSpec::new(kind, 2).guided(guidance)).unwrap();
            let name = format!("{kind}, {guidance:?}, {precision}");
            programs.push((name, graph.in_precision(precision).unwrap(), precision));
        }
    }
    let taps = Taps { spatial: true, logits: true };
    programs.push((
        "inception".into(),
        features(2, SIDE, taps).unwrap().optimised().unwrap(),
        Precision::F32,
    ));
    let fashion = Classifier { channels: 1, height: 28, width: 28, classes: 10 };
    programs.push(("fashion".into(), fashion.features(2).unwrap().optimised().unwrap(), Precision::F32));
    let journal = std::env::var_os(JOURNAL).unwrap();
    let folder = Path::new(&journal).parent().unwrap();
    for (name, graph, precision) in programs {
        forget(folder);
        let emitted = graph.emit(Weights::Inputs).unwrap();
        let provider = Provider::TensorRt(TensorRtOptions::default()).computing_in(precision.dtype());
        let options = SessionOptions { provider, record_placement: true, ..SessionOptions::default() };
        let session = Session::load(&runtime, &emitted, &runtime::Weights::Inside, &options)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let placement = session.placement().unwrap();
        let elsewhere: Vec<_> =
            placement.elsewhere("TensorrtExecutionProvider").map(ToString::to_string).collect();
        assert!(
            placement.nodes.len() > 10 && elsewhere.is_empty(),
            "{name}: not in the engine: {elsewhere:#?}"
        );
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn one_recording() {
    let runtime = runtime_with_tensorrt();
    let model = Model::resolve("DiT-S/4@8x8x4:10").unwrap();
    let graph = model.compiled(&ProgramSpec::new(ProgramKind::Denoise, 1)).unwrap();
    let emitted = graph.emit(Weights::Inputs).unwrap();
    for (provider, once) in [("tensorrt", false), ("tensorrt+graph", true)] {
        let options = SessionOptions { provider: provider.parse().unwrap(), ..SessionOptions::default() };
        let session = Session::load(&runtime, &emitted, &runtime::Weights::Inside, &options).unwrap();
        assert_eq!(session.recording(), &if once { Recording::On } else { Recording::Off });
        let mut first = Binding::owned(&session).unwrap();
        (0..3).for_each(|_| first.run().unwrap());
        match Binding::owned(&session) {
            Ok(mut second) => {
                assert!(!once);
                second.run().unwrap();
            }
            Err(e) => assert!(once && e.to_string().contains("one recorded run"), "{e}"),
        }
    }
}
