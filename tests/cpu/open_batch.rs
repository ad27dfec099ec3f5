//! A program whose batch size is open answers as the programs of fixed batch sizes do.

use std::collections::BTreeMap;
use std::sync::Arc;

use graph_builder::{DType, ExternalTensor, Graph, OpenProgram, Precision, Type, Weights};
use models::{Guidance, Model, ProgramKind, ProgramSpec};
use mudit_tests::Feeds;
use mudit_tests::execution::{alone, feed, options};
use ndarray::ArrayD;
use runtime::{Binding, OpenSession, Session};

use crate::tiny;

const SAMPLING: [ProgramKind; 4] =
    [ProgramKind::Denoise, ProgramKind::DenoiseCfg, ProgramKind::Step, ProgramKind::StepRows];
/// Where a program's batch sizes are compared; 1 is special, since some ops fall away there.
const BATCHES: [usize; 3] = [1, 3, 4];
const FILE: &str = "parameters";

/// The models and ways of guidance that make different sampling programs.
fn cases() -> Vec<(String, Model, ProgramKind, Guidance)> {
    let mut cases = Vec::new();
    for (name, channels) in [("ddpm", 4), ("flow", 4), ("flow-mup", 1)] {
        let model = tiny::changed(&tiny::config(name), |dit| dit.in_channels = channels);
        for kind in SAMPLING {
            for guidance in [Guidance::First(3), Guidance::All, Guidance::Off] {
                cases.push((name.to_owned(), model.clone(), kind, guidance));
            }
        }
    }
    // Without the null class there is nothing to guide with.
    let plain = tiny::changed(&tiny::config("ddpm"), |dit| dit.class_dropout_prob = 0.0);
    for kind in [ProgramKind::Denoise, ProgramKind::Step, ProgramKind::StepRows] {
        cases.push(("plain".to_owned(), plain.clone(), kind, Guidance::Off));
    }
    cases
}

fn graph(model: &Model, kind: ProgramKind, n: usize, guidance: Guidance, precision: Precision) -> Graph {
    model.compiled(&ProgramSpec::new(kind, n).guided(guidance)).unwrap().in_precision(precision).unwrap()
}

fn open(build: &dyn Fn(usize) -> Graph, weights: Weights<'_>) -> OpenProgram {
    let [first, second] = [97, 101].map(|n| build(n).emit(weights).unwrap());
    OpenProgram::of((97, &first), (101, &second)).unwrap_or_else(|e| panic!("{e}"))
}

/// Values for every input and parameter.
fn feeds(graph: &Graph, batch: usize) -> Feeds {
    let mut feeds = tiny::feeds(graph, "ddpm");
    // A class that every model has.
    feeds.get_mut("y").unwrap().mapv_inplace(|class| class.min(2.0));
    if let Some(pair) = feeds.get_mut("pair") {
        *pair = ArrayD::from_shape_fn(pair.shape(), |i| ((i[0] + 1) % batch) as f64);
    }
    feeds
}

/// The parameters as they lie in a weights file.
fn external(graph: &Graph, feeds: &Feeds) -> (BTreeMap<String, ExternalTensor>, Arc<[u8]>) {
    let (mut tensors, mut bytes) = (BTreeMap::new(), Vec::new());
    for p in graph.parameters() {
        let offset = bytes.len() as u64;
        bytes.extend(feeds[&p.name].iter().flat_map(|v| (*v as f32).to_le_bytes()));
        let (ty, length) = (Type::new(p.dtype, p.shape()), bytes.len() as u64 - offset);
        tensors.insert(p.name.clone(), ExternalTensor { ty, offset, length });
    }
    (tensors, bytes.into())
}

fn answers(session: &Arc<Session>, feeds: &Feeds) -> Vec<Vec<f32>> {
    let mut binding = Binding::owned(session).unwrap();
    feed(&mut binding, session.inputs(), feeds);
    binding.run().unwrap_or_else(|e| panic!("{e}"));
    session.outputs().iter().map(|spec| binding.output_f32(&spec.name).unwrap().to_vec()).collect()
}

#[test]
fn open_programs_answer_bit_for_bit_as_fixed_ones() {
    for (name, model, kind, guidance) in cases() {
        for (native, is_external) in [(true, true), (true, false), (false, true)] {
            let what = format!("{name} {kind} {guidance:?}, native kernels {native}, external {is_external}");
            let model = model.clone();
            alone(&what.clone(), move |runtime| {
                let build = |n| graph(&model, kind, n, guidance, Precision::F32);
                let some = build(3);
                let (tensors, bytes) = external(&some, &feeds(&some, 3));
                let (weights, memory) = if is_external {
                    let memory = runtime::Weights::Memory(bytes);
                    (Weights::External { file: FILE, tensors: &tensors }, memory)
                } else {
                    (Weights::Inputs, runtime::Weights::Inside)
                };
                let open = open(&build, weights);
                let options = options(native);
                let session = OpenSession::load(runtime, &open, &memory, &options).unwrap();
                for n in BATCHES {
                    let (graph, view) =
                        (build(n), session.at(&open.inputs_at(n), &open.outputs_at(n)).unwrap());
                    let (fixed, feeds) = (graph.emit(weights).unwrap(), feeds(&graph, n));
                    let fixed = Session::load(runtime, &fixed, &memory, &options).unwrap();
                    assert_eq!((view.inputs(), view.outputs()), (fixed.inputs(), fixed.outputs()), "{what}");
                    let (got, want) = (answers(&view, &feeds), answers(&fixed, &feeds));
                    assert!(want.iter().flatten().any(|v| *v != 0.0), "{what} at {n}: nothing to compare");
                    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
                        let same = if native {
                            got.to_bits() == want.to_bits()
                        } else {
                            (got - want).abs() <= 1e-6 * want.abs().max(1.0)
                        };
                        assert!(same, "{what} at {n}: {got} instead of {want}");
                    }
                }
            });
        }
    }
}

#[test]
fn programs_of_low_precision_can_leave_their_batch_open() {
    for (name, model, kind, guidance) in cases() {
        for (precision, dtype) in [(Precision::Bf16, DType::Bf16), (Precision::F16, DType::F16)] {
            let build = |n| graph(&model, kind, n, guidance, precision);
            let open = open(&build, Weights::Inputs);
            assert!(open.inputs.iter().any(|spec| spec.dtype == dtype), "{name} {kind}: weights of its type");
            for n in BATCHES {
                let fixed = build(n).emit(Weights::Inputs).unwrap();
                assert_eq!(
                    (open.inputs_at(n), open.outputs_at(n)),
                    (fixed.inputs, fixed.outputs),
                    "{name} {kind} {guidance:?} at {n}"
                );
            }
        }
    }
}
