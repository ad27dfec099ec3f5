//! Every op on ONNX Runtime against the reference interpreter; the fused ops by their function bodies and by their
//! native kernels.

use std::collections::BTreeSet;

use graph_builder::{Builder, DType, OnnxProgram, Weights as Parameters};
use mudit_tests::Array;
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::{Answer, run};
use runtime::Weights;

use crate::op_rows::rows;
use crate::op_table::Row;

/// The op alone, its answer brought to a type that the host reads.
fn program(row: &Row) -> (OnnxProgram, Array) {
    let b = Builder::new(row.name());
    let answer = (row.build)(&b, &row.declare(&b));
    let readable = !matches!(answer.ty().dtype, DType::F16 | DType::Bf16);
    b.output("out", if readable { answer } else { answer.cast(DType::F32) });
    let graph = b.finish().unwrap_or_else(|e| panic!("{}: {e}", row.name()));
    let want = graph.eval(&row.feeds()).unwrap().remove(0);
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
        let error = relative_l2(&answer(&row, &program, false).outputs["out"], &want);
        assert!(error <= row.parity, "{}: relative error {error:e}", row.name());
        if error > worst.0 {
            worst = (error, row.name());
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
        for (way, got) in [("interpreter", &want), ("body", &body.outputs["out"])] {
            let error = relative_l2(&kernel.outputs["out"], got);
            assert!(error <= row.parity, "{}: kernel against {way}: relative error {error:e}", row.name());
            if error > worst.0 {
                worst = (error, format!("{} against {way}", row.name()));
            }
        }
        covered.insert(op.clone());
    }
    let kernels: BTreeSet<String> = runtime::kernels::names().map(str::to_owned).into();
    assert_eq!(covered, kernels, "kernels without a row, or fused ops without a kernel");
    println!("worst native kernel: {:.1e}, {}", worst.0, worst.1);
}
