//! The image of a class, a seed and settings is the same bytes, whatever else is computed, and after a restart.

use std::thread;

use image::GenericImageView as _;
use mudit_tests::draws::Draws;
use serde_json::{Value, json};

use super::client::{IMAGES, pictures, post};
use super::{DDPM, Running, ddpm, flow, options};
use crate::process::mudit;
use crate::scene::{checkpoint, tensors};

/// Requests whose images are compared: every kind of solver, guided and not.
fn subjects() -> Vec<Value> {
    let mut all = Vec::new();
    for (model, sampler) in [
        ("tiny", "euler"),
        ("tiny", "heun"),
        ("tiny", "sde"),
        ("latents", "ddpm"),
        ("latents", "ddim"),
        ("latents", "dpm++2m"),
    ] {
        for guidance in [1.0, 3.5] {
            all.push(json!({
                "model": model, "sampler": sampler, "class_label": 1, "seed": 42, "steps": 6,
                "guidance_scale": guidance,
            }));
        }
    }
    all
}

fn image_of(server: &Running, body: &Value) -> Vec<u8> {
    pictures(&post(server.address(), IMAGES, body).expect(200)).remove(0)
}

#[test]
fn a_seed_is_the_same_image_in_thirty_mixes_and_after_a_restart() {
    let subjects = subjects();
    let server = Running::start(options());
    let alone: Vec<Vec<u8>> = subjects.iter().map(|s| image_of(&server, s)).collect();
    for (i, one) in alone.iter().enumerate() {
        assert!(alone[..i].iter().all(|other| other != one), "two different requests give one image: {i}");
    }
    for mix in 0..30 {
        let mut draws = Draws::new(mix);
        let address = server.address();
        thread::scope(|scope| {
            for other in 0..4 + mix % 5 {
                let steps = 2 + draws.below(40);
                let model = ["tiny", "latents"][draws.below(2)];
                let guidance = [1.0, 2.0, 7.5][draws.below(3)];
                let n = 1 + draws.below(4);
                let body = json!({
                    "model": model, "class_label": draws.below(3), "steps": steps, "n": n, "guidance_scale": guidance,
                    "seed": 1000 * mix + other,
                });
                scope.spawn(move || post(address, IMAGES, &body).expect(200));
            }
            // As one of several images of a request, too: image 1 of seed 41 is image 0 of seed 42.
            let picked = draws.below(subjects.len());
            let mut company = subjects[picked].clone();
            company["seed"] = json!(41);
            company["n"] = json!(2);
            let inside =
                scope.spawn(move || pictures(&post(address, IMAGES, &company).expect(200)).remove(1));
            let at_once: Vec<_> = subjects.iter().map(|s| scope.spawn(|| image_of(&server, s))).collect();
            for (i, handle) in at_once.into_iter().enumerate() {
                assert!(handle.join().unwrap() == alone[i], "mix {mix}: {}", subjects[i]);
            }
            assert!(inside.join().unwrap() == alone[picked], "mix {mix}: as one of two");
        });
    }
    drop(server);
    // Another start, with other batches and threads.
    let mut narrow = options();
    (narrow.engine.max_rows, narrow.engine.execution.threads) = (2, 1);
    let server = Running::of(vec![ddpm(), flow()], narrow);
    for (subject, alone) in subjects.iter().zip(&alone) {
        assert!(image_of(&server, subject) == *alone, "after a restart: {subject}");
    }
}

#[test]
fn the_server_gives_what_the_command_gives() {
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path(), DDPM);
    let server = Running::of(vec![ddpm()], options());
    for (sampler, cfg) in [("ddim", "1"), ("ddpm", "3.5"), ("dpm++2m", "2")] {
        let line = format!(
            "sample --offline --checkpoint . --sampler {sampler} --steps 6 --cfg {cfg} --classes 4 --count 2 --seed 8 \
             --out s.safetensors --json"
        );
        mudit(line.split_whitespace()).within(folder.path()).succeeds();
        let values = tensors(&folder.path().join("s.safetensors"))["samples"].to_f32();
        // The second image of seed 8 is the image of seed 9.
        let values = &values[values.len() / 2..];
        let body = json!({
            "sampler": sampler, "steps": 6, "guidance_scale": cfg.parse::<f64>().unwrap(), "class_label": 4, "seed": 9,
        });
        let png = image_of(&server, &body);
        let picture = image::load_from_memory(&png).unwrap();
        for (x, y, pixel) in picture.pixels() {
            for c in 0..3 {
                let want = (127.5 * values[c * 64 + (y * 8 + x) as usize] / 3.0 + 128.0).clamp(0.0, 255.0);
                let apart = (f32::from(pixel.0[c]) - want).abs();
                assert!(apart <= 1.01, "{sampler} at {x}, {y}: {} and {want}", pixel.0[c]);
            }
        }
    }
}
