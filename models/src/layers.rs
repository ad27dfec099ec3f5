//! Layers as functions over a scope: linear, attention, MLP, embedders. Letters: N batch, T tokens, D width,
//! H heads, K head size, C channels, P patch side.

use graph_builder::{DType, Dim, Init, PatchOrder, Scope, Value};

use crate::model::InitScheme;
use crate::network::Parameterised;

/// Added to the variance in every layer norm.
const EPSILON: f64 = 1e-6;
/// Length of the sinusoidal timestep embedding.
const FREQUENCIES: usize = 256;
/// Longest period of the sinusoids, in steps.
const MAX_PERIOD: f64 = 10_000.0;

/// Distributions of one init scheme.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inits(pub(crate) InitScheme);

impl Inits {
    /// Weights of linear layers.
    pub(crate) fn linear(self) -> Init {
        match self.0 {
            InitScheme::Original => Init::XavierUniform,
            InitScheme::Mup => Init::KaimingNormal,
        }
    }

    /// Weights of the timestep MLP.
    fn timestep(self) -> Init {
        match self.0 {
            InitScheme::Original => Init::Normal { std: 0.02 },
            InitScheme::Mup => Init::KaimingNormal,
        }
    }

    /// The label table.
    fn table(self) -> Init {
        match self.0 {
            InitScheme::Original => Init::Normal { std: 0.02 },
            InitScheme::Mup => Init::Normal { std: 1.0 },
        }
    }

    /// Weights of the adaLN modulation: zero makes every block the identity at first (adaLN-Zero).
    fn modulation(self) -> Init {
        match self.0 {
            InitScheme::Original => Init::Zeros,
            InitScheme::Mup => Init::KaimingNormal,
        }
    }
}

/// `x Wᵀ + b` with `weight` (out, in) and `bias` (out).
pub(crate) fn linear<'g>(s: &Scope<'g>, x: Value<'g>, input: Dim, output: Dim, init: Init) -> Value<'g> {
    let weight = s.param("weight", &[output, input], init); // (out, in)
    let bias = s.param("bias", &[output], Init::Zeros); // (out)
    x.linear(weight, bias) // (…, out)
}

/// The output layer `x (α/m W)ᵀ + b`, which begins at zero.
pub(crate) fn output_linear<'g>(
    s: &Scope<'g>,
    x: Value<'g>,
    features: usize,
    p: Parameterised<'g>,
) -> Value<'g> {
    let d = x.dim(2);
    let weight = s.param("weight", &[Dim::Fixed(features), Dim::Width(d)], Init::Zeros);
    let bias = s.param("bias", &[Dim::Fixed(features)], Init::Zeros);
    let weight = weight * (p.output_multiplier * (1.0 / p.width_multiplier)); // (features, D)
    x.linear(weight, bias) // (N, T, features)
}

/// `LN(x) · (1 + scale) + shift`.
pub(crate) fn modulate<'g>(x: Value<'g>, shift: Value<'g>, scale: Value<'g>) -> Value<'g> {
    x.layer_norm_modulate(shift, scale, EPSILON) // (N, T, D)
}

/// `M` rows (N, 1, D) of adaLN conditioning from `c` (N, D), on which SiLU was applied once for all layers.
pub(crate) fn modulation<'g, const M: usize>(s: &Scope<'g>, c: Value<'g>, inits: Inits) -> [Value<'g>; M] {
    let (n, d) = (c.dim(0), c.dim(1));
    let rows = s.within("adaLN_modulation.1", |s| {
        linear(s, c, Dim::Width(d), Dim::Width(M * d), inits.modulation()) // (N, M·D)
    });
    rows.reshape([n, 1, M * d]).chunk(2) // M × (N, 1, D)
}

/// Multi-head self-attention: `softmax(q kᵀ / √K) v`.
pub(crate) fn attention<'g>(s: &Scope<'g>, x: Value<'g>, heads: usize, inits: Inits) -> Value<'g> {
    let d = x.dim(2);
    let k = d / heads;
    let qkv = s.within("qkv", |s| linear(s, x, Dim::Width(d), Dim::Width(3 * d), inits.linear())); // (N, T, 3·D)
    let mixed = qkv.attention(heads, 1.0 / (k as f64).sqrt()); // (N, T, D)
    s.within("proj", |s| linear(s, mixed, Dim::Width(d), Dim::Width(d), inits.linear())) // (N, T, D)
}

/// Two linear layers with tanh-GELU between them.
pub(crate) fn mlp<'g>(s: &Scope<'g>, x: Value<'g>, hidden: usize, inits: Inits) -> Value<'g> {
    let d = x.dim(2);
    let h = s.within("fc1", |s| linear(s, x, Dim::Width(d), Dim::Width(hidden), inits.linear())); // (N, T, M)
    s.within("fc2", |s| linear(s, h.gelu(), Dim::Width(hidden), Dim::Width(d), inits.linear())) // (N, T, D)
}

/// Patches of side P, row by row, each projected to a token: a strided convolution as one matrix product.
pub(crate) fn patch_embed<'g>(
    s: &Scope<'g>,
    x: Value<'g>,
    patch: usize,
    d: usize,
    inits: Inits,
) -> Value<'g> {
    let c = x.dim(1);
    let patches = x.patchify(patch, PatchOrder::ChannelsFirst); // (N, T, C·P·P)
    s.within("proj", |s| {
        let dims = [Dim::Width(d), Dim::Fixed(c), Dim::Fixed(patch), Dim::Fixed(patch)];
        let weight = s.param("weight", &dims, inits.linear()).reshape([d, c * patch * patch]); // (D, C·P·P)
        let bias = s.param("bias", &[Dim::Width(d)], Init::Zeros);
        patches.linear(weight, bias) // (N, T, D)
    })
}

/// Sinusoids of `t` (N), cosines first, through a two-layer MLP.
pub(crate) fn timestep_embed<'g>(s: &Scope<'g>, t: Value<'g>, d: usize, inits: Inits) -> Value<'g> {
    let half = FREQUENCIES / 2;
    let frequencies: Vec<f64> =
        (0..half).map(|i| (-MAX_PERIOD.ln() * i as f64 / half as f64).exp()).collect();
    let frequencies = s.builder().constant(DType::F32, [1, half], frequencies);
    let angle = t.reshape([t.dim(0), 1]) * frequencies; // (N, 128)
    let waves = angle.cos().concat(&[angle.sin()], 1); // (N, 256)
    let h = s.within("mlp.0", |s| {
        linear(s, waves, Dim::Fixed(FREQUENCIES), Dim::Width(d), inits.timestep()) // (N, D)
    });
    s.within("mlp.2", |s| linear(s, h.silu(), Dim::Width(d), Dim::Width(d), inits.timestep())) // (N, D)
}

/// Row `y` of the label table; the last row is the null class where the model has one.
pub(crate) fn label_embed<'g>(s: &Scope<'g>, y: Value<'g>, rows: usize, d: usize, inits: Inits) -> Value<'g> {
    s.at("embedding_table").param("weight", &[Dim::Fixed(rows), Dim::Width(d)], inits.table()).gather(y) // (N, D)
}

/// The fixed table of two-dimensional sines and cosines, (T, D) row-major.
///
/// The first half of the features encodes the column, the second the row; in each half sines come first.
pub(crate) fn sin_cos_positions(d: usize, side: usize) -> Vec<f32> {
    let quarter = d / 4;
    let omega = |i: usize| MAX_PERIOD.powf(-(i as f64) / quarter as f64);
    let wave = move |position: usize| {
        let angles = (0..quarter).map(move |i| position as f64 * omega(i));
        angles.clone().map(f64::sin).chain(angles.map(f64::cos))
    };
    (0..side)
        .flat_map(|row| (0..side).map(move |col| (row, col)))
        .flat_map(|(row, col)| wave(col).chain(wave(row)))
        .map(|v| v as f32)
        .collect()
}
