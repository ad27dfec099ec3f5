//! Weights as people have them: each is read, or told what it is and what to do.

use std::fs;
use std::io::Write as _;

use runtime::safetensors_file::SafetensorsReader;

use crate::scene::{Scene, Tensors, save, tensors};

const SAMPLE: &str = "sample --offline --steps 2 --count 2 --cfg 1 --out";

/// Another checkpoint whose parameters have a prefix each.
fn prefixed(scene: &Scene, name: &str, prefix: impl Fn(usize) -> String) {
    scene.spoiled(name, |all| {
        *all = all.drain(..).enumerate().map(|(i, (key, value))| (prefix(i) + &key, value)).collect();
    });
}

#[test]
fn a_prefix_that_all_names_have_is_left_out() {
    let scene = Scene::new();
    scene.mudit(&format!("{SAMPLE} plain.safetensors --checkpoint checkpoint")).succeeds();
    let plain = tensors(&scene.path("plain.safetensors"));
    for (name, prefix) in
        [("a", "module."), ("b", "_orig_mod."), ("c", "module._orig_mod."), ("d", "ema_model.net.")]
    {
        prefixed(&scene, name, |_| prefix.to_owned());
        let done = scene.mudit(&format!("{SAMPLE} {name}.safetensors --checkpoint {name}")).run();
        assert!(done.code == Some(0) && done.stderr.contains(prefix), "{done}");
        assert!(tensors(&scene.path(&format!("{name}.safetensors"))) == plain, "{prefix}");
    }
    // A wrapper around some of the names is none.
    prefixed(&scene, "some", |i| if i == 0 { "module.".into() } else { String::new() });
    scene.refuses(
        &format!("{SAMPLE} x.npz --checkpoint some"),
        1,
        &["some/model.safetensors", "no tensor named"],
    );
    // An engine of them is one of the same weights.
    let build = "build-engine --offline --program denoise --batch 1 --no-validation --provider none";
    scene.mudit(&format!("{build} --model a --weights a/model.safetensors --out e")).succeeds();
    let reader = SafetensorsReader::open(scene.path("e/model.safetensors")).unwrap();
    assert!(reader.names().any(|name| name == "pos_embed"));
}

/// A text of a pickle.
fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A number of a pickle.
fn number(number: usize) -> Vec<u8> {
    [b"J", &(number as u32).to_le_bytes()[..]].concat()
}

fn numbers(all: impl Iterator<Item = usize>) -> Vec<u8> {
    [b"(".to_vec(), all.flat_map(number).collect(), b"t".to_vec()].concat()
}

/// What `torch.save` writes for a training checkpoint: dictionaries of tensors under names.
fn torch_file(parts: &[(&str, &Tensors)]) -> Vec<u8> {
    let (mut pickle, mut storages) = (b"\x80\x02}(".to_vec(), Vec::new());
    for (part, tensors) in parts {
        pickle.extend([text(part), b"}(".to_vec()].concat());
        for (name, tensor) in *tensors {
            let (values, dims) = (tensor.to_f32(), tensor.shape().dims());
            pickle.extend(
                [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(), text("storage")].concat(),
            );
            pickle.extend([b"ctorch\nFloatStorage\n".to_vec(), text(&storages.len().to_string())].concat());
            pickle.extend([text("cpu"), number(values.len()), b"tQ".to_vec(), number(0)].concat());
            let strides = (0..dims.len()).map(|axis| dims[axis + 1..].iter().product());
            pickle.extend([numbers(dims.iter().copied()), numbers(strides)].concat());
            pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
            storages.push(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
        }
        pickle.extend(b"u");
    }
    pickle.extend(b"u.");
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut add = |name: String, bytes: &[u8]| {
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    };
    add("archive/data.pkl".into(), &pickle);
    storages.iter().enumerate().for_each(|(key, bytes)| add(format!("archive/data/{key}"), bytes));
    archive.finish().unwrap().into_inner()
}

#[test]
fn a_training_checkpoint_of_pytorch_is_read() {
    let scene = Scene::new();
    let average = tensors(&scene.path("checkpoint/model.safetensors"));
    scene.spoiled("own", |all| {
        let values = all["final_layer.linear.weight"].to_f32().iter().map(|v| v + 0.1).collect();
        let shape = all["final_layer.linear.weight"].shape().clone();
        all["final_layer.linear.weight"] = runtime::HostTensor::f32(shape, values).unwrap();
    });
    let own: Tensors = tensors(&scene.path("own/model.safetensors"))
        .into_iter()
        .map(|(name, tensor)| (format!("module.{name}"), tensor))
        .collect();
    scene.write("torch/0400000.pt", torch_file(&[("model", &own), ("ema", &average)]));
    fs::copy(scene.path("checkpoint/config.json"), scene.path("torch/config.json")).unwrap();
    for (weights, same) in [("ema", "checkpoint"), ("model", "own")] {
        let line = |out: &str, from: &str| format!("{SAMPLE} {out} --checkpoint {from} --weights {weights}");
        scene.mudit(&line("want.safetensors", same)).succeeds();
        for from in ["torch", "torch/0400000.pt"] {
            let done = scene.mudit(&line("got.safetensors", from)).run();
            assert!(done.code == Some(0) && done.stderr.contains(&format!("`{weights}` is read")), "{done}");
            let [got, want] =
                ["got", "want"].map(|name| tensors(&scene.path(&format!("{name}.safetensors"))));
            assert!(got == want, "{weights} of {from}");
        }
    }
    let build = "build-engine --offline --program denoise --batch 1 --provider none --model torch --out e";
    scene.mudit(build).succeeds();
    assert!(scene.mudit(build).succeeds().contains("up to date"));
}

#[test]
fn other_files_are_told_what_they_are() {
    let scene = Scene::new();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2701171000\n";
    let index = r#"{"weight_map": {"pos_embed": "model-00001-of-00002.safetensors", "x": "b.safetensors"}}"#;
    for (name, content, parts) in [
        ("lfs", pointer.as_bytes(), &["git lfs pull"][..]),
        ("torch", b"PK\x03\x04\x00\x00\x08\x08 and so on, for a while", &["PyTorch", "damaged"]),
        ("page", b"<!DOCTYPE html><html>Not found</html>", &["web page"]),
        ("zeros", &[0; 4096], &["zeros"]),
        ("hdf5", b"\x89HDF\r\n\x1a\n and so on, for a while", &["HDF5"]),
        ("json", b"{\"a\": 1}        ", &["JSON"]),
    ] {
        scene.spoiled(name, |_| ());
        scene.write(&format!("{name}/model.safetensors"), content);
        let file = format!("{name}/model.safetensors");
        let parts = [parts, &[file.as_str()]].concat();
        scene.refuses(&format!("{SAMPLE} x.npz --checkpoint {name}"), 1, &parts);
        let weights = format!("--model checkpoint --weights {name}/model.safetensors");
        scene.refuses(
            &format!("build-engine --program denoise --provider none {weights} --out e"),
            1,
            &parts,
        );
    }
    scene.spoiled("shards", |_| ());
    fs::remove_file(scene.path("shards/model.safetensors")).unwrap();
    scene.write("shards/model.safetensors.index.json", index);
    scene.refuses(&format!("{SAMPLE} x.npz --checkpoint shards"), 1, &["index", "2 shards"]);
    // The same words for data.
    scene.write("latents.safetensors", pointer);
    scene.refuses("data check --kind latents --path latents.safetensors", 1, &["git lfs pull"]);
}

#[test]
fn a_model_is_named_alike_everywhere() {
    let scene = Scene::new();
    scene.mudit("train --offline --config run.toml --out r").succeeds();
    let latest = "r/checkpoints/latest";
    for (name, model) in [("run", "r"), ("checkpoint", latest)] {
        let build =
            format!("build-engine --offline --program denoise --batch 2 --provider none --model {model}");
        scene.mudit(&format!("{build} --out {name}")).succeeds();
        scene.mudit(&format!("inspect {model}")).succeeds();
        scene.mudit(&format!("{SAMPLE} {name}.npz --checkpoint {model}")).succeeds();
    }
    // The average, as everywhere.
    let weights = |file: &str| tensors(&scene.path(file));
    assert!(weights("run/ema.safetensors") == weights(&format!("{latest}/ema.safetensors")));
    // A file with its model beside it, and what is neither.
    scene.mudit(&format!("{SAMPLE} file.npz --checkpoint {latest}/ema.safetensors")).succeeds();
    assert!(fs::read(scene.path("file.npz")).unwrap() == fs::read(scene.path("run.npz")).unwrap());
    save(&scene.path("alone.safetensors"), &weights(&format!("{latest}/ema.safetensors")));
    scene.refuses(
        &format!("{SAMPLE} x.npz --checkpoint alone.safetensors"),
        2,
        &["is a file", "config.json"],
    );
    scene.refuses(&format!("{SAMPLE} x.npz --checkpoint run"), 2, &["is an engine", "--engine"]);
    scene.refuses(&format!("{SAMPLE} x.npz --engine r"), 1, &["`r` is no engine"]);
    scene.write("many/a.pt", b"");
    scene.write("many/b.pt", b"");
    fs::copy(scene.path("checkpoint/config.json"), scene.path("many/config.json")).unwrap();
    scene.refuses(&format!("{SAMPLE} x.npz --checkpoint many"), 1, &["several", "a.pt", "b.pt"]);
}
