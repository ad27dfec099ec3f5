//! The fused ops as nodes of ONNX Runtime's CUDA provider.

use std::sync::Arc;

use graph_builder::{Builder, DType, Graph, OnnxProgram, Type, Weights as Parameters};
use mudit_tests::difference::relative_l2;
use mudit_tests::execution::{execute, options};
use mudit_tests::op_rows::rows;
use mudit_tests::op_table::{Operand, Row};
use mudit_tests::{Array, Feeds};
use runtime::{CudaOptions, Provider, Runtime, Session, SessionOptions, Weights};

use super::memory::rounded;
use super::ops::{more_rows, tolerance};

/// Sessions on CUDA that say where their nodes are.
pub(crate) fn on_cuda(native_kernels: bool) -> SessionOptions {
    let provider = Provider::Cuda(CudaOptions::default());
    SessionOptions { provider, record_placement: true, ..options(native_kernels) }
}

/// The rows of the fused ops.
fn fused_rows() -> Vec<Row> {
    let names = runtime::kernels::names();
    rows().into_iter().chain(more_rows()).filter(|row| names.contains(&row.op)).collect()
}

/// One program of all rows side by side, with nothing in it but the fused ops.
fn side_by_side(rows: &[Row], dtype: DType) -> Graph {
    let b = Builder::new("side by side");
    for (i, row) in rows.iter().enumerate() {
        let declare = |(j, operand): (usize, &Operand)| {
            b.input(&format!("{i}.{}", Row::operand_name(j)), Type::new(dtype, operand.ty.shape.clone()))
        };
        let operands: Vec<_> = row.operands.iter().enumerate().map(declare).collect();
        for (j, result) in (row.build)(&b, &operands).results().into_iter().enumerate() {
            b.output(&format!("{i}.{j}"), result);
        }
    }
    b.finish().unwrap()
}

/// Every row of the fused ops is a node of the CUDA provider, runs by its kernel, once, and computes in every type what the
/// CPU's kernel computes in f32 from the same values, and the interpreter in f64.
pub(crate) fn every_fused_op(runtime: &Arc<Runtime>) {
    let rows = fused_rows();
    let wide = side_by_side(&rows, DType::F32);
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let feeds = rows.iter().enumerate().flat_map(|(i, row)| {
            let named = move |(name, values): (String, Array)| {
                (format!("{i}.{name}"), values.mapv_into(|v| rounded(dtype, v)))
            };
            row.feeds().into_iter().map(named)
        });
        let feeds: Feeds = feeds.collect();
        let program = side_by_side(&rows, dtype).emit(Parameters::Inputs).unwrap();
        let session = Session::load(runtime, &program, &Weights::Inside, &on_cuda(true));
        let placement = session.unwrap_or_else(|e| panic!("{dtype}: {e}")).placement().unwrap();
        let strange: Vec<String> = placement
            .nodes
            .iter()
            .filter(|n| (n.provider.as_str(), n.domain.as_str()) != ("CUDAExecutionProvider", "mudit"))
            .map(ToString::to_string)
            .collect();
        assert!(strange.is_empty(), "{dtype}: {strange:?}");
        assert_eq!(placement.nodes.len(), rows.len(), "{dtype}: nodes");

        let cuda = execute(runtime, &program, &Weights::Inside, &feeds, &on_cuda(true));
        for name in runtime::kernels::names() {
            let uses = rows.iter().filter(|row| row.op == name).count();
            assert!(
                uses > 0 && cuda.calls(name) == uses as u64,
                "{name} in {dtype}: {} calls",
                cuda.calls(name)
            );
        }
        let program = wide.emit(Parameters::Inputs).unwrap();
        let twin = execute(runtime, &program, &Weights::Inside, &feeds, &options(true));
        let names = wide.outputs().iter().map(|(name, _)| name.clone());
        let exact: Feeds = names.zip(wide.eval(&feeds).unwrap()).collect();
        for (name, got) in &cuda.outputs {
            let row = &rows[name.split('.').next().unwrap().parse::<usize>().unwrap()];
            for (way, answers) in [("the CPU's kernel", &twin.outputs), ("the interpreter", &exact)] {
                let (error, limit) = (relative_l2(got, &answers[name]), tolerance(row, dtype));
                let what = format!("{} in {dtype}, output {name}", row.name());
                assert!(error <= limit, "{what}: {error:e} of {limit:e} from {way}");
            }
        }
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
