//! A folder with a small feature network and sets of images, for the proofs of `mudit fid`.

use std::fs;
use std::path::Path;

use graph_builder::{Builder, Type, Weights};
use mudit_tests::draws::Draws;
use serde_json::Value;

use crate::process::Mudit;
use crate::scene::Scene;

/// Side of the images, and how many the network takes.
pub(crate) const SIDE: usize = 8;
pub(crate) const BATCH: usize = 10;
/// Features of the network.
const FEATURES: usize = 12;
/// Options that every run needs here.
pub(crate) const NETWORK: &str = "--offline --few --network net.onnx";

/// A scene with the network and with `real` and `fake` images as `.npz`.
pub(crate) fn scene(real: usize, fake: usize) -> Scene {
    let scene = Scene::new();
    let b = Builder::new("features");
    let x = b.input("images", Type::f32([BATCH, 3, SIDE, SIDE]));
    let means = x.reshape([BATCH, FEATURES, 3 * SIDE * SIDE / FEATURES]);
    let features = (means.square().mean(&[2]) * b.scalar(3.0)).tanh().reshape([BATCH, FEATURES]);
    b.output("features", features);
    let program = b.finish().unwrap().optimised().unwrap().emit(Weights::Inputs).unwrap();
    scene.write("net.onnx", program.bytes);
    images(&scene, "real.npz", real, 1.0);
    images(&scene, "fake.npz", fake, 0.8);
    scene
}

pub(crate) fn pixels(name: &str, count: usize, contrast: f64) -> Vec<u8> {
    let mut draws = Draws::named(name);
    let image = SIDE * SIDE * 3;
    (0..count * image)
        .map(|i| (draws.below(256) as f64 * contrast * (0.5 + (i % 7) as f64 / 14.0)) as u8)
        .collect()
}

pub(crate) fn images(scene: &Scene, name: &str, count: usize, contrast: f64) {
    let mut archive =
        mudit::render::arrays::SampleArchive::create(&scene.path(name), count, [SIDE, SIDE, 3]).unwrap();
    archive.push(&pixels(name, count, contrast)).unwrap();
    archive.finish(&vec![0; count]).unwrap();
}

pub(crate) fn fid(scene: &Scene, line: &str) -> Mudit {
    scene.mudit(&format!("fid {line}"))
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}
