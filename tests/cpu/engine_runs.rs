//! What `sample` and `serve` make of an engine is what they make of the checkpoint that it was built from.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use models::Guidance;
use mudit::built::BuiltEngine;
use mudit::serve::model::{Origin, Source};
use runtime::Engine;
use serde_json::{Value, json};

use crate::process::mudit;
use crate::scene::{Scene, tensors};
use crate::serve::client::post;
use crate::serve::{Running, ddpm, options};

const BUILD: &str =
    "build-engine --offline --model checkpoint --weights checkpoint/model.safetensors --no-validation";
const SAMPLE: &str = "sample --offline --seed 5 --count 5 --classes 3,7";

/// The images of a command line, as bits.
fn images(scene: &Scene, line: &str) -> Vec<u32> {
    scene.mudit(&format!("{SAMPLE} {line} --out s.safetensors")).succeeds();
    let values = tensors(&scene.path("s.safetensors"))["samples"].to_f32();
    assert!(values.iter().any(|v| *v != 0.0) && values.len() == 5 * 256);
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn an_engine_samples_the_checkpoints_bits() {
    let scene = Scene::new();
    // Several batch sizes in one form of a program; one; a program that guides by itself; one that does not.
    for (name, line) in [
        ("rows", "--program step-rows --buckets 2,3,4"),
        ("one", "--program step-rows --batch 7"),
        ("guided", "--program step --buckets 3,8"),
        ("plain", "--program step --batch 2 --cfg-channels off"),
    ] {
        scene.mudit(&format!("{BUILD} {line} --out {name}")).succeeds();
    }
    let open = Engine::open(scene.path("rows")).unwrap();
    assert_eq!(open.manifest().open_programs.len(), 1);
    for (sampler, cfg) in [("ddpm", "3.5"), ("dpm++2m", "2"), ("ddim", "1")] {
        let how = format!("--sampler {sampler} --steps 5 --cfg {cfg}");
        let want = images(&scene, &format!("--checkpoint checkpoint {how}"));
        let engines = if cfg == "1" { ["rows", "one", "plain"] } else { ["rows", "one", "guided"] };
        for engine in engines {
            // However many fit at once.
            for batch in ["1", "50"] {
                let got = images(&scene, &format!("--engine {engine} --batch {batch} {how}"));
                assert!(got == want, "{engine}, {batch} at once, {how}");
            }
        }
    }
    // The checkpoint beside it is compared, not used.
    let both = format!("{SAMPLE} --engine rows --checkpoint checkpoint --steps 2 --out b.safetensors");
    scene.mudit(&both).succeeds();
}

/// The f32 latents of an order.
fn latents(server: &Running, model: &str, sampler: &str, guidance: f64) -> Value {
    let one = |name: &str, datatype: &str, value: u64| json!({"name": name, "datatype": datatype, "shape": [2], "data": [value, value + 1]});
    let body = json!({
        "inputs": [one("class_label", "INT64", 3), one("seed", "UINT64", 40)],
        "outputs": [{"name": "latent"}],
        "parameters": {"steps": 6, "sampler": sampler, "guidance_scale": guidance},
    });
    let answer = post(server.address(), &format!("/v2/models/{model}/infer"), &body).expect(200);
    answer["outputs"][0]["data"].clone()
}

#[test]
fn an_engine_serves_the_checkpoints_bits() {
    let scene = Scene::new();
    scene.mudit(&format!("{BUILD} --program step-rows --buckets 1,3,5 --out e")).succeeds();
    let engine = Arc::new(BuiltEngine::open(&scene.path("e")).unwrap());
    let built = Source { name: "built".into(), origin: Origin::Engine(engine), ..ddpm() };
    let server = Running::of(vec![ddpm(), built], options());
    let reports = server.reports();
    let rows: Vec<usize> = reports[1].measured.points.iter().map(|p| p.rows).collect();
    assert!(rows.starts_with(&[1, 3]) && reports[1].determinism.exact, "{:?}", reports[1]);
    for (sampler, guidance) in [("ddpm", 1.0), ("ddim", 3.5), ("dpm++2m", 2.0)] {
        let want = latents(&server, "latents", sampler, guidance);
        assert_eq!(want.as_array().unwrap().len(), 2 * 256);
        assert!(latents(&server, "built", sampler, guidance) == want, "{sampler} at {guidance}");
    }
}

#[test]
fn the_server_takes_an_engine_and_says_what_it_serves() {
    let scene = Scene::new();
    scene.mudit(&format!("{BUILD} --program step-rows --buckets 2,4 --out e")).succeeds();
    let line = "serve --offline --engine e --model plain=checkpoint --port 0 --json";
    let running = scene.mudit(line).start();
    let mut told = None;
    let ready = running.until(Duration::from_millis(10), || {
        told = serde_json::from_str::<Value>(&running.said()).ok();
        told.is_some()
    });
    assert!(ready, "{}", running.wait());
    let told = told.unwrap();
    assert_eq!(told["models"], json!(["e", "plain"]));
    let rows = told["reports"][0]["measured"]["points"].as_array().unwrap();
    assert_eq!(rows.iter().map(|p| p["rows"].clone()).collect::<Vec<_>>(), [json!(2), json!(4)]);
    running.signal(libc::SIGTERM);
    assert_eq!(running.wait().code, Some(0));
}

#[test]
fn an_engine_that_does_not_fit_is_refused_and_both_sides_are_named() {
    let scene = Scene::new();
    scene.mudit(&format!("{BUILD} --program step --batch 2 --out e")).succeeds();
    scene.mudit(&format!("{BUILD} --program step --batch 2 --provider none --out emitted")).succeeds();
    scene.spoiled("tuned", |all| {
        let tensor = all.values_mut().next().unwrap();
        let values = tensor.to_f32().into_iter().map(|v| v + 1.0).collect();
        *tensor = runtime::HostTensor::f32(tensor.shape().clone(), values).unwrap();
    });
    scene.write("wide/config.json", std::fs::read(scene.path("checkpoint/config.json")).unwrap());
    let config = std::fs::read_to_string(scene.path("wide/config.json")).unwrap();
    scene.write("wide/config.json", config.replace("\"num_classes\": 10", "\"num_classes\": 11"));
    for (line, code, parts) in [
        ("--engine e --provider cuda", 2, &["--provider cpu", "--provider cuda"][..]),
        ("--engine e --precision bf16", 2, &["--precision f32", "--precision bf16"]),
        ("--engine e --cfg-channels all", 2, &["--cfg-channels 3", "--cfg-channels all"]),
        ("--engine e --weights model", 2, &["--weights", "engine"]),
        ("--engine e --checkpoint wide", 1, &["num_classes 10", "`wide` has 11"]),
        ("--engine e --checkpoint tuned", 1, &["built from weights with sha256", "tuned/model.safetensors"]),
        ("--engine emitted", 1, &["only emitted", "--provider cpu, cuda or tensorrt"]),
        ("--engine checkpoint", 1, &["is no engine", "engine.json"]),
    ] {
        scene.refuses(&format!("sample --offline {line}"), code, parts);
    }
    scene.refuses(
        "serve --offline --engine e --cfg-channels 2",
        2,
        &["--cfg-channels 3", "--cfg-channels 2"],
    );
    scene.refuses("sample --offline", 2, &["--checkpoint", "--engine"]);
}

#[test]
fn a_program_that_is_missing_is_added_by_the_command_in_the_error() {
    let scene = Scene::new();
    let build = format!("{BUILD} --program denoise --batch 3 --cfg-channels 2 --out e");
    scene.mudit(&build).succeeds();
    let sample = format!("{SAMPLE} --engine e --steps 3 --out s.safetensors");
    let refused = scene.mudit(&sample).run();
    refused.refuses(1, &["no program step-rows at batch 2 or more", "denoise at batch 3"]);
    scene
        .mudit("serve --offline --port 0 --engine e")
        .run()
        .refuses(1, &["no program step-rows", "this adds it"]);
    let (_, command) = refused.stderr.split_once("this adds it: mudit ").unwrap();
    let words = command.lines().next().unwrap().split_whitespace();
    mudit(words.chain(["--offline"])).within(Path::new(&scene.path("."))).succeeds();
    let engine = BuiltEngine::open(&scene.path("e")).unwrap();
    assert_eq!(engine.guided(), Guidance::First(2));
    assert_eq!(engine.batches("step-rows".parse().unwrap()), [1, 2, 3, 4, 8]);
    assert_eq!(engine.batches("denoise".parse().unwrap()), [1, 2, 3, 4, 8], "nothing is lost");
    let want = images(&scene, "--checkpoint checkpoint --steps 3 --cfg-channels 2");
    assert!(images(&scene, "--engine e --steps 3") == want);
}

/// Whatever moment a build is killed at: the old engine, the new one, or none.
#[test]
fn a_killed_build_leaves_no_half_engine() {
    let scene = Scene::new();
    let line = |buckets: &str| format!("{BUILD} --program step,step-rows --buckets {buckets} --out e");
    let whole = scene.mudit(&line("1,2")).run();
    assert_eq!(whole.code, Some(0), "{whole}");
    let mut seen = [0; 3];
    for moment in 0..12_u32 {
        let buckets = if moment % 2 == 0 { "3,4" } else { "1,2" };
        let running = scene.mudit(&line(buckets)).start();
        std::thread::sleep(Duration::from_secs_f64(whole.seconds * f64::from(moment + 1) / 11.0));
        running.signal(libc::SIGKILL);
        running.wait();
        match Engine::open(scene.path("e")) {
            Ok(engine) => {
                engine.verify().unwrap();
                let new = engine.manifest().programs[0].file.contains(&buckets[..1]);
                seen[usize::from(new)] += 1;
            }
            Err(error) => {
                assert!(!scene.path("e/engine.json").exists(), "moment {moment}: {error}");
                seen[2] += 1;
            }
        }
    }
    println!(
        "killed at 12 moments: {} times the old engine, {} the new one, {} none",
        seen[0], seen[1], seen[2]
    );
    assert!(seen[0] > 0, "no build was killed before it was done");
    let drafts = || {
        let names = std::fs::read_dir(scene.path(".")).unwrap().map(|e| e.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".engine-")).count()
    };
    println!("{} drafts are left", drafts());
    scene.mudit(&line("1,4")).succeeds();
    assert_eq!(drafts(), 0, "a build clears away what killed ones have left");
    Engine::open(scene.path("e")).unwrap().verify().unwrap();
}
