//! Training losses as graphs: DDPM's hybrid of mean square and variational bound, and flow matching.

use std::{fmt, str::FromStr};

use graph_builder::{Builder, DType, Value};

use crate::error::ModelError;
use crate::nearest::by_name;
use crate::schedule::{DdpmSchedule, TRAINING_STEPS};

/// What the model is trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Objective {
    /// The noise of a DDPM chain of 1000 linear betas, with a learned variance range where the network predicts one.
    #[default]
    Ddpm,
    /// The velocity `e − x_0` of a linear flow from data at `t = 0` to noise at `t = 1`.
    Flow,
}

impl Objective {
    const NAMES: [(&'static str, Self); 2] = [("ddpm", Self::Ddpm), ("flow", Self::Flow)];

    /// The name in `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ddpm => "ddpm",
            Self::Flow => "flow",
        }
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Objective {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        by_name("objective", name, &Self::NAMES)
    }
}

/// Terms of a loss, one value a sample.
pub(crate) struct Terms<'g> {
    /// Mean square error (N).
    pub(crate) mse: Value<'g>,
    /// Variational bound in bits per dimension (N), of a model that learns its variance.
    pub(crate) vb: Option<Value<'g>>,
}

/// Mean over all axes but the first: (N, C, H, W) → (N).
fn mean_flat(x: Value<'_>) -> Value<'_> {
    x.mean(&[1, 2, 3]).reshape([x.dim(0)])
}

/// The schedule's numbers at each sample's timestep, as (N, 1, 1, 1).
pub(crate) struct DdpmAt<'g> {
    sqrt_alpha_bar: Value<'g>,
    sqrt_one_minus_alpha_bar: Value<'g>,
    sqrt_recip_alpha_bar: Value<'g>,
    sqrt_recipm1_alpha_bar: Value<'g>,
    mean_x0: Value<'g>,
    mean_xt: Value<'g>,
    min_log_variance: Value<'g>,
    max_log_variance: Value<'g>,
    is_first: Value<'g>,
}

impl<'g> DdpmAt<'g> {
    /// Looks the tables up at `t` (N), a whole number of 0..1000 held as f32.
    pub(crate) fn new(b: &'g Builder, t: Value<'g>) -> Result<Self, ModelError> {
        let s = DdpmSchedule::linear(TRAINING_STEPS)?;
        let n = t.dim(0);
        let columns = [
            &s.sqrt_alphas_cumprod,
            &s.sqrt_one_minus_alphas_cumprod,
            &s.sqrt_recip_alphas_cumprod,
            &s.sqrt_recipm1_alphas_cumprod,
            &s.posterior_mean_coef1,
            &s.posterior_mean_coef2,
            &s.posterior_log_variance_clipped,
            &s.log_betas,
        ];
        let rows: Vec<f64> = (0..s.len()).flat_map(|step| columns.map(|column| column[step])).collect();
        let table = b.constant(DType::F32, [s.len(), columns.len()], rows);
        let row = table.gather(t.cast(DType::I64)).reshape([n, columns.len(), 1, 1]); // (N, 8, 1, 1)
        let [
            sqrt_alpha_bar,
            sqrt_one_minus_alpha_bar,
            sqrt_recip_alpha_bar,
            sqrt_recipm1_alpha_bar,
            mean_x0,
            mean_xt,
            min_log_variance,
            max_log_variance,
        ] = row.chunk(1); // 8 × (N, 1, 1, 1)
        Ok(Self {
            sqrt_alpha_bar,
            sqrt_one_minus_alpha_bar,
            sqrt_recip_alpha_bar,
            sqrt_recipm1_alpha_bar,
            mean_x0,
            mean_xt,
            min_log_variance,
            max_log_variance,
            is_first: t.less(b.scalar(0.5)), // (N)
        })
    }

    /// `x_t = √ᾱ x0 + √(1−ᾱ) ε`.
    pub(crate) fn diffuse(&self, x0: Value<'g>, noise: Value<'g>) -> Value<'g> {
        self.sqrt_alpha_bar * x0 + self.sqrt_one_minus_alpha_bar * noise // (N, C, H, W)
    }

    /// DDPM's loss terms for the model's answer `out` (N, C or 2C, H, W).
    ///
    /// ε is held fixed in the bound, so that the bound trains the variance only.
    ///
    /// # Source
    /// Nichol & Dhariwal, *Improved DDPM*, equations 15–16, as the DiT reference uses them.
    pub(crate) fn loss(&self, out: Value<'g>, x0: Value<'g>, xt: Value<'g>, noise: Value<'g>) -> Terms<'g> {
        let c = x0.dim(1);
        let eps = out.slice(1, 0, c); // (N, C, H, W)
        let mse = mean_flat((noise - eps).square()); // (N)
        let vb = (out.dim(1) == 2 * c).then(|| {
            self.bound(eps.stop_gradient(), out.slice(1, c, 2 * c), x0, xt) // (N)
        });
        Terms { mse, vb }
    }

    /// The variational bound's term at t, in bits per dimension.
    fn bound(&self, eps: Value<'g>, logits: Value<'g>, x0: Value<'g>, xt: Value<'g>) -> Value<'g> {
        let frac = (logits + 1.0) * 0.5; // (N, C, H, W)
        let log_var = frac * self.max_log_variance + (1.0 - frac) * self.min_log_variance;
        let x0_hat = self.sqrt_recip_alpha_bar * xt - self.sqrt_recipm1_alpha_bar * eps;
        let mean = self.mean_x0 * x0_hat + self.mean_xt * xt;
        let true_mean = self.mean_x0 * x0 + self.mean_xt * xt;
        let true_log_var = self.min_log_variance; // (N, 1, 1, 1)

        let kl = 0.5
            * (log_var - true_log_var - 1.0
                + (true_log_var - log_var).exp()
                + (true_mean - mean).square() * (-log_var).exp());
        let nll = -discretised_gaussian(x0, mean, log_var * 0.5);
        self.is_first.select(mean_flat(nll), mean_flat(kl)) * (1.0 / std::f64::consts::LN_2) // (N)
    }
}

/// Log-likelihood of a Gaussian integrated over bins of width 2/255; the normal distribution function by tanh.
fn discretised_gaussian<'g>(x: Value<'g>, mean: Value<'g>, log_scale: Value<'g>) -> Value<'g> {
    let b = x.builder();
    let cdf = |z: Value<'g>| {
        let inner = (z + z.square() * z * 0.044_715) * (2.0 / std::f64::consts::PI).sqrt();
        (rounded_tanh(inner) + 1.0) * 0.5
    };
    let log = |p: Value<'g>| p.maximum(b.scalar(1e-12)).log();
    let (centred, inverse) = (x - mean, (-log_scale).exp());
    let upper = cdf(inverse * (centred + 1.0 / 255.0));
    let lower = cdf(inverse * (centred - 1.0 / 255.0));
    let inside = b.scalar(0.999).less(x).select(log(1.0 - lower), log(upper - lower));
    x.less(b.scalar(-0.999)).select(log(upper), inside) // (N, C, H, W)
}

/// tanh to the last bit of f32 in absolute terms, with tanh's own gradient.
///
/// The bin's mass is a difference of two numbers next to 1, so far from the mean the published loss consists of
/// f32 rounding; the five units in the last place that a fast tanh is off would change it.
fn rounded_tanh(x: Value<'_>) -> Value<'_> {
    let b = x.builder();
    let fixed = x.stop_gradient();
    let decay = (fixed.maximum(-fixed) * -2.0).exp(); // e^(−2|x|)
    let size = 1.0 - (2.0 * decay) / (1.0 + decay);
    let value = fixed.less(b.scalar(0.0)).select(-size, size);
    value + (1.0 - value.square()) * (x - fixed)
}

/// Flow matching's loss: `mean (v̂ − (noise − x0))²` with `x_s = (1−s) x0 + s·noise`, s = t/1000.
///
/// # Source
/// Esser et al., *Scaling Rectified Flow Transformers*, equation 13 without weighting.
pub(crate) fn flow_loss<'g>(out: Value<'g>, x0: Value<'g>, noise: Value<'g>) -> Terms<'g> {
    let velocity = out.slice(1, 0, x0.dim(1)); // (N, C, H, W)
    Terms { mse: mean_flat((velocity - (noise - x0)).square()), vb: None }
}

/// `x_s = (1−s) x0 + s·noise` with s = t/1000 and `t` (N).
pub(crate) fn flow_interpolate<'g>(x0: Value<'g>, noise: Value<'g>, t: Value<'g>) -> Value<'g> {
    let s = (t * (1.0 / TRAINING_STEPS as f64)).reshape([t.dim(0), 1, 1, 1]);
    x0 + s * (noise - x0) // (N, C, H, W)
}
