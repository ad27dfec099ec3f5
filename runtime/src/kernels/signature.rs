//! What each native op takes and gives: operands, attributes, shapes.

use super::product::Activation;

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// The native ops.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Op { $($(#[$doc])* $name),+ }

        impl Op {
            pub(crate) const ALL: [Self; [$(stringify!($name)),+].len()] = [$(Self::$name),+];

            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),+ }
            }
        }
    };
}

ops! {
    /// `(x (…,K), weight (N,K), bias (N)) → (…,N)`: `act(x) Wᵀ + b`.
    Linear,
    /// `(ct (…,N), weight (N,K)[, x (…,K)]) → (…,K)`: `(ct W) ⊙ act'(x)`.
    LinearGradInput,
    /// `(ct (…,N), x (…,K)) → (dweight (N,K), dbias (N))`.
    LinearGradWeight,
    /// `(x (B,T,N), gate (B,1,N), a (B,T,K), weight (N,K), bias (N)) → (B,T,N)`: `x + gate ⊙ (act(a) Wᵀ + b)`.
    LinearGateResidual,
    /// `(qkv (B,T,3D)) → (B,T,D)`: multi-head self-attention.
    Attention,
    /// `(qkv (B,T,3D), ct (B,T,D)) → dqkv (B,T,3D)`.
    AttentionGrad,
    /// `(x (B,T,D), shift (B,1,D), scale (B,1,D)) → (B,T,D)`: `LN(x) (1 + scale) + shift`.
    LayerNormModulate,
    /// `(x, scale, ct[, residual]) → (dx, dshift, dscale)`.
    LayerNormModulateGrad,
    /// `(x (B,T,D), gate (B,1,D), y (B,T,D)) → (B,T,D)`: `x + gate y`.
    GateResidual,
    /// `(gate, y, ct) → (dy, dgate)`.
    GateResidualGrad,
    /// `(x (B,C,H,W)) → (B,T,C·P·P)`.
    Patchify,
    /// `(x (B,T,C·P·P)) → (B,C,H,W)`.
    Unpatchify,
    /// `(x, ct) → dx`: derivative of the tanh form of GELU.
    GeluGrad,
    /// `(y, ct) → dx`: derivative of softmax over the last axis, from its answer.
    SoftmaxGrad,
    /// `(x, ct) → dx`: derivative of layer norm over the last axis without affine part.
    LayerNormGrad,
    /// `(x, token) → x`: an order of execution.
    After,
}

/// Values of the attributes; those that an op does not have keep their first value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes {
    pub(crate) epsilon: f32,
    pub(crate) activation: Activation,
    pub(crate) heads: usize,
    pub(crate) scale: f32,
    pub(crate) patch: usize,
    pub(crate) channels_last: bool,
    pub(crate) height: usize,
    pub(crate) width: usize,
}

/// Where attributes come from: a node, at several stages of its life.
pub trait Source {
    /// An attribute that is a number.
    fn float(&self, name: &str) -> Option<f32>;
    /// An attribute that is a whole number.
    fn int(&self, name: &str) -> Option<i64>;
    /// An attribute that is text.
    fn text(&self, name: &str) -> Option<String>;
}

impl Attributes {
    /// Reads what `op` needs.
    ///
    /// # Errors
    /// The name of an attribute that is missing or makes no sense.
    pub(crate) fn read(op: Op, from: &impl Source) -> Result<Self, String> {
        let missing = |name: &str| format!("{} needs the attribute `{name}`", op.name());
        let float = |name: &str| from.float(name).ok_or_else(|| missing(name));
        let size = |name: &str| {
            from.int(name)
                .and_then(|v| usize::try_from(v).ok())
                .filter(|&v| v > 0)
                .ok_or_else(|| missing(name))
        };
        let mut a = Self {
            epsilon: 0.0,
            activation: Activation::None,
            heads: 1,
            scale: 1.0,
            patch: 1,
            channels_last: false,
            height: 1,
            width: 1,
        };
        match op {
            Op::Linear | Op::LinearGradInput | Op::LinearGradWeight | Op::LinearGateResidual => {
                a.activation = match from.text("activation").as_deref() {
                    Some("none") => Activation::None,
                    Some("gelu") => Activation::Gelu,
                    _ => {
                        return Err(format!(
                            "{} needs the attribute `activation`, `none` or `gelu`",
                            op.name()
                        ));
                    }
                };
            }
            Op::Attention | Op::AttentionGrad => {
                (a.heads, a.scale) = (size("heads")?, float("scale")?);
            }
            Op::LayerNormModulate | Op::LayerNormModulateGrad | Op::LayerNormGrad => {
                a.epsilon = float("epsilon")?;
            }
            Op::Patchify | Op::Unpatchify => {
                a.patch = size("patch")?;
                a.channels_last = from.int("channels_last").ok_or_else(|| missing("channels_last"))? != 0;
                if op == Op::Unpatchify {
                    (a.height, a.width) = (size("height")?, size("width")?);
                }
            }
            Op::GateResidual | Op::GateResidualGrad | Op::GeluGrad | Op::SoftmaxGrad | Op::After => {}
        }
        Ok(a)
    }
}

impl Op {
    /// Fewest and most inputs, all f32.
    pub(crate) fn inputs(self) -> (usize, usize) {
        match self {
            Self::Attention | Self::Patchify | Self::Unpatchify => (1, 1),
            Self::LinearGradInput => (2, 3),
            Self::LinearGradWeight
            | Self::AttentionGrad
            | Self::GeluGrad
            | Self::SoftmaxGrad
            | Self::LayerNormGrad
            | Self::After => (2, 2),
            Self::Linear | Self::LayerNormModulate | Self::GateResidual | Self::GateResidualGrad => (3, 3),
            Self::LayerNormModulateGrad => (3, 4),
            Self::LinearGateResidual => (5, 5),
        }
    }

    /// Which input is a weight that a forward product packs.
    pub(crate) fn weight(self) -> Option<usize> {
        match self {
            Self::Linear => Some(1),
            Self::LinearGateResidual => Some(3),
            _ => None,
        }
    }

    /// Number of outputs, all f32.
    pub(crate) fn outputs(self) -> usize {
        match self {
            Self::LayerNormModulateGrad => 3,
            Self::LinearGradWeight | Self::GateResidualGrad => 2,
            _ => 1,
        }
    }

    /// Shapes of the outputs, or `None` when the inputs break the op's contract: a kernel must not index outside.
    pub(crate) fn shapes(self, a: &Attributes, inputs: &[&[i64]]) -> Option<Vec<Vec<i64>>> {
        let like = |i: usize| inputs[i].to_vec();
        let conditioned = |i: usize| {
            let &[b, t, d] = inputs[i] else { return None };
            Some(([b, t, d], [b, 1, d]))
        };
        match self {
            Self::Linear | Self::LinearGateResidual => {
                let first = if self == Self::Linear { 0 } else { 2 };
                let [x, weight, bias] = [inputs[first], inputs[first + 1], inputs[first + 2]];
                let &[n, k] = weight else { return None };
                let (last, lead) = x.split_last()?;
                let out: Vec<i64> = lead.iter().copied().chain([n]).collect();
                let fits = *last == k && bias == [n];
                let gated = self == Self::Linear || {
                    let (whole, row) = conditioned(0)?;
                    out == whole && inputs[1] == row
                };
                (fits && gated).then_some(vec![out])
            }
            Self::LinearGradInput => {
                let (&[n, k], (last, lead)) = (inputs[1], inputs[0].split_last()?) else { return None };
                let out: Vec<i64> = lead.iter().copied().chain([k]).collect();
                let needed = a.activation != Activation::None;
                let x = inputs.get(2).map_or(!needed, |x| **x == out);
                (*last == n && x).then_some(vec![out])
            }
            Self::LinearGradWeight => {
                let ((n, lead), (k, lead_x)) = (inputs[0].split_last()?, inputs[1].split_last()?);
                (lead == lead_x).then_some(vec![vec![*n, *k], vec![*n]])
            }
            Self::Attention | Self::AttentionGrad => {
                let &[b, t, packed] = inputs[0] else { return None };
                let d = packed / 3;
                let out = vec![b, t, d];
                let fits = packed % 3 == 0 && d % a.heads as i64 == 0;
                if self == Self::Attention {
                    return fits.then_some(vec![out]);
                }
                (fits && inputs[1] == out).then_some(vec![like(0)])
            }
            Self::LayerNormModulate => {
                let (whole, row) = conditioned(0)?;
                (inputs[1] == row && inputs[2] == row).then_some(vec![whole.to_vec()])
            }
            Self::LayerNormModulateGrad => {
                let (whole, row) = conditioned(0)?;
                let residual = inputs.get(3).is_none_or(|r| **r == whole);
                let fits = inputs[1] == row && inputs[2] == whole && residual;
                fits.then_some(vec![whole.to_vec(), row.to_vec(), row.to_vec()])
            }
            Self::GateResidual => {
                let (whole, row) = conditioned(0)?;
                (inputs[1] == row && inputs[2] == whole).then_some(vec![like(0)])
            }
            Self::GateResidualGrad => {
                let (whole, row) = conditioned(1)?;
                (inputs[0] == row && inputs[2] == whole).then_some(vec![whole.to_vec(), row.to_vec()])
            }
            Self::Patchify => {
                let (&[b, c, h, w], p) = (inputs[0], a.patch as i64) else { return None };
                (h % p == 0 && w % p == 0).then(|| vec![vec![b, h / p * (w / p), c * p * p]])
            }
            Self::Unpatchify => {
                let (&[b, t, f], p) = (inputs[0], a.patch as i64) else { return None };
                let (h, w) = (a.height as i64, a.width as i64);
                let fits = h % p == 0 && w % p == 0 && t == h / p * (w / p) && f % (p * p) == 0;
                fits.then(|| vec![vec![b, f / (p * p), h, w]])
            }
            Self::GeluGrad | Self::SoftmaxGrad | Self::LayerNormGrad => {
                (inputs[0] == inputs[1]).then_some(vec![like(0)])
            }
            Self::After => Some(vec![like(0)]),
        }
    }
}
