//! Every op on ONNX Runtime against the reference interpreter; the fused ops by their function bodies and by their
//! native kernels.

use std::collections::BTreeSet;

use graph_builder::{DType, OnnxProgram, Weights as Parameters};
use mudit_tests::Feeds;
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::{Answer, run};
use mudit_tests::op_rows::rows;
use mudit_tests::op_table::Row;
use runtime::Weights;

/// The op alone, its results brought to a type that the host reads, and their values by name.
fn program(row: &Row) -> (OnnxProgram, Feeds) {
    let graph = row.graph_of(|result| {
        let readable = !matches!(result.ty().dtype, DType::F16 | DType::Bf16);
        if readable { result } else { result.cast(DType::F32) }
    });
    let values = graph.eval(&row.feeds()).unwrap();
    let want = graph.outputs().iter().map(|(name, _)| name.clone()).zip(values).collect();
    (graph.emit(Parameters::Inputs).unwrap(), want)
}

fn answer(row: &Row, program: &OnnxProgram, native_kernels: bool) -> Answer {
    run(program, &Weights::Inside, &row.feeds(), native_kernels)
}

#[test]
fn onnx_runtime_computes_what_the_interpreter_computes() {
    let mut worst = (0.0, String::new());
    for row in rows() {
        let (program, want) = program(&row);
        let got = answer(&row, &program, false).outputs;
        for (name, want) in &want {
            let error = relative_l2(&got[name], want);
            assert!(error <= row.parity, "{}: {name}: relative error {error:e}", row.name());
            if error > worst.0 {
                worst = (error, row.name());
            }
        }
        if !program.native_ops.is_empty() {
            let inlined = answer(&row, &program.inlined().unwrap(), false).outputs;
            assert!(inlined == got, "{}: other bits without a function", row.name());
        }
    }
    println!("worst op on ONNX Runtime: {:.1e}, {}", worst.0, worst.1);
}

#[test]
fn native_kernels_compute_what_the_function_bodies_and_the_interpreter_compute() {
    let mut covered = BTreeSet::new();
    let mut worst = (0.0, String::new());
    for row in rows() {
        let (program, want) = program(&row);
        let Some(op) = program.native_ops.first() else { continue };
        assert_eq!((program.native_ops.len(), op.as_str()), (1, row.op), "{}", row.name());
        let (body, kernel) = (answer(&row, &program, false), answer(&row, &program, true));
        assert_eq!(body.calls(op), 0, "{}: a kernel ran where the body should", row.name());
        assert_eq!(kernel.calls(op), 1, "{}: the kernel did not run", row.name());
        for (way, values) in [("interpreter", &want), ("body", &body.outputs)] {
            for (name, value) in values {
                let error = relative_l2(&kernel.outputs[name], value);
                let what = format!("{}: {name}: kernel against {way}", row.name());
                assert!(error <= row.parity, "{what}: relative error {error:e}");
                if error > worst.0 {
                    worst = (error, what);
                }
            }
        }
        covered.insert(op.clone());
    }
    let kernels: BTreeSet<String> = runtime::kernels::names().map(str::to_owned).into();
    assert_eq!(covered, kernels, "kernels without a row, or fused ops without a kernel");
    println!("worst native kernel: {:.1e}, {}", worst.0, worst.1);
}
