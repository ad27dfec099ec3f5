//! A network of features and pictures for `mudit fid`.

use std::path::Path;

use graph_builder::{Builder, Type, Weights};
use mudit::render::arrays::SampleArchive;

use crate::draws::Draws;

/// Pictures that the network takes at once, and its features.
const TAKES: usize = 10;
const FEATURES: usize = 12;

/// Writes `net.onnx`, a network of mean squares, and two sets of coloured pictures, `real.npz` and `fake.npz`.
///
/// # Panics
/// Where they cannot be written.
pub fn pictures_and_network(folder: &Path, count: usize, side: usize) {
    let b = Builder::new("features");
    let x = b.input("images", Type::f32([TAKES, 3, side, side]));
    let means = x.reshape([TAKES, FEATURES, 3 * side * side / FEATURES]);
    let features = (means.square().mean(&[2]) * b.scalar(3.0)).tanh().reshape([TAKES, FEATURES]);
    b.output("features", features);
    let program = b.finish().unwrap().optimised().unwrap().emit(Weights::Inputs).unwrap();
    std::fs::write(folder.join("net.onnx"), program.bytes).unwrap();
    for (name, contrast) in [("real", 1.0), ("fake", 0.8)] {
        let mut draws = Draws::named(name);
        let pixel = |i: usize| (draws.below(256) as f64 * contrast * (0.5 + (i % 7) as f64 / 14.0)) as u8;
        let pixels: Vec<u8> = (0..count * side * side * 3).map(pixel).collect();
        let place = folder.join(format!("{name}.npz"));
        let mut archive = SampleArchive::create(&place, count, [side, side, 3]).unwrap();
        archive.push(&pixels).unwrap();
        archive.finish(&vec![0; count]).unwrap();
    }
}
