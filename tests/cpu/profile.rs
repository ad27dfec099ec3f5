//! `mudit profile`: nothing is lost between the trace and the tables, and the memory that `inspect` foretells is needed.

use std::fs;

use serde_json::Value;

use crate::process::mudit;
use crate::scene::Scene;

/// A model whose parameters, optimizer and activations all weigh: 4.9 M parameters, 256 tokens.
const MIDDLE: &str = r#"{"model":"dit","input_size":32,"patch_size":2,"in_channels":4,"hidden_size":192,"depth":6,
    "num_heads":3,"mlp_ratio":4.0,"num_classes":10,"learn_sigma":true}"#;
/// Largest error of the foretold memory.
const MEMORY_ERROR: f64 = 0.15;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn sum(rows: &Value, time: impl Fn(&Value) -> f64) -> f64 {
    rows.as_array().unwrap().iter().map(time).sum()
}

#[test]
fn the_lines_add_up_to_the_whole() {
    let scene = Scene::new();
    let told = scene
        .mudit("profile --offline checkpoint/config.json --batch 4 --repeat 2 --svg p.svg --json p.json")
        .succeeds();
    let report: Value = serde_json::from_str(&fs::read_to_string(scene.path("p.json")).unwrap()).unwrap();
    let whole = number(&report["profiled_ms"]);
    let rest = number(&report["overhead_ms"]);
    assert!(rest > 0.0 && rest < whole, "{rest} of {whole} ms are no node");
    let close = |got: f64| assert!((got + rest - whole).abs() < 1e-6 * whole, "{got} + {rest} ms of {whole}");
    close(sum(&report["operators"], |o| number(&o["ms"])));
    close(sum(&report["layers"], |l| number(&l["forward"]["ms"]) + number(&l["backward"]["ms"])));
    close(sum(&report["nodes"], |n| number(&n["spent"]["ms"])));

    let nodes_ms = whole - rest;
    let unjoined = number(&report["unjoined_ms"]);
    assert!(unjoined < 0.02 * nodes_ms, "{unjoined} of {nodes_ms} ms are joined with no node of the graph");
    let backward = sum(&report["layers"], |l| number(&l["backward"]["ms"]));
    assert!(backward > 0.4 * nodes_ms, "the backward pass takes {backward} of {nodes_ms} ms");
    let blocks = ["blocks.*.attn", "blocks.*.mlp", "blocks.*.adaLN_modulation"];
    for name in blocks {
        let layer = report["layers"].as_array().unwrap().iter().find(|l| l["name"] == name);
        let layer = layer.unwrap_or_else(|| panic!("no layer {name}"));
        for pass in ["forward", "backward"] {
            assert!(number(&layer[pass]["ms"]) > 0.0, "{name} {pass}");
            assert!(number(&layer[pass]["gflops_per_s"]) > 0.0, "{name} {pass} has work");
        }
    }
    assert!(number(&report["update_ms"]) > 0.0 && number(&report["roof"]["gflops_per_s"]) > 0.0);
    for line in ["session overhead", "clip, AdamW, average", "blocks.*.mlp", "peak memory"] {
        assert!(told.contains(line), "`{line}` is missing: {told}");
    }
    let picture = fs::read_to_string(scene.path("p.svg")).unwrap();
    for part in ["backward › blocks.1 › attn.qkv", "session overhead", "clip, AdamW, average"] {
        assert!(picture.contains(part), "`{part}` is missing");
    }
}

#[test]
fn every_program_has_a_profile() {
    let scene = Scene::new();
    for program in ["denoise", "denoise-cfg", "step", "loss"] {
        let line =
            format!("profile --offline checkpoint/config.json --program {program} --batch 2 --repeat 1");
        let report = scene.mudit(&line).json();
        assert_eq!(report["program"], program);
        assert!(report["update_ms"].is_null(), "{program} has no update");
        assert_eq!(
            sum(&report["layers"], |l| number(&l["backward"]["ms"])),
            0.0,
            "{program} has no backward pass"
        );
        assert!(number(&report["unjoined_ms"]) < 0.1 * number(&report["profiled_ms"]), "{program}: {report}");
    }
}

#[test]
fn foretold_memory_is_what_a_process_needs() {
    let scene = Scene::new();
    scene.write("middle.json", MIDDLE);
    for batch in [2, 8] {
        let inspected =
            scene.mudit(&format!("inspect middle.json --program train-step --batch {batch}")).json();
        // A process of its own, so that nobody else's memory is in its peak.
        let line = format!("profile --offline middle.json --batch {batch} --repeat 2");
        let memory = &scene.mudit(&line).json()["memory"];
        assert_eq!(inspected["memory_bytes"], memory["predicted_bytes"], "both commands tell the same");
        let (foretold, needed) = (number(&memory["predicted_bytes"]), number(&memory["peak_resident_bytes"]));
        let error = foretold / needed - 1.0;
        assert!(
            error.abs() <= MEMORY_ERROR,
            "batch {batch}: {foretold:.3e} foretold, {needed:.3e} needed: {error:+.3}"
        );
    }
    let text = mudit(["inspect", "DiT-S/2", "--program", "train-step", "--batch", "8"]).succeeds();
    assert!(text.contains("peak memory") && text.contains("activations"), "{text}");
}
