//! The fused ops as nodes of ONNX Runtime's CUDA provider.

use std::sync::Arc;

use graph_builder::{Builder, DType, OnnxProgram, Type, Weights as Parameters};
use mudit_tests::Feeds;
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::{execute, options};
use mudit_tests::op_rows::rows;
use runtime::{CudaOptions, Provider, Runtime, Session, SessionOptions, Weights};

use super::memory::rounded;
use super::ops::{more_rows, tolerance};

/// Sessions on CUDA that say where their nodes are.
pub(crate) fn on_cuda(native_kernels: bool) -> SessionOptions {
    let provider = Provider::Cuda(CudaOptions::default());
    SessionOptions { provider, record_placement: true, ..options(native_kernels) }
}

/// A program of nothing but a fused op runs by its kernel, once, on the CUDA provider, and computes in every type what the
/// CPU's kernel computes in f32 from the same values, and the interpreter in f64.
pub(crate) fn every_fused_op(runtime: &Arc<Runtime>) {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let mut programs = 0;
        for row in rows().iter().chain(&more_rows()) {
            let graph = row.graph();
            let wide = graph.emit(Parameters::Inputs).unwrap();
            if wide.native_ops.first().map(String::as_str) != Some(row.op) {
                continue;
            }
            let feeds: Feeds =
                row.feeds().into_iter().map(|(k, v)| (k, v.mapv_into(|v| rounded(dtype, v)))).collect();
            let program = row.graph_in(dtype).emit(Parameters::Inputs).unwrap();
            let what = format!("{} in {dtype}", row.name());
            let placed = Session::load(runtime, &program, &Weights::Inside, &on_cuda(true));
            let placement = placed.unwrap_or_else(|e| panic!("{what}: {e}")).placement().unwrap();
            let nodes: Vec<String> = placement.nodes.iter().map(ToString::to_string).collect();
            let expected = ("CUDAExecutionProvider", "mudit", row.op);
            let found =
                placement.nodes.iter().map(|n| (n.provider.as_str(), n.domain.as_str(), n.op.as_str()));
            assert_eq!(found.collect::<Vec<_>>(), [expected], "{what}: {nodes:?}");

            let cuda = execute(runtime, &program, &Weights::Inside, &feeds, &on_cuda(true));
            assert_eq!(cuda.calls(row.op), 1, "{what}: the kernel did not run");
            let twin = execute(runtime, &wide, &Weights::Inside, &feeds, &options(true));
            let names = graph.outputs().iter().map(|(name, _)| name.clone());
            let exact: Feeds = names.zip(graph.eval(&feeds).unwrap()).collect();
            for (way, answers) in [("the CPU's kernel", &twin.outputs), ("the interpreter", &exact)] {
                for (name, want) in answers {
                    let (error, limit) = (relative_l2(&cuda.outputs[name], want), tolerance(row, dtype));
                    assert!(error <= limit, "{what}: {name} against {way}: {error:e} of {limit:e}");
                }
            }
            programs += 1;
        }
        assert!(programs >= runtime::kernels::names().len(), "{programs} programs");
    }
}

/// The program of `x` ordered after a token of another type.
fn ordered(x: DType, token: DType) -> OnnxProgram {
    let b = Builder::new("ordered");
    let (x, token) = (b.input("x", Type::new(x, [2, 3])), b.input("token", Type::new(token, [5])));
    b.output("y", x.after(token));
    b.finish().unwrap().emit(Parameters::Inputs).unwrap()
}

/// The token of `After` may be of any type.
pub(crate) fn tokens_of_other_types(runtime: &Arc<Runtime>) {
    let values = |shape: &[usize]| {
        mudit_tests::draws::Draws::new(3).uniform(shape, -1.0, 1.0).mapv(|v| rounded(DType::Bf16, v))
    };
    let feeds = Feeds::from([("x".to_owned(), values(&[2, 3])), ("token".to_owned(), values(&[5]))]);
    for (x, token) in [(DType::F32, DType::Bf16), (DType::Bf16, DType::F32)] {
        let answer = execute(runtime, &ordered(x, token), &Weights::Inside, &feeds, &on_cuda(true));
        assert_eq!(answer.calls("After"), 1);
        assert_eq!(answer.outputs["y"], feeds["x"]);
    }
}
