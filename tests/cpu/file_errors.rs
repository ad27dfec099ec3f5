//! Files that are missing, cut short, damaged or of something else: exit code 1, one message that names the file and the
//! part of it that is wrong, and every other file as it was.

use std::fs;

use runtime::{HostData, HostTensor};

use crate::scene::{Scene, save, tensors};
use crate::tiny_run::{CLASSES, idx};

const QKV: &str = "blocks.0.attn.qkv.weight";

/// Everything that reads a model's parameters, for a checkpoint directory.
fn readers(directory: &str) -> [String; 3] {
    let weights = format!("--weights {directory}/model.safetensors");
    [
        format!("sample --offline --checkpoint {directory} --steps 2"),
        format!("build-engine --provider none --program denoise --model {directory} {weights} --out e"),
        format!(
            "replay --offline --model {directory} {weights} --batches batches.safetensors --out o.safetensors"
        ),
    ]
}

#[test]
fn parameters_must_be_those_of_the_model() {
    let scene = Scene::new();
    scene.spoiled("shape", |all| {
        let values = all[QKV].to_f32();
        all[QKV] = HostTensor::f32([48, 144], values).unwrap();
    });
    scene.spoiled("name", |all| {
        let tensor = all.shift_remove(QKV).unwrap();
        all.insert("blocks.0.attn.qvk.weight".into(), tensor);
    });
    scene.spoiled("missing", |all| drop(all.shift_remove(QKV)));
    scene.spoiled("extra", |all| drop(all.insert("teacher.weight".into(), all[QKV].clone())));
    scene.spoiled("type", |all| {
        let values = all[QKV].to_f32().iter().map(|v| *v as i64).collect();
        all[QKV] = HostTensor::new([144, 48], HostData::I64(values)).unwrap();
    });
    for (spoiled, parts) in [
        ("shape", &[QKV, "(48, 144)", "(144, 48)"][..]),
        ("name", &[QKV, "blocks.0.attn.qvk.weight"]),
        ("missing", &[QKV]),
        ("extra", &["unexpected tensor `teacher.weight`"]),
        ("type", &[QKV, "i64", "f32"]),
    ] {
        for line in readers(spoiled) {
            scene.refuses(&line, 1, &[parts, &[&format!("{spoiled}/model.safetensors")]].concat());
        }
    }
}

#[test]
fn safetensors_files_must_be_whole() {
    let scene = Scene::new();
    let bytes = fs::read(scene.path("checkpoint/model.safetensors")).unwrap();
    let mut header = bytes.clone();
    header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for (spoiled, content, part) in [
        ("cut", &bytes[..bytes.len() - 1], "bytes of data"),
        ("half", &bytes[..1000], "its header claims"),
        ("empty", &[][..], "0 bytes"),
        ("header", &header, "its header claims"),
        ("text", &b"hello, I am a text and no safetensors file"[..], "its header claims"),
        ("json", &b"\x06\0\0\0\0\0\0\0{\"a\":1"[..], "header cannot be understood"),
    ] {
        scene.spoiled(spoiled, |_| ());
        scene.write(&format!("{spoiled}/model.safetensors"), content);
        for line in readers(spoiled) {
            let file = format!("{spoiled}/model.safetensors is not a complete safetensors file");
            scene.refuses(&line, 1, &[&file, part]);
        }
    }
    fs::create_dir(scene.path("none")).unwrap();
    fs::copy(scene.path("checkpoint/config.json"), scene.path("none/config.json")).unwrap();
    for line in readers("none") {
        scene.refuses(&line, 1, &["none/model.safetensors", "No such file"]);
    }
    scene.refuses(
        "sample --offline --checkpoint data",
        1,
        &["`data`", "no `model.safetensors`", "`checkpoints`"],
    );
}

#[test]
fn given_noise_must_fit_the_call() {
    let scene = Scene::new();
    let good = tensors(&scene.path("sample-noise.safetensors"));
    let sample =
        "sample --offline --checkpoint checkpoint --sampler ddpm --save-trajectory t.safetensors --noise";
    scene.refuses(
        &format!("{sample} sample-noise.safetensors --steps 11"),
        1,
        &[
            "`sample-noise.safetensors`",
            "`noise`",
            "(11, 2, 4, 8, 8) for 11 executed steps",
            "(10, 2, 4, 8, 8)",
        ],
    );
    let x_t = &good["x_T"];
    let labels = |values: Vec<i64>| HostTensor::i64([values.len()], values).unwrap();
    for (name, tensor, parts) in [
        ("x_T", None, &["tensor `x_T` is missing"][..]),
        ("y", None, &["tensor `y` is missing"]),
        ("noise", None, &["noise holds 0 values", "10 steps of 2 images"]),
        (
            "x_T",
            Some(HostTensor::f32([2, 8, 8, 4], x_t.to_f32()).unwrap()),
            &["`x_T`", "(2, 4, 8, 8)", "(2, 8, 8, 4)"],
        ),
        ("y", Some(labels(vec![1, 2, 3])), &["`x_T`", "(3, 4, 8, 8)"]),
        ("y", Some(labels(vec![])), &["tensor `y` is empty"]),
        ("y", Some(labels(vec![4, 11])), &["class 11", "0..11, where 10 is no class"]),
        ("y", Some(labels(vec![4, -1])), &["class -1"]),
        ("y", Some(HostTensor::f32([2], vec![1.0, 2.5]).unwrap()), &["tensor `y` must hold integers"]),
    ] {
        let mut all = good.clone();
        match tensor {
            Some(tensor) => drop(all.insert(name.to_owned(), tensor)),
            None => drop(all.shift_remove(name)),
        }
        save(&scene.path("spoiled.safetensors"), &all);
        scene.refuses(&format!("{sample} spoiled.safetensors --steps 10"), 1, parts);
    }
}

#[test]
fn given_batches_must_fit_the_model() {
    let scene = Scene::new();
    let good = tensors(&scene.path("batches.safetensors"));
    let shaped = |shape: [usize; 4]| HostTensor::f32(shape, vec![0.0; shape.iter().product()]).unwrap();
    for (name, tensor, parts) in [
        ("step1.noise", None, &["tensor `step1.noise` is missing"][..]),
        ("step0.x0", Some(shaped([4, 4, 8, 4])), &["`step0.x0`", "(4, 4, 8, 8)", "(4, 4, 8, 4)"]),
        ("step2.y", Some(HostTensor::i64([4], vec![0, 1, 11, 2]).unwrap()), &["`step2.y`", "outside 0..11"]),
        ("step2.t", Some(HostTensor::i64([3], vec![0, 1, 2]).unwrap()), &["`step2.t`", "(4)", "(3)"]),
    ] {
        let mut all = good.clone();
        match tensor {
            Some(tensor) => drop(all.insert(name.to_owned(), tensor)),
            None => drop(all.shift_remove(name)),
        }
        save(&scene.path("spoiled.safetensors"), &all);
        let line =
            "replay --offline --model checkpoint --weights checkpoint/model.safetensors --out o.safetensors";
        scene.refuses(
            &format!("{line} --batches spoiled.safetensors"),
            1,
            &[parts, &["spoiled.safetensors"]].concat(),
        );
    }
    let line =
        "replay --offline --model checkpoint --weights checkpoint/model.safetensors --out o.safetensors";
    let weights = "checkpoint/model.safetensors";
    scene.refuses(&format!("{line} --batches {weights}"), 1, &[weights, "holds no batch", "`step0.x0`"]);
}

#[test]
fn idx_files_must_be_whole_and_agree() {
    let scene = Scene::new();
    let (images, labels) = ("data/train-images-idx3-ubyte", "data/train-labels-idx1-ubyte");
    let (pixels, classes) = (vec![7; 16 * 64], vec![1; 16]);
    let good = [(images, idx(0x803, &[16, 8, 8], &pixels)), (labels, idx(0x801, &[16], &classes))];
    let huge = idx(0x803, &[usize::MAX, usize::MAX, usize::MAX], &[]);
    let mut gzip = vec![0x1f, 0x8b, 8, 0];
    gzip.extend([9; 40]);
    for (file, content, parts) in [
        (images, idx(0x801, &[16, 8, 8], &pixels), &["magic number", "0x00000803", "0x00000801"][..]),
        (images, idx(0x803, &[16, 8, 8], &pixels[1..]), &["1024 bytes", "1023 bytes: the file is cut short"]),
        (images, idx(0x803, &[16, 8, 8], &[&pixels[..], &[0]].concat()), &["1024 bytes", "more"]),
        (images, idx(0x803, &[16], &[]), &["the end of the file"]),
        (images, idx(0x803, &[0, 8, 8], &[]), &["number of labels", "0, as many as"]),
        (images, huge, &["sizes", "at most"]),
        (images, Vec::new(), &["magic number", "the end of the file"]),
        (images, gzip, &["gzip"]),
        (labels, idx(0x801, &[15], &classes[1..]), &["number of labels", "16, as many as", "got 15"]),
        (labels, idx(0x803, &[16], &classes), &["magic number", "0x00000801"]),
    ] {
        for (file, content) in &good {
            scene.write(file, content);
        }
        scene.write(file, content);
        let parts = [parts, &[file]].concat();
        scene.refuses("train --offline --config run.toml --out r", 1, &parts);
        scene.refuses("data check --offline --kind idx --path data --grid g.png", 1, &parts);
    }
    fs::remove_file(scene.path(labels)).unwrap();
    scene.refuses(
        "train --offline --config run.toml --out r",
        1,
        &["`data`", "`train-labels-idx1-ubyte.gz`"],
    );
    scene.refuses(
        "data check --offline --kind idx --path absent",
        1,
        &["`absent`", "check the path, which begins in the working directory"],
    );
}

#[test]
fn a_folder_of_images_must_hold_images() {
    let scene = Scene::new();
    let check = "data check --offline --kind folder --image-size 8 --path pictures";
    fs::create_dir_all(scene.path("pictures")).unwrap();
    scene.refuses(check, 1, &["`pictures`", "no sub-directory"]);
    fs::create_dir_all(scene.path("pictures/cats")).unwrap();
    scene.refuses(check, 1, &["pictures/cats", "no PNG or JPEG file"]);
    for i in 0..8 {
        image::RgbImage::new(9, 8).save(scene.path(&format!("pictures/cats/{i}.png"))).unwrap();
    }
    scene.mudit(check).succeeds();
    let whole = fs::read(scene.path("pictures/cats/3.png")).unwrap();
    for (content, name) in [(&whole[..whole.len() / 2], "cut"), (b"not a picture".as_slice(), "text")] {
        scene.write("pictures/cats/3.png", content);
        let parts = ["cannot decode the image `pictures/cats/3.png`", "replace or remove"];
        scene.refuses(check, 1, &parts);
        let train = "train --offline --config run.toml --set data.kind=folder --set data.path=pictures \
                     --set data.image_size=8 --set train.batch_size=8 --out";
        scene.mudit(&format!("{train} {name}")).run().refuses(1, &parts);
        assert!(train_engine::checkpoint::list(&scene.path(name)).unwrap().is_empty());
        // Once the picture is whole, the same command trains.
        scene.write("pictures/cats/3.png", &whole);
        scene.mudit(&format!("{train} {name}")).succeeds();
    }
    scene.refuses(
        "data check --offline --kind folder --image-size 8 --path absent",
        1,
        &["`absent`", "check the path"],
    );
}

#[test]
fn a_data_set_must_fit_the_model_and_the_batch() {
    let scene = Scene::new();
    let train = "train --offline --config run.toml --out r --set";
    for (set, parts) in [
        ("train.batch_size=17", &["16 images, fewer than one batch of 17", "`train.batch_size`"][..]),
        ("model.input_size=16", &["`input_size` is 16 in the model, 8 in the data"]),
        ("model.in_channels=3", &["`in_channels` is 3 in the model, 1 in the data"]),
        ("data.image_size=16", &["`data`", "8 by 8", "`data.image_size` is 16"]),
    ] {
        scene.refuses(&format!("{train} {set}"), 1, parts);
    }
    let few = format!("`num_classes` is {} in the model, {CLASSES} in the data", CLASSES - 1);
    scene.refuses(&format!("{train} model.num_classes={}", CLASSES - 1), 1, &[&few]);
    scene.refuses(&format!("{train} data.path=run.toml --set data.kind=latents"), 1, &["run.toml"]);
}

#[test]
fn an_engine_must_be_whole() {
    let scene = Scene::new();
    scene.mudit("build-engine --model checkpoint --program loss --provider none --out e").succeeds();
    assert!(scene.mudit("inspect e").succeeds().contains("loss  batch 1"));
    let manifest = fs::read(scene.path("e/engine.json")).unwrap();
    scene.write("e/engine.json", &manifest[..manifest.len() / 2]);
    scene.refuses("inspect e", 1, &["e is not a usable engine", "build it again"]);
}
