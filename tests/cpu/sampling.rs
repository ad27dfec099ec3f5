//! `sample` and `replay` against the reference's trajectories and parameters, and the promise that a seed's image does
//! not depend on its neighbours. `fixtures/README.md` says how the fixtures were made.

use std::fs;
use std::path::Path;

use mudit_tests::Array;
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::array;
use mudit_tests::tolerance::{MODEL, MODEL_REACHED};
use ndarray::Axis;
use runtime::HostTensor;
use tempfile::TempDir;

use crate::process::mudit;
use crate::scene::{checkpoint, fixture, tensors};

const FIXTURES: [&str; 2] = ["dit-d60-h5-p4", "dit-d48-h4-p2"];

/// The reference's trajectories and the options that give them.
const TRAJECTORIES: [(&str, &str); 8] = [
    ("ddpm10_plain", "--sampler ddpm --steps 10 --cfg 1"),
    ("ddpm10_cfg3", "--sampler ddpm --steps 10 --cfg 4 --cfg-channels 3"),
    ("ddpm10_cfg4", "--sampler ddpm --steps 10 --cfg 4 --cfg-channels all"),
    ("ddim10_plain", "--sampler ddim --steps 10 --cfg 1"),
    ("ddim10_cfg3", "--sampler ddim --steps 10 --cfg 4"),
    ("ddim10_cfg4", "--sampler ddim --steps 10 --cfg 4 --cfg-channels 4"),
    ("ddim10_eta05_cfg4", "--sampler ddim --eta 0.5 --steps 10 --cfg 4 --cfg-channels all"),
    ("ddim10int_cfg4", "--sampler ddim --steps ddim10 --cfg 4 --cfg-channels all"),
];

fn values(tensor: &HostTensor) -> Array {
    array(tensor.shape().dims(), &tensor.to_f32())
}

/// A checkpoint directory of a fixture's model.
fn model(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path(), name);
    folder
}

/// `mudit sample` in the checkpoint's own folder.
fn sample(folder: &Path, line: &str) -> serde_json::Value {
    let line = format!("sample --offline --checkpoint . {line}");
    mudit(line.split_whitespace()).within(folder).json()
}

#[test]
fn trajectories_are_those_of_the_reference() {
    let mut worst = (0.0, String::new());
    for name in FIXTURES {
        let folder = model(name);
        let expected = tensors(&fixture(name, "expected.safetensors"));
        let known = expected.keys().filter(|k| k.starts_with("ddpm") || k.starts_with("ddim"));
        assert!(
            known.clone().all(|k| TRAJECTORIES.iter().any(|(t, _)| t == k)),
            "a trajectory is not compared"
        );
        assert_eq!(known.count(), TRAJECTORIES.len());
        let noise = fixture(name, "sample-noise.safetensors").display().to_string();
        for (key, options) in TRAJECTORIES {
            sample(folder.path(), &format!("{options} --noise {noise} --save-trajectory t.safetensors"));
            let got = values(&tensors(&folder.path().join("t.safetensors"))["trajectory"]);
            let want = values(&expected[key]);
            assert_eq!(got.shape(), want.shape(), "{key}");
            for (k, (got, want)) in got.axis_iter(Axis(0)).zip(want.axis_iter(Axis(0))).enumerate() {
                let error = relative_l2(&got.to_owned(), &want.to_owned());
                const { assert!(MODEL_REACHED <= MODEL) }
                assert!(error <= MODEL_REACHED, "{name} {key}: {error:e} after step {k}");
                if error > worst.0 {
                    worst = (error, format!("{name} {key} after step {k}"));
                }
            }
        }
    }
    println!("worst trajectory: {:.1e}, {}", worst.0, worst.1);
}

/// A file's tensors as one row of values, all but the K third of the `qkv` biases: their gradient is zero but for
/// rounding, which AdamW turns into whole steps.
fn comparable(path: &Path) -> Vec<(String, Array)> {
    let without_k = |name: &str, tensor: &HostTensor| {
        let all = tensor.to_f32();
        let third = all.len() / 3;
        if name.ends_with("qkv.bias") { [&all[..third], &all[2 * third..]].concat() } else { all }
    };
    let found = tensors(path);
    let mut found: Vec<_> = found.iter().map(|(n, t)| (n.clone(), without_k(n, t))).collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found.into_iter().map(|(n, v)| (n, array(&[v.len()], &v))).collect()
}

#[test]
fn three_steps_of_adamw_are_those_of_the_reference() {
    let mut worst = (0.0, String::new());
    for name in FIXTURES {
        let folder = model(name);
        let batches = fixture(name, "batches.safetensors").display().to_string();
        for kernels in ["", "--no-native-kernels"] {
            let line = format!(
                "replay --offline --model . --weights model.safetensors --batches {batches} --lr 1e-4 \
                 --ema-decay 0.9 --out p.safetensors --ema-out e.safetensors --grads-out g.safetensors {kernels}"
            );
            let report = mudit(line.split_whitespace()).within(folder.path()).json();
            let expected = tensors(&fixture(name, "expected.safetensors"));
            for (k, step) in report["steps"].as_array().unwrap().iter().enumerate() {
                let want = f64::from(expected[&format!("train{k}_loss")].to_f32()[0]);
                let loss = step["loss"].as_f64().unwrap();
                assert!(
                    (loss - want).abs() <= MODEL_REACHED * want,
                    "{name} step {k}: loss {loss}, not {want}"
                );
            }
            for (got, want_file) in
                [("p.safetensors", "adamw3.safetensors"), ("e.safetensors", "ema3.safetensors")]
            {
                let (got, want) =
                    (comparable(&folder.path().join(got)), comparable(&fixture(name, want_file)));
                // The average is kept of a few parameters only, and the fixed table of positions not at all.
                let least = if want_file == "ema3.safetensors" { 6 } else { got.len() - 1 };
                assert!(want.len() >= least, "{} tensors", want.len());
                for (tensor, want) in &want {
                    let (_, got) = got.iter().find(|(n, _)| n == tensor).unwrap();
                    let error = relative_l2(got, want);
                    assert!(error <= MODEL_REACHED, "{name} {kernels}: {tensor} is {error:e} away");
                    if error > worst.0 {
                        worst = (error, format!("{name} {kernels} {tensor}"));
                    }
                }
            }
            assert!(folder.path().join("g.safetensors").is_file());
        }
    }
    println!("worst parameter: {:.1e}, {}", worst.0, worst.1);
}

/// Images and labels of a `.safetensors` of samples, image by image.
fn images(path: &Path) -> Vec<(i64, Vec<f32>)> {
    let all = tensors(path);
    let (samples, labels) = (all["samples"].to_f32(), all["y"].to_i64().unwrap());
    let each = samples.chunks(samples.len() / labels.len()).map(<[f32]>::to_vec);
    labels.iter().copied().zip(each).collect()
}

#[test]
fn an_image_is_that_of_its_own_seed_alone() {
    for name in FIXTURES {
        let folder = model(name);
        // DDPM draws noise in every step; the others of a batch must not show.
        for options in ["--sampler ddpm --steps 5 --cfg 4", "--sampler dpm++2m --steps 5 --cfg 1"] {
            let run = |more: &str| {
                sample(folder.path(), &format!("{options} --classes 1,5,2 {more} --out s.safetensors"));
                images(&folder.path().join("s.safetensors"))
            };
            let all = run("--seed 7 --count 7");
            assert_eq!(all.iter().map(|(y, _)| *y).collect::<Vec<_>>(), [1, 5, 2, 1, 5, 2, 1]);
            assert!(all == run("--seed 7 --count 7"), "the same command gives the same bytes");
            for batch in ["2", "3", "50"] {
                assert!(
                    all == run(&format!("--seed 7 --count 7 --batch {batch}")),
                    "{name} {options}: batch {batch}"
                );
            }
            assert!(all[4..] == run("--seed 7 --count 3 --first 4"), "{name} {options}: from number 4");
            assert!(all[4..6] == run("--seed 7 --count 2 --first 4"), "{name} {options}: numbers 4 and 5");

            assert!(all == run("--seed 7 --count 7 --batch 1"), "{name} {options}: one by one");
            assert!(all == run("--seed 7 --count 7 --threads 1"), "{name} {options}: on one thread");
            let alone = sample(
                folder.path(),
                &format!("{options} --classes 2 --seed 9 --count 1 --out alone.safetensors"),
            );
            assert_eq!(alone["seeds"], serde_json::json!([9]));
            let alone = images(&folder.path().join("alone.safetensors"));
            assert!(all[2] == alone[0], "{name} {options}: image 2 of seed 7 is the image of seed 9");
            let other = run("--seed 8 --count 7");
            assert!(all.iter().zip(&other).all(|(a, b)| a.1 != b.1), "another seed, other images");
        }
    }
}

#[test]
fn every_kind_of_output_can_be_read() {
    let folder = model(FIXTURES[1]);
    let report =
        sample(folder.path(), "--steps 4 --count 6 --classes 2,4 --out a.png,b.npz,c.safetensors --seed 5");
    assert_eq!((report["images"].as_u64(), report["sampler"].as_str()), (Some(6), Some("ddpm")));
    assert_eq!(report["files"].as_array().unwrap().len(), 3);
    let file = |name: &str| folder.path().join(name);
    let first = fs::read(file("a.png")).unwrap();

    let picture = image::open(file("a.png")).unwrap();
    // Two columns of three images of 8 × 8 each, at least.
    assert!(picture.width() >= 16 && picture.height() >= 24, "{} × {}", picture.width(), picture.height());

    let all = tensors(&file("c.safetensors"));
    assert_eq!(all["samples"].shape().dims(), [6, 4, 8, 8]);
    assert_eq!(all["y"].to_i64().unwrap(), [2, 4, 2, 4, 2, 4]);

    let archive = fs::read(file("b.npz")).unwrap();
    let (images, labels) = (entry(&archive, "arr_0.npy"), entry(&archive, "arr_1.npy"));
    assert!(images.0.contains("'|u1'") && images.0.contains("(6, 8, 8, 4"), "{}", images.0);
    assert!(labels.0.contains("'<i8'") && labels.0.contains("(6,"), "{}", labels.0);
    let labels: Vec<i64> = labels.1.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(labels, [2, 4, 2, 4, 2, 4]);
    let samples = all["samples"].to_f32();
    for (at, byte) in images.1.iter().enumerate() {
        let (n, y, x, c) = (at / 256, at / 32 % 8, at / 4 % 8, at % 4);
        let value = samples[((n * 4 + c) * 8 + y) * 8 + x].clamp(-1.0, 1.0);
        let want = (value + 1.0) * 127.5;
        assert!(
            (f32::from(*byte) - want).abs() <= 1.0,
            "image {n}, ({x}, {y}), channel {c}: {byte}, not {want}"
        );
    }
    // The same command again writes the same picture.
    sample(folder.path(), "--steps 4 --count 6 --classes 2,4 --out a.png --seed 5");
    assert!(fs::read(file("a.png")).unwrap() == first);
}

/// Header and data of a stored array in an uncompressed zip archive.
fn entry<'a>(archive: &'a [u8], name: &str) -> (String, &'a [u8]) {
    let number = |at: usize, bytes: usize| {
        archive[at..at + bytes].iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    };
    // The last record says where the directory is; an entry there says where its file is.
    let end = archive.windows(4).rposition(|w| w == b"PK\x05\x06").unwrap();
    let (mut at, entries) = (number(end + 16, 4), number(end + 10, 2));
    for _ in 0..entries {
        assert_eq!(&archive[at..at + 4], b"PK\x01\x02");
        let (stored, size, length) = (number(at + 10, 2) == 0, number(at + 24, 4), number(at + 28, 2));
        if &archive[at + 46..at + 46 + length] == name.as_bytes() {
            assert!(stored, "{name} is compressed");
            let local = number(at + 42, 4);
            let start = local + 30 + number(local + 26, 2) + number(local + 28, 2);
            let npy = &archive[start..start + size];
            assert_eq!(&npy[..6], b"\x93NUMPY");
            let data = 10 + usize::from(npy[8]) + 256 * usize::from(npy[9]);
            return (String::from_utf8_lossy(&npy[10..data]).into_owned(), &npy[data..]);
        }
        at += 46 + length + number(at + 30, 2) + number(at + 32, 2);
    }
    panic!("there is no {name}");
}
