//! Every fused op's kernels over the op table, in each element type, against the interpreter in f64.

use std::collections::BTreeSet;
use std::sync::Arc;

use graph_builder::{Activation, Builder, DType, Graph, NativeName, Weights as Parameters};
use mudit_tests::difference::relative_l2;
use mudit_tests::op_rows::{row, rows, unit};
use mudit_tests::op_table::{Build, Row};
use mudit_tests::{Array, Feeds};
use ndarray::{ArrayD, IxDyn};
use onnx_protobuf::{ModelProto, NodeProto};
use protobuf::Message as _;
use runtime::cuda::Gpu;
use runtime::cuda::kernels::{AttributeSource, GpuQueue, NativeOp, Place};

use super::memory::{Buffer, rounded};

/// Attributes of a node of a program.
struct Node(NodeProto);

impl AttributeSource for Node {
    fn float(&self, name: &str) -> Option<f32> {
        self.0.attribute.iter().find(|a| a.name == name).map(|a| a.f)
    }
    fn int(&self, name: &str) -> Option<i64> {
        self.0.attribute.iter().find(|a| a.name == name).map(|a| a.i)
    }
    fn text(&self, name: &str) -> Option<String> {
        let attribute = self.0.attribute.iter().find(|a| a.name == name);
        attribute.map(|a| String::from_utf8_lossy(&a.s).into_owned())
    }
}

/// Relative error that an op may have: a few roundings of its answer and of what it holds in between.
pub(crate) fn tolerance(row: &Row, dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 8e-3,
        DType::F16 => 1e-3,
        // The kernels' exponential is good to two units of the last place.
        _ => row.parity.max(2e-6),
    }
}

/// Runs the row's op in a type, once; the answers' values and what was fed. None for other ops.
fn launched(gpu: &Arc<Gpu>, row: &Row, dtype: DType) -> Option<(Graph, Vec<Vec<f64>>, Feeds)> {
    let graph = row.graph();
    let program = graph.emit(Parameters::Inputs).unwrap();
    if program.native_ops.first().map(String::as_str) != Some(row.op) {
        return None;
    }
    let model = ModelProto::parse_from_bytes(&program.bytes).unwrap();
    let called = |op_type: &str| NativeName::parse(op_type).is_some_and(|name| name.op == row.op);
    let node = model.graph.node.iter().find(|n| called(&n.op_type)).unwrap().clone();
    let feeds: Feeds =
        row.feeds().into_iter().map(|(k, v)| (k, v.mapv_into(|v| rounded(dtype, v)))).collect();
    let buffers: Vec<(Vec<i64>, Buffer)> = node
        .input
        .iter()
        .map(|name| {
            // What is not fed is a constant that no kernel reads.
            let value = feeds.get(name).cloned().unwrap_or_else(|| Array::zeros(IxDyn(&[1])));
            let shape = value.shape().iter().map(|&d| d as i64).collect();
            (shape, Buffer::floats(gpu, dtype, value.iter().copied()))
        })
        .collect();
    let inputs: Vec<Place> =
        buffers.iter().map(|(shape, buffer)| Place { shape: shape.clone(), at: buffer.at() }).collect();
    let op = NativeOp::new(row.op, dtype, &Node(node)).unwrap();
    let counts: Vec<usize> = program.outputs.iter().map(|spec| spec.shape.numel()).collect();
    let outputs: Vec<Buffer> = counts.iter().map(|count| Buffer::new(gpu, count * dtype.bytes())).collect();
    let places: Vec<_> = outputs.iter().map(Buffer::at).collect();
    let queue = GpuQueue::new(gpu).unwrap();
    op.enqueue(&queue, &inputs, &places).unwrap_or_else(|e| panic!("{}: {e}", row.name()));
    let values = outputs.iter().zip(counts).map(|(got, count)| got.widened(dtype, count)).collect();
    Some((graph, values, feeds))
}

/// The same, and the error of the answers against the interpreter.
fn run(gpu: &Arc<Gpu>, row: &Row, dtype: DType) -> Option<(Vec<Vec<f64>>, f64)> {
    let (graph, values, feeds) = launched(gpu, row, dtype)?;
    let want = graph.eval(&feeds).unwrap();
    let error = values
        .iter()
        .zip(&want)
        .map(|(got, want)| relative_l2(&ArrayD::from_shape_vec(want.raw_dim(), got.clone()).unwrap(), want));
    let error = error.fold(0.0, f64::max);
    Some((values, error))
}

/// Runs the fused ops once in a type, for one image, with the widths and the number of tokens of DiT-XL/2, but two heads, and
/// narrower linear layers, since the host multiplies. Where it is asked for, the answers are compared.
pub(crate) fn of_published_shapes(gpu: &Arc<Gpu>, dtype: DType, compared: bool) {
    let tokens = || unit([1, 256, 1152]);
    let condition = || unit([1, 1, 1152]);
    let (wide, qkv) = (|| unit([1, 256, 4608]), || unit([1, 256, 432]));
    let rows = [
        row("LayerNormModulate", "XL", vec![tokens(), condition(), condition()], 0, |_, a| {
            a[0].layer_norm_modulate(a[1], a[2], 1e-6)
        }),
        row("LayerNormModulateGrad", "XL", vec![tokens(), condition(), tokens(), tokens()], 0, |_, a| {
            a[0].layer_norm_modulate_grad(a[1], a[2], Some(a[3]), 1e-6)
        }),
        row("GateResidual", "XL", vec![tokens(), condition(), tokens()], 0, |_, a| {
            a[0].gate_residual(a[1], a[2])
        }),
        row("GateResidualGrad", "XL", vec![condition(), tokens(), tokens()], 0, |_, a| {
            a[0].gate_residual_grad(a[1], a[2])
        }),
        row("GeluGrad", "XL", vec![wide(), wide()], 0, |_, a| a[0].gelu_grad(a[1])),
        row("Attention", "XL", vec![qkv()], 0, |_, a| a[0].attention(2, 0.117_851)),
        row("AttentionGrad", "XL", vec![qkv(), unit([1, 256, 144])], 0, |_, a| {
            a[0].attention_grad(a[1], 2, 0.117_851)
        }),
        row("LinearGradWeight", "XL", vec![unit([1, 256, 96]), unit([1, 256, 128])], 0, |_, a| {
            a[0].linear_grad_weight(Activation::Gelu, a[1])
        }),
    ];
    for row in rows {
        let name = row.name();
        if compared {
            let (_, error) = run(gpu, &row, dtype).unwrap_or_else(|| panic!("{name} is no fused op"));
            let limit = tolerance(&row, dtype);
            assert!(error <= limit, "{name} in {dtype}: relative error {error:e} of {limit:e}");
        } else {
            launched(gpu, &row, dtype).unwrap_or_else(|| panic!("{name} is no fused op"));
        }
    }
}

/// Shapes that the table has none of: heads of the published sizes, rows whose accesses are of 16 bytes.
pub(crate) fn more_rows() -> Vec<Row> {
    let mut more = Vec::new();
    for (case, [n, t, heads, k]) in [
        ("heads of 64", [1, 70, 2, 64]),
        ("heads of 72", [2, 70, 2, 72]),
        ("a tile and more", [1, 140, 1, 16]),
        ("scores turned round", [1, 70, 1, 64]),
    ] {
        let build: [Build; 2] = match heads {
            1 if case == "scores turned round" => {
                [|_, a| a[0].attention(1, -0.25), |_, a| a[0].attention_grad(a[1], 1, -0.25)]
            }
            1 => [|_, a| a[0].attention(1, 0.25), |_, a| a[0].attention_grad(a[1], 1, 0.25)],
            _ => [|_, a| a[0].attention(2, 0.125), |_, a| a[0].attention_grad(a[1], 2, 0.125)],
        };
        let qkv = || unit([n, t, 3 * heads * k]);
        more.push(row("Attention", case, vec![qkv()], 0, build[0]).long());
        let operands = vec![qkv(), unit([n, t, heads * k])];
        more.push(row("AttentionGrad", case, operands, 0, build[1]).long());
    }
    more
}

/// Every fused op computes what the interpreter computes, in every type, and the same bits once more after `change`: on a
/// GPU that proves nothing but repetition; where threads take turns it changes their order.
#[allow(clippy::print_stdout, reason = "a proof tells its figures")]
pub(crate) fn every_fused_op(gpu: &Arc<Gpu>, change: &dyn Fn(bool)) {
    let mut covered = BTreeSet::new();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let mut worst = (0.0, String::new());
        for row in rows().iter().chain(&more_rows()) {
            let Some((first, error)) = run(gpu, row, dtype) else { continue };
            let limit = tolerance(row, dtype);
            assert!(error <= limit, "{} in {dtype}: relative error {error:e} of {limit:e}", row.name());
            change(true);
            let (second, _) = run(gpu, row, dtype).unwrap();
            change(false);
            assert!(first == second, "{} in {dtype}: other bits the second time", row.name());
            if error / limit > worst.0 {
                worst = (error / limit, format!("{}: {error:.1e}", row.name()));
            }
            covered.insert(row.op.to_owned());
        }
        println!("nearest to its tolerance in {dtype}: {}", worst.1);
    }
    let kernels: BTreeSet<String> = runtime::kernels::names().map(str::to_owned).into();
    assert_eq!(covered, kernels, "fused ops that were not tried");
}

/// A head larger than any kernel's is refused by name.
pub(crate) fn large_heads_are_refused(gpu: &Arc<Gpu>) {
    let b = Builder::new("attention");
    let qkv = b.input("qkv", graph_builder::Type::new(DType::F32, [1, 2, 3 * 136]));
    b.output("out", qkv.attention(1, 1.0));
    let program = b.finish().unwrap().emit(Parameters::Inputs).unwrap();
    let model = ModelProto::parse_from_bytes(&program.bytes).unwrap();
    let node = model.graph.node.iter().find(|n| n.op_type == "Attention").unwrap().clone();
    let op = NativeOp::new("Attention", DType::F32, &Node(node)).unwrap();
    let (qkv, out) = (Buffer::new(gpu, 3 * 136 * 8), Buffer::new(gpu, 136 * 8));
    let place = Place { shape: vec![1, 2, 3 * 136], at: qkv.at() };
    let error = op.enqueue(&GpuQueue::new(gpu).unwrap(), &[place], &[out.at()]).unwrap_err().to_string();
    assert!(error.contains("136 features a head; at most 128 are taken"), "{error}");
}
