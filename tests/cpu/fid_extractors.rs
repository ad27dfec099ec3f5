//! Extractors beside the Inception network: a user's own ONNX file, and the classifier that is trained here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mudit::execution::Execution;
use mudit::fid::extractor::{Extractor, ImageBatch, Network, Options, Pixels, Taps};
use mudit_tests::execution::onnx_runtime;
use runtime::{SharedArena, read_safetensors_file};
use train_engine::classifier::{ClassifierModel, ClassifierTraining, train_classifier};
use train_engine::data::Dataset;
use train_engine::random::{Purpose, Stream};

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx-files").join(name)
}

fn open(path: PathBuf, names: [Option<&str>; 2], taps: Taps) -> anyhow::Result<Extractor> {
    let [input, output] = names.map(|n| n.map(str::to_owned));
    let network = Network::Onnx { path, input, output, mean: [0.5, 0.25, 0.0], std: [0.5, 1.0, 2.0] };
    Extractor::open(
        &onnx_runtime(),
        &network,
        &Options { execution: Execution::cpu(1), batch: 2, taps },
        &|_| (),
    )
}

fn refused(path: PathBuf, names: [Option<&str>; 2]) -> String {
    open(path, names, Taps::default()).unwrap_err().to_string()
}

/// Three images of one colour each.
fn colours(height: usize, width: usize) -> Vec<u8> {
    [[255, 0, 51], [0, 255, 102], [51, 51, 255]].into_iter().flat_map(|c| c.repeat(height * width)).collect()
}

#[test]
fn a_model_of_open_or_fixed_size_and_either_layout_gives_its_vectors() {
    let want = [[1.0, -0.25, 0.1], [-1.0, 0.75, 0.2], [-0.6, -0.05, 0.5]];
    for (name, height, width) in [("open.onnx", 5, 7), ("last.onnx", 8, 8), ("last.onnx", 20, 13)] {
        let mut extractor = open(model(name), [None, None], Taps::default()).unwrap();
        let described = extractor.describe().clone();
        assert_eq!((described.preset.as_str(), described.pool, extractor.channels()), ("onnx", 3, 3));
        assert_eq!(
            described.preprocessing.contains("8x8"),
            name == "last.onnx",
            "{}",
            described.preprocessing
        );
        let pixels = colours(height, width);
        let images = ImageBatch { height, width, channels: 3, pixels: Pixels::U8(&pixels) };
        let features = extractor.features(&images).unwrap();
        assert_eq!(features.pool.dim(), (3, 3));
        for (row, want) in features.pool.rows().into_iter().zip(want) {
            assert!(row.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5), "{name}: {row} for {want:?}");
        }
    }
}

#[test]
fn a_model_that_is_no_extractor_is_refused_with_what_it_has() {
    let two = refused(model("two.onnx"), [None, None]);
    assert!(two.contains("several outputs") && two.contains("`mean`") && two.contains("`kept`"), "{two}");
    let mut kept = open(model("two.onnx"), [None, Some("kept")], Taps::default()).unwrap();
    assert_eq!((kept.channels(), kept.describe().pool), (1, 1));
    let wrong_size = ImageBatch { height: 4, width: 4, channels: 3, pixels: Pixels::U8(&[0; 48]) };
    assert!(kept.features(&wrong_size).unwrap_err().to_string().contains("takes 1"));
    let text = refused(model("two.onnx"), [Some("picture"), None]);
    assert!(text.contains("no input `picture`") && text.contains("`image` f32(?, 1, 4, 4)"), "{text}");
    assert!(refused(model("five.onnx"), [None, None]).contains("no axis of 1 or 3 channels"));
    assert!(refused(model("none.onnx"), [None, None]).contains("none.onnx"));
    let not_onnx = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    assert!(refused(not_onnx, [None, None]).contains("ONNX Runtime cannot load"));
    let spatial = Taps { spatial: true, logits: false };
    assert!(open(model("open.onnx"), [None, None], spatial).unwrap_err().to_string().contains("sFID"));
}

/// Images whose class is the quarter that is bright.
struct Quarters {
    seed: u64,
    names: Vec<String>,
}

impl Dataset for Quarters {
    fn len(&self) -> usize {
        600
    }
    fn channels(&self) -> usize {
        1
    }
    fn height(&self) -> usize {
        8
    }
    fn width(&self) -> usize {
        8
    }
    fn num_classes(&self) -> usize {
        4
    }
    fn class_names(&self) -> &[String] {
        &self.names
    }
    fn label(&self, index: usize) -> i64 {
        index as i64 % 4
    }
    fn read(&self, index: usize, _: bool, _: &mut Stream, out: &mut [f32]) -> train_engine::Result<i64> {
        let class = index % 4;
        let mut noise = Stream::new(self.seed, Purpose::Noise, 0, index as u64);
        for (i, pixel) in out.iter_mut().enumerate() {
            let quarter = i / 32 * 2 + i % 8 / 4;
            *pixel = 0.6 * noise.normal() + if quarter == class { 0.8 } else { -0.2 };
        }
        Ok(class as i64)
    }
}

#[test]
fn the_classifier_learns_and_a_seed_gives_the_same_bytes() {
    let data = |seed| Quarters { seed, names: Vec::new() };
    let settings = ClassifierTraining { epochs: 3, batch: 20, threads: 1, ..ClassifierTraining::default() };
    let bytes = |parameters: &SharedArena| -> Vec<u32> {
        let arena = parameters.read().unwrap();
        arena.iter().flat_map(|(_, _, values)| values.iter().map(|v| v.to_bits())).collect()
    };
    let train = |seed| -> (ClassifierModel, Vec<f64>) {
        let mut losses = Vec::new();
        let settings = ClassifierTraining { seed, ..settings };
        let model =
            train_classifier(&onnx_runtime(), &data(1), &settings, &mut |_, _, loss| losses.push(loss));
        (model.unwrap(), losses)
    };
    let (mut model, losses) = train(5);
    assert_eq!(losses.len(), 90);
    assert!(losses[89] < 0.5 * losses[0], "{} to {}", losses[0], losses[89]);
    let accuracy = model.accuracy(&data(2)).unwrap();
    assert!(accuracy > 0.95, "{accuracy}");
    assert_eq!(bytes(&model.parameters), bytes(&train(5).0.parameters));
    assert_ne!(bytes(&model.parameters), bytes(&train(6).0.parameters));
    let nothing = ClassifierTraining { epochs: 0, ..settings };
    assert!(train_classifier(&onnx_runtime(), &data(1), &nothing, &mut |_, _, _| ()).is_err());
}

#[test]
fn a_given_classifier_is_used_and_other_sizes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("classifier.safetensors");
    let shape = models::classifier::Classifier { channels: 1, height: 28, width: 28, classes: 10 };
    let graph = shape.features(1).unwrap();
    let layout = train_engine::step::parameter_layout(graph.parameters()).unwrap();
    let mut arena = runtime::Arena::zeros(Arc::clone(&layout)).unwrap();
    train_engine::mup::draw_parameters(&graph, 1, 1.0, &mut arena).unwrap();
    arena.write_safetensors(&path, &std::collections::BTreeMap::new()).unwrap();
    let network = Network::Fashion { weights: Some(path.clone()), seed: 0, offline: true };
    let taps = Taps { spatial: false, logits: true };
    let options = Options { execution: Execution::cpu(1), batch: 8, taps };
    let mut extractor = Extractor::open(&onnx_runtime(), &network, &options, &|_| ()).unwrap();
    assert_eq!((extractor.channels(), extractor.describe().logits), (1, Some(10)));
    let pixels: Vec<u8> = (0..3 * 784).map(|i| (i * 7 % 256) as u8).collect();
    let images = ImageBatch { height: 28, width: 28, channels: 1, pixels: Pixels::U8(&pixels) };
    let features = extractor.features(&images).unwrap();
    assert_eq!((features.pool.dim(), features.logits.unwrap().dim()), ((3, 128), (3, 10)));
    assert!(features.pool.iter().all(|v| *v >= 0.0) && features.pool.iter().any(|v| *v > 0.0));
    let large = ImageBatch { height: 27, width: 28, channels: 1, pixels: Pixels::U8(&pixels[..27 * 28]) };
    let text = extractor.features(&large).unwrap_err().to_string();
    assert!(text.contains("27x28") && text.contains("28x28"), "{text}");
    let unequal = Options { taps: Taps { spatial: true, logits: false }, ..options };
    assert!(Extractor::open(&onnx_runtime(), &network, &unequal, &|_| ()).is_err());
    assert!(read_safetensors_file(&path).is_ok());
}
