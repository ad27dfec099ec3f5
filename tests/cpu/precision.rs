//! Mixed precision: programs in bf16 and f16 with every rounding emulated, against the same programs in f32.

use std::sync::Arc;

use graph_builder::{DType, Graph, NativeKernel, Op, Policy, Precision, Shape, Weights as Parameters};
use models::{Guidance, LOSS_SCALE, ProgramKind, ProgramSpec, Recompute, has_loss_scale};
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::{array, run};
use mudit_tests::{Array, Feeds};
use ndarray::ArrayD;
use runtime::update::{UpdateState, UpdateStep};
use runtime::{AdamW, Arena, ArenaLayout, Weights};
use train_engine::loss_scale::LossScale;

use crate::tiny;

/// Precisions narrower than f32, with the relative error (L2) that forward answers, losses and gradients may have.
/// About twice the largest that is measured on the tiny models.
const TOLERANCES: [(Precision, f64, f64, f64); 2] =
    [(Precision::Bf16, 0.012, 0.008, 0.03), (Precision::F16, 0.0018, 0.0012, 0.0036)];
/// Factor on the loss of a training step in f16.
const SCALE: f64 = 1024.0;

/// The optimised program before its conversions.
fn f32_graph(variant: &str, kind: ProgramKind, precision: Precision) -> Graph {
    let graph = tiny::config(variant)
        .program(&ProgramSpec::new(kind, tiny::BATCH).guided(Guidance::First(3)).in_precision(precision))
        .unwrap();
    graph.optimised().unwrap()
}

fn feeds(graph: &Graph, variant: &str) -> Feeds {
    let mut feeds = tiny::feeds(graph, variant);
    if let Some(scale) = feeds.get_mut(LOSS_SCALE) {
        *scale = ArrayD::from_elem(scale.shape(), SCALE);
    }
    feeds
}

/// Errors of each output of the program brought to a precision by a table, in order.
fn errors(
    graph: &Graph,
    variant: &str,
    precision: Precision,
    policy: fn(&Op) -> Policy,
) -> Vec<(String, f64)> {
    let low = graph.in_precision_by(precision, policy).unwrap();
    let feeds = feeds(graph, variant);
    let (want, got) = (graph.eval(&feeds).unwrap(), low.eval_rounded(&feeds).unwrap());
    let names = graph.outputs().iter().map(|(name, _)| name.clone());
    names.zip(got.iter().zip(&want).map(|(got, want)| relative_l2(got, want))).collect()
}

fn worst(errors: &[(String, f64)], of: impl Fn(&str) -> bool) -> f64 {
    errors.iter().filter(|(name, _)| of(name)).fold(0.0, |worst, (_, e)| worst.max(*e))
}

#[test]
fn answers_losses_and_gradients_stay_within_their_tolerances() {
    for (precision, answer, loss, gradient) in TOLERANCES {
        for variant in tiny::VARIANTS {
            for kind in [ProgramKind::Denoise, ProgramKind::DenoiseCfg, ProgramKind::Step] {
                let errors = errors(&f32_graph(variant, kind, precision), variant, precision, Op::policy);
                let error = worst(&errors, |_| true);
                println!("{precision} {variant} {kind}: {error:.1e}");
                assert!(error <= answer, "{precision} {variant} {kind}: {errors:?}");
            }
            let graph = f32_graph(variant, ProgramKind::TrainStep, precision);
            let errors = errors(&graph, variant, precision, Op::policy);
            let gradients = worst(&errors, |name| name.starts_with("grad."));
            let losses = worst(&errors, |name| name.starts_with("loss"));
            println!("{precision} {variant} train-step: losses {losses:.1e}, gradients {gradients:.1e}");
            assert!(losses <= loss && gradients <= gradient, "{precision} {variant}: {errors:?}");
        }
    }
}

#[test]
fn conversions_alone_change_nothing() {
    for variant in tiny::VARIANTS {
        for precision in [Precision::Bf16, Precision::F16] {
            for kind in ProgramKind::ALL {
                let graph = f32_graph(variant, kind, precision);
                let low = graph.in_precision(precision).unwrap();
                let feeds = feeds(&graph, variant);
                assert_eq!(
                    low.eval(&feeds).unwrap(),
                    graph.eval(&feeds).unwrap(),
                    "{variant} {kind} {precision}"
                );
            }
        }
    }
}

/// Loss terms and their sums in the compute type.
fn loss_is_narrow(op: &Op) -> Policy {
    match op.variant() {
        "Unpatchify" | "Mul" | "Sub" | "Add" | "Mean" | "Sum" | "Exp" => Policy::Compute,
        _ => op.policy(),
    }
}

/// The time embedding in the compute type: angles up to 1000.
fn time_is_narrow(op: &Op) -> Policy {
    match op.variant() {
        "Mul" | "Sin" | "Cos" => Policy::Compute,
        _ => op.policy(),
    }
}

#[test]
fn a_wrong_table_is_outside_the_tolerances() {
    let (precision, answer, loss, _) = TOLERANCES[0];
    let narrow =
        errors(&f32_graph("ddpm", ProgramKind::TrainStep, precision), "ddpm", precision, loss_is_narrow);
    assert!(worst(&narrow, |name| name.starts_with("loss")) > loss, "{narrow:?}");
    let narrow =
        errors(&f32_graph("ddpm", ProgramKind::Denoise, precision), "ddpm", precision, time_is_narrow);
    assert!(worst(&narrow, |_| true) > answer, "{narrow:?}");
}

#[test]
fn signatures_change_only_in_parameters_and_gradients() {
    for precision in [Precision::Bf16, Precision::F16] {
        for kind in ProgramKind::ALL {
            let graph = f32_graph("ddpm", kind, precision);
            let low = graph.in_precision(precision).unwrap();
            let types = |g: &Graph| g.inputs().map(|(n, ty)| format!("{n} {ty}")).collect::<Vec<_>>();
            assert_eq!(types(&graph), types(&low));
            assert_eq!(
                types(&graph).iter().any(|t| t.starts_with(LOSS_SCALE)),
                has_loss_scale(kind, precision)
            );
            for ((name, old), (_, new)) in graph.outputs().iter().zip(low.outputs()) {
                let parameter = name.strip_prefix("grad.");
                let declared = graph.node(*old).ty.dtype;
                let want = parameter
                    .map_or(declared, |name| low.parameters().iter().find(|p| p.name == name).unwrap().dtype);
                assert_eq!(low.node(*new).ty.dtype, want, "{name}");
            }
            // The output layer's weight is scaled by an f32 input in training.
            let wide: Vec<&str> =
                low.parameters().iter().filter(|p| p.dtype == DType::F32).map(|p| p.name.as_str()).collect();
            let scaled: &[&str] = if kind.feeds_parameters() { &["final_layer.linear.weight"] } else { &[] };
            assert_eq!(wide, scaled, "{precision} {kind}");
        }
    }
}

#[test]
fn recomputed_blocks_give_the_same_bits() {
    let graph = f32_graph("flow", ProgramKind::TrainStep, Precision::Bf16);
    let feeds = feeds(&graph, "flow");
    let values = [Recompute::None, Recompute::Blocks].map(|recompute| {
        let graph =
            recompute.apply(graph.clone(), &["blocks"]).unwrap().in_precision(Precision::Bf16).unwrap();
        graph.eval_rounded(&feeds).unwrap()
    });
    assert_eq!(values[0], values[1]);
}

#[test]
fn f16_function_bodies_compute_what_the_interpreter_computes() {
    // ONNX Runtime's CPU provider runs f16 through f32 with a rounding after each node.
    let mut worst: f64 = 0.0;
    for variant in tiny::VARIANTS {
        for kind in [ProgramKind::Denoise, ProgramKind::Step, ProgramKind::TrainStep] {
            let low = f32_graph(variant, kind, Precision::F16).in_precision(Precision::F16).unwrap();
            let program = low.emit(Parameters::Inputs).unwrap();
            let feeds = feeds(&low, variant);
            let want = low.eval_rounded(&feeds).unwrap();
            let got = run(&program, &Weights::Inside, &feeds, false).outputs;
            for ((name, _), want) in low.outputs().iter().zip(&want) {
                let error = relative_l2(&got[name], want);
                let allowed = if name.starts_with("grad.") { TOLERANCES[1].3 } else { TOLERANCES[1].1 };
                assert!(error < allowed, "{variant} {kind} {name}: {error:e}");
                worst = worst.max(error);
            }
        }
    }
    println!("f16 on ONNX Runtime against the interpreter: {worst:.1e}");
}

#[test]
fn small_gradients_need_the_loss_scale_in_f16() {
    let graph = f32_graph("flow", ProgramKind::TrainStep, Precision::F16);
    let low = graph.in_precision(Precision::F16).unwrap();
    let gradients = |scale: f64| -> Vec<Array> {
        let mut feeds = feeds(&graph, "flow");
        feeds.insert(LOSS_SCALE.to_owned(), ArrayD::from_elem(ndarray::IxDyn(&[]), scale));
        low.eval_rounded(&feeds).unwrap()
    };
    let zeros = |values: &[Array]| values.iter().flatten().filter(|v| **v == 0.0).count();
    let (plain, scaled, huge) = (gradients(1e-5), gradients(SCALE), gradients(2_f64.powi(40)));
    assert!(zeros(&plain) > 10 * zeros(&scaled).max(1), "{} and {}", zeros(&plain), zeros(&scaled));
    let losses = |values: &[Array]| values[..2].to_vec();
    assert_eq!(losses(&scaled), losses(&huge), "the losses are without the scale");
    assert!(huge.iter().flatten().any(|v| !v.is_finite()), "too large a scale overflows");
}

#[test]
fn cuda_has_a_kernel_for_every_node() {
    for variant in tiny::VARIANTS {
        for precision in Precision::ALL {
            for kind in ProgramKind::ALL {
                let graph = f32_graph(variant, kind, precision).in_precision(precision).unwrap();
                let program = graph.emit(Parameters::Inputs).unwrap();
                program
                    .check_cuda(&|_| NativeKernel::Body)
                    .unwrap_or_else(|e| panic!("{variant} {precision}: {e}"));
            }
        }
    }
    // A table that puts images into bf16 is caught by name.
    let images = |op: &Op| if op.variant() == "Patchify" { Policy::Compute } else { op.policy() };
    let graph = f32_graph("flow", ProgramKind::Denoise, Precision::Bf16);
    let program = graph.in_precision_by(Precision::Bf16, images).unwrap().emit(Parameters::Inputs).unwrap();
    let refusal = program.check_cuda(&|_| NativeKernel::Body).unwrap_err().to_string();
    let parts =
        ["SpaceToDepth of `x_embedder/Patchify", "(in the body of PatchifyBf16)", "no CUDA kernel for bf16"];
    assert!(parts.iter().all(|part| refusal.contains(part)), "{refusal}");
}

/// Training in f16 with dynamic loss scaling on the interpreter, from a first factor; makes one gradient infinite at
/// step `broken`. Gives the losses, and the factor at the end.
fn train_f16(first: f64, broken: Option<u64>) -> (Vec<f64>, LossScale) {
    let graph = f32_graph("flow", ProgramKind::TrainStep, Precision::F16);
    let low = graph.in_precision(Precision::F16).unwrap();
    let mut feeds = feeds(&graph, "flow");
    let names: Vec<(String, Shape)> =
        low.parameters().iter().filter(|p| p.trainable).map(|p| (p.name.clone(), p.shape())).collect();
    let layout = Arc::new(ArenaLayout::new(names.clone()).unwrap());
    let adamw = AdamW::new(&layout, &layout, (0.9, 0.999, 1e-8), 1).unwrap();
    let arena = || Arena::zeros(layout.clone()).unwrap();
    let (mut masters, mut m, mut v, mut gradients) = (arena(), arena(), arena(), arena());
    let fill = |arena: &mut Arena, values: &dyn Fn(&str) -> Vec<f32>| {
        for ((name, _), view) in names.iter().zip(arena.views_mut()) {
            view.copy_from_slice(&values(name));
        }
    };
    fill(&mut masters, &|name| feeds[name].iter().map(|v| *v as f32).collect());
    let mut scale = LossScale::starting_at(first);
    let mut losses = Vec::new();
    for step in 1..=STEPS {
        let factor = if broken == Some(step) { f64::INFINITY } else { scale.scale() };
        feeds.insert(LOSS_SCALE.to_owned(), ArrayD::from_elem(ndarray::IxDyn(&[]), factor));
        for (name, entry, values) in masters.iter() {
            feeds.insert(name.to_owned(), array(entry.shape.dims(), values));
        }
        let values = low.eval_rounded(&feeds).unwrap();
        let outputs: Feeds = low.outputs().iter().map(|(name, _)| name.clone()).zip(values).collect();
        fill(&mut gradients, &|name| outputs[&format!("grad.{name}")].iter().map(|v| *v as f32).collect());
        let before = masters.duplicate().unwrap();
        let (lr, decay) = (vec![3e-3; names.len()], vec![0.0; names.len()]);
        let state = UpdateState {
            parameters: &mut masters,
            gradients: &gradients,
            first_moments: &mut m,
            second_moments: &mut v,
            ema: None,
        };
        let update = UpdateStep {
            step: step - scale.skipped(),
            lr: &lr,
            weight_decay: &decay,
            clip: Some(1.0),
            gradient_scale: scale.gradient_scale(),
        };
        let report = adamw.step(state, &update).unwrap();
        if !report.finite {
            assert!(masters.iter().zip(before.iter()).all(|(a, b)| a.2 == b.2), "step {step} was left out");
        }
        scale.record(step, report.finite).unwrap();
        losses.push(outputs["loss"].sum());
    }
    (losses, scale)
}

/// Steps of [`train_f16`].
const STEPS: u64 = 40;

#[test]
fn training_in_f16_recovers_from_overflow() {
    let (calm, scale) = train_f16(SCALE, None);
    assert_eq!((scale.scale(), scale.skipped()), (SCALE, 0));
    let (losses, scale) = train_f16(2_f64.powi(40), None);
    println!("from 2^40: {} steps left out, then a factor of {}", scale.skipped(), scale.scale());
    assert!(scale.skipped() > 10 && scale.scale() < 2_f64.powi(30), "{scale:?}");
    let left_out = scale.skipped() as usize;
    assert!(
        losses[..left_out].iter().all(|loss| *loss == losses[0]),
        "nothing moved before the factor fitted"
    );
    let (end, same) = (losses[STEPS as usize - 1], calm[STEPS as usize - 1 - left_out]);
    assert!(
        (end - same).abs() < 0.01 * same,
        "{end} after as many steps that counted, {same} without overflow"
    );
    assert!(end < 0.9 * losses[0], "{losses:?}");

    let (losses, scale) = train_f16(SCALE, Some(10));
    assert_eq!((scale.scale(), scale.skipped()), (SCALE / 2.0, 1));
    assert_eq!(losses[9], losses[10], "the step of the overflow was left out");
    assert!(losses[STEPS as usize - 1] < 0.9 * losses[0]);
}
