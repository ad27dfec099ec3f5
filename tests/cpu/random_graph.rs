//! Random graphs over the ops that models are made of, with their gradients.

use graph_builder::{Builder, DType, Dim, Graph, GraphError, Init, PatchOrder, Type, Value};
use mudit_tests::Feeds;
use mudit_tests::draws::Draws;

/// Shape (N, T, D) of the values, and (N, 1, D) of the rows that condition them.
const SHAPE: [usize; 3] = [2, 3, 4];
const ROW: [usize; 3] = [SHAPE[0], 1, SHAPE[2]];
/// Magnitudes above this are squashed before they are used again.
const LARGE: f64 = 6.0;

/// A value with a bound on its magnitude, so that no chain of products leaves the range of f64.
#[derive(Clone, Copy)]
struct Bounded<'g> {
    value: Value<'g>,
    bound: f64,
}

/// The values so far.
struct Pool<'g> {
    tokens: Vec<Bounded<'g>>,
    rows: Vec<Bounded<'g>>,
    weights: Vec<Value<'g>>,
}

fn pick<'g>(from: &[Bounded<'g>], gene: u32) -> Bounded<'g> {
    // Late values are taken more often: graphs become deep rather than wide.
    let n = from.len();
    let i = (gene >> 8) as usize % (2 * n);
    let Bounded { value, bound } = from[if i < n { i } else { n - 1 }];
    if bound > LARGE { Bounded { value: value.tanh(), bound: 1.0 } } else { Bounded { value, bound } }
}

/// Appends what one gene says.
fn grow<'g>(b: &'g Builder, pool: &mut Pool<'g>, gene: u32) {
    let [n, t, d] = SHAPE;
    let x = pick(&pool.tokens, gene);
    let y = pick(&pool.tokens, gene.rotate_left(9));
    let row = pick(&pool.rows, gene.rotate_left(17));
    let other = pick(&pool.rows, gene.rotate_left(5));
    let weight = pool.weights[(gene >> 20) as usize % pool.weights.len()];
    let number = [0.0, 1.0, -0.5, 2.0][(gene >> 6) as usize % 4];
    let (v, size) = (x.value, x.bound);
    let (bias, bias_bound) = (|| other.value.sum(&[0]).reshape([d]), n as f64 * other.bound);
    let tokens = match gene % 33 {
        0 => (v.gelu(), size),
        1 => (v.tanh().exp(), 3.0),
        2 => ((v.square() + 1.0).log(), size * size),
        3 => ((v.square() + 0.5).sqrt(), size + 1.0),
        4 => (v.sin() + v.cos(), 2.0),
        5 => (v.silu(), size),
        6 => (-(-v), size),
        7 => (v + y.value, size + y.bound),
        8 => (v - row.value, size + row.bound),
        9 => (v * y.value, size * y.bound),
        10 => (v / (y.value.square() + 1.0), size),
        11 => (v * number, 2.0 * size),
        12 => (v + number, size + 2.0),
        13 => (v.maximum(y.value), size.max(y.bound)),
        14 => (v.less(row.value).select(v, y.value), size.max(y.bound)),
        15 => (v.matmul(weight.transpose(&[1, 0])), 4.0 * size),
        16 => (v.matmul(weight), 4.0 * size),
        17 => (v.matmul(y.value.transpose(&[0, 2, 1])).softmax().matmul(y.value), y.bound),
        18 => (v.softmax(), 1.0),
        19 => (v.layer_norm(1e-6), 2.0),
        20 => (v.layer_norm_modulate(other.value, row.value, 1e-6), 3.0 * row.bound + other.bound + 2.0),
        21 => (v.gate_residual(row.value, y.value), size + row.bound * y.bound),
        22 => {
            let [left, right]: [Value<'g>; 2] = v.chunk(2);
            (right.concat(&[left * number], 2), 2.0 * size)
        }
        23 => (v.transpose(&[1, 0, 2]).transpose(&[1, 0, 2]).reshape([n * t, d]).reshape(SHAPE), size),
        24 => (v.slice(1, 1, t).pad(1, 0, 1), size),
        25 => (v.stop_gradient() * y.value, size * y.bound),
        26 => (v.linear(weight, bias()), 4.0 * size + bias_bound),
        27 => (v.gelu().linear(weight, bias()), 4.0 * size + bias_bound),
        28 => {
            let branch = y.value.gelu().linear(weight, bias());
            (v.gate_residual(row.value, branch), size + row.bound * (4.0 * y.bound + bias_bound))
        }
        29 => (v.concat(&[y.value, v * number], 2).attention(2, 0.5), 2.0 * size),
        30 => {
            let patches = v.reshape([n, t, 2, 2]).patchify(2, PatchOrder::ChannelsLast);
            (patches.unpatchify(1, PatchOrder::ChannelsFirst, 1, 1).reshape(SHAPE), size)
        }
        31 => {
            pool.rows.push(Bounded { value: v.mean(&[1]), bound: size });
            return;
        }
        _ => {
            pool.rows.push(Bounded { value: v.sum(&[1]) * 0.25 + b.scalar(2.0) * 0.25, bound: size + 1.0 });
            return;
        }
    };
    pool.tokens.push(Bounded { value: tokens.0, bound: tokens.1 });
}

/// The graph that the genes describe: two of its values, a loss over the last ones, and the gradient of the loss with
/// respect to every input and parameter.
pub(crate) fn random_graph(genes: &[u32]) -> Result<Graph, GraphError> {
    let b = Builder::new("random");
    let inputs =
        [b.input("x", Type::f32(SHAPE)), b.input("y", Type::f32(SHAPE)), b.input("c", Type::f32(ROW))];
    let square = [Dim::Width(SHAPE[2]), Dim::Width(SHAPE[2])];
    let weights = ["w", "v"].map(|name| b.root().param(name, &square, Init::XavierUniform));
    let bounded = |value| Bounded { value, bound: 1.0 };
    let mut pool = Pool {
        tokens: inputs[..2].iter().copied().map(bounded).collect(),
        rows: vec![bounded(inputs[2]), bounded(b.constant(DType::F32, ROW, vec![0.5]))],
        weights: weights.to_vec(),
    };
    for &gene in genes {
        grow(&b, &mut pool, gene);
    }
    let last: Vec<Value<'_>> = pool.tokens.iter().rev().take(3).map(|v| v.value.tanh()).collect();
    let sum =
        last.iter().skip(1).fold(last[0], |sum, v| sum + *v) * pool.rows[pool.rows.len() - 1].value.tanh();
    let loss = sum.square().mean(&[0, 1, 2]).reshape([]);
    let wrt = [inputs.as_slice(), &weights].concat();
    b.output("loss", loss);
    b.output("last", last[0]);
    for (i, gradient) in b.gradients(loss, &wrt)?.into_iter().enumerate() {
        b.output(&format!("grad.{i}"), gradient);
    }
    b.finish()
}

/// Values for the inputs and parameters of [`random_graph`].
pub(crate) fn random_feeds(seed: u64) -> Feeds {
    let mut draws = Draws::new(seed);
    [("x", SHAPE.to_vec()), ("y", SHAPE.to_vec()), ("c", ROW.to_vec()), ("w", vec![4, 4]), ("v", vec![4, 4])]
        .into_iter()
        .map(|(name, shape)| (name.to_owned(), draws.uniform(&shape, -1.0, 1.0)))
        .collect()
}
