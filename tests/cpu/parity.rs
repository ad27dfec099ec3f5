//! Small models with random weights against a PyTorch implementation: answers, losses and every gradient, on ONNX
//! Runtime with native kernels and without. `fixtures/README.md` says how the fixtures were made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use graph_builder::{ExternalTensor, Type, Weights as Parameters};
use models::{DitConfig, Guidance, ProgramKind, program};
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::{Answer, array, run};
use mudit_tests::tolerance::{MODEL, MODEL_REACHED};
use mudit_tests::{Array, Feeds};
use ndarray::Axis;
use runtime::safetensors_file::SafetensorsReader;
use runtime::{Weights, read_safetensors_file};

const FIXTURES: [&str; 2] = ["dit-d60-h5-p4", "dit-d48-h4-p2"];
const WEIGHTS: &str = "weights.safetensors";
const GUIDANCE: f64 = 4.0;

struct Fixture {
    name: &'static str,
    folder: PathBuf,
    cfg: DitConfig,
    inputs: Feeds,
    expected: Feeds,
}

fn tensors(path: &Path) -> Feeds {
    let read = read_safetensors_file(path).unwrap_or_else(|e| panic!("{e}"));
    read.into_iter().map(|(name, t)| (name, array(t.shape().dims(), &t.to_f32()))).collect()
}

impl Fixture {
    fn open(name: &'static str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
        let cfg = DitConfig::resolve(folder.to_str().unwrap()).unwrap_or_else(|e| panic!("{e}"));
        let read = |file: &str| tensors(&folder.join(format!("{file}.safetensors")));
        Self { name, cfg, inputs: read("inputs"), expected: read("expected"), folder }
    }

    /// Feeds of a sampling program for the first `n` samples.
    fn sampling(&self, n: usize) -> Feeds {
        let rows = |key: &str| self.inputs[key].slice_axis(Axis(0), (0..n).into()).to_owned();
        let guidance = Array::from_elem(ndarray::IxDyn(&[n]), GUIDANCE);
        [("x", rows("forward_x")), ("t", rows("forward_t")), ("y", rows("forward_y")), ("guidance", guidance)]
            .map(|(k, v)| (k.to_owned(), v))
            .into()
    }

    /// Feeds of a training program for step `k`; dropped labels become the null class.
    fn training(&self, k: usize) -> Feeds {
        let input = |key: &str| self.inputs[&format!("train{k}_{key}")].clone();
        let mut labels = input("y");
        let null = self.cfg.null_class().unwrap() as f64;
        labels.zip_mut_with(&input("drop"), |y, &drop| *y = if drop == 1.0 { null } else { *y });
        let one = ndarray::arr0(1.0).into_dyn();
        let mut feeds = tensors(&self.folder.join(WEIGHTS));
        feeds.extend(
            [
                ("x0", input("x0")),
                ("noise", input("noise")),
                ("t", input("t")),
                ("y", labels),
                ("hp.output_multiplier", one.clone()),
                ("hp.vb_weight", one),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        feeds
    }

    /// Runs a sampling program whose initializers point into the fixture's weights file.
    fn sample(&self, kind: ProgramKind, n: usize, guidance: Guidance, native_kernels: bool) -> Answer {
        let file = SafetensorsReader::open(self.folder.join(WEIGHTS)).unwrap();
        let located = file.names().map(|name| {
            let range = file.byte_range(name).unwrap();
            let ty = Type::f32(file.shape(name).unwrap());
            (name.to_owned(), ExternalTensor { ty, offset: range.start, length: range.end - range.start })
        });
        let tensors: BTreeMap<String, ExternalTensor> = located.collect();
        let graph = program(&self.cfg, kind, n, guidance).unwrap().optimised().unwrap();
        let program = graph.emit(Parameters::External { file: WEIGHTS, tensors: &tensors }).unwrap();
        run(&program, &Weights::Directory(self.folder.clone()), &self.sampling(n), native_kernels)
    }

    fn train(&self, k: usize, kind: ProgramKind, native_kernels: bool) -> Answer {
        let n = self.inputs["train0_t"].len();
        let graph = program(&self.cfg, kind, n, Guidance::Off).unwrap().optimised().unwrap();
        let program = graph.emit(Parameters::Inputs).unwrap();
        run(&program, &Weights::Inside, &self.training(k), native_kernels)
    }
}

/// The worst relative error so far, and whose it is.
#[derive(Default)]
struct Worst(f64, String);

impl Worst {
    fn check(&mut self, what: &str, got: &Array, want: &Array) {
        let want = want.to_shape(got.raw_dim()).unwrap().to_owned();
        let error = relative_l2(got, &want);
        const { assert!(MODEL_REACHED <= MODEL) }
        assert!(error <= MODEL_REACHED, "{what}: relative error {error:e}");
        if error > self.0 {
            *self = Self(error, what.to_owned());
        }
    }
}

fn each(mut prove: impl FnMut(&Fixture, bool, &str)) {
    for name in FIXTURES {
        let fixture = Fixture::open(name);
        for native in [true, false] {
            let what = format!("{}, {}", fixture.name, if native { "native kernels" } else { "function bodies" });
            prove(&fixture, native, &what);
        }
    }
}

#[test]
fn answers_are_those_of_the_reference() {
    let mut worst = Worst::default();
    each(|fixture, native, what| {
        let plain = fixture.sample(ProgramKind::Denoise, 4, Guidance::Off, native);
        worst.check(&format!("{what}: answer"), &plain.outputs["out"], &fixture.expected["forward_out"]);
        for (channels, guidance) in [(3, Guidance::First(3)), (4, Guidance::All)] {
            let guided = fixture.sample(ProgramKind::DenoiseCfg, 2, guidance, native);
            let want = &fixture.expected[&format!("forward_cfg{channels}_out")];
            worst.check(&format!("{what}: guidance on {channels} channels"), &guided.outputs["out"], want);
        }
        assert_eq!(plain.calls("LayerNormModulate") > 0, native, "{what}");
    });
    println!("worst answer: {:.1e}, {}", worst.0, worst.1);
}

#[test]
fn losses_are_those_of_the_reference() {
    let mut worst = Worst::default();
    each(|fixture, native, what| {
        for k in 0..3 {
            let answer = fixture.train(k, ProgramKind::Loss, native);
            for (output, key) in [("loss", "loss"), ("loss.mse", "mse"), ("loss.vb", "vb")] {
                let want = &fixture.expected[&format!("train{k}_{key}")];
                worst.check(&format!("{what}: {output} of step {k}"), &answer.outputs[output], want);
            }
        }
    });
    println!("worst loss: {:.1e}, {}", worst.0, worst.1);
}

#[test]
fn gradients_are_those_of_the_reference() {
    let mut worst = Worst::default();
    each(|fixture, native, what| {
        let want = tensors(&fixture.folder.join("grads.safetensors"));
        let answer = fixture.train(0, ProgramKind::TrainStep, native);
        let gradients = answer.outputs.keys().filter_map(|n| n.strip_prefix("grad."));
        assert!(gradients.eq(want.keys().map(String::as_str)), "{what}: names of the gradients");
        for (name, want) in &want {
            worst.check(&format!("{what}: gradient of {name}"), &answer.outputs[&format!("grad.{name}")], want);
        }
        for key in ["loss", "mse", "vb"] {
            let output = if key == "loss" { key.to_owned() } else { format!("loss.{key}") };
            let want = &fixture.expected[&format!("train0_{key}")];
            worst.check(&format!("{what}: {output} of the training step"), &answer.outputs[&output], want);
        }
        for op in runtime::kernels::names() {
            assert_eq!(answer.calls(op) > 0, native, "{what}: {op}");
        }
    });
    println!("worst gradient: {:.1e}, {}", worst.0, worst.1);
}
