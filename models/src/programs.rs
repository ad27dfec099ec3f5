//! The six programs of a model: the contract between the compiler and everything that runs its output.

use std::fmt;
use std::str::FromStr;

use graph_builder::{Builder, DType, Graph, Precision, Type, Value};
use serde::{Deserialize, Serialize};

use crate::config::{DitConfig, Objective};
use crate::dit::{BLOCKS, dit, dit_with_and_without_label};
use crate::error::ModelError;
use crate::nearest::hint;
use crate::objective::{DdpmAt, Terms, flow_interpolate, flow_loss};
use crate::solver::{COEFFICIENTS, coefficient};

/// Which program to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProgramKind {
    /// The model's answer.
    Denoise,
    /// The guided answer.
    DenoiseCfg,
    /// One solver step.
    Step,
    /// One solver step of a batch of rows, in which a guided sample has two and any other one.
    StepRows,
    /// The training loss.
    Loss,
    /// The training loss and all gradients.
    TrainStep,
}

impl ProgramKind {
    /// All programs.
    pub const ALL: [Self; 6] =
        [Self::Denoise, Self::DenoiseCfg, Self::Step, Self::StepRows, Self::Loss, Self::TrainStep];

    /// The name users write; also the program's file name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Denoise => "denoise",
            Self::DenoiseCfg => "denoise-cfg",
            Self::Step => "step",
            Self::StepRows => "step-rows",
            Self::Loss => "loss",
            Self::TrainStep => "train-step",
        }
    }

    /// Whether parameters are graph inputs (training) rather than initializers (sampling).
    pub const fn feeds_parameters(self) -> bool {
        matches!(self, Self::Loss | Self::TrainStep)
    }
}

impl fmt::Display for ProgramKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ProgramKind {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| ModelError::UnknownProgram {
            name: name.to_owned(),
            hint: hint(name, &Self::ALL.map(Self::name)),
        })
    }
}

/// Which channels classifier-free guidance changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guidance {
    /// No guidance: the conditional answer, one row a sample.
    Off,
    /// The first `n` channels; the others stay conditional. The DiT reference guides 3.
    First(usize),
    /// All of ε or the velocity.
    All,
}

/// What a training step computes again for its backward pass instead of keeping it. The results are the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// The values inside each block: only the block's input is kept, and a step does one more forward pass.
    Blocks,
}

impl Recompute {
    /// The optimised graph of a training step, rewritten.
    ///
    /// # Errors
    /// [`ModelError::Graph`] when the rewritten graph breaks an invariant.
    pub fn apply(self, optimised: Graph) -> Result<Graph, ModelError> {
        match self {
            Self::None => Ok(optimised),
            Self::Blocks => Ok(optimised.recomputed(BLOCKS)?),
        }
    }
}

/// Scalars that stay inputs of the training programs, with the value that leaves the published loss as it is.
pub const HYPERPARAMETERS: [(&str, f32); 2] = [("hp.output_multiplier", 1.0), ("hp.vb_weight", 1.0)];

/// Factor on the loss whose gradients a training step in f16 gives: an input, scalar f32. The losses that it reports
/// are without it. Small cotangents would be zero in f16 without a large factor; the update divides by it.
pub const LOSS_SCALE: &str = "hp.loss_scale";

/// Whether the program takes [`LOSS_SCALE`].
pub fn has_loss_scale(kind: ProgramKind, precision: Precision) -> bool {
    kind == ProgramKind::TrainStep && precision == Precision::F16
}

/// Builds `kind` for a batch of `n` samples, in f32.
///
/// # Errors
/// [`ModelError::Graph`] when the graph cannot be built, [`ModelError::BadValue`] for a batch of zero or guidance
/// that the model cannot give.
pub fn program(
    cfg: &DitConfig,
    kind: ProgramKind,
    n: usize,
    guidance: Guidance,
) -> Result<Graph, ModelError> {
    program_for(cfg, kind, n, guidance, Precision::F32)
}

/// The optimised program in a precision: [`program_for`], the passes, `recompute`, and the conversions last.
///
/// # Errors
/// As [`program`].
pub fn optimised_program(
    cfg: &DitConfig,
    kind: ProgramKind,
    n: usize,
    guidance: Guidance,
    recompute: Recompute,
    precision: Precision,
) -> Result<Graph, ModelError> {
    let optimised = program_for(cfg, kind, n, guidance, precision)?.optimised()?;
    Ok(recompute.apply(optimised)?.in_precision(precision)?)
}

/// Builds `kind` as it is brought to a precision later: f32 throughout, with [`LOSS_SCALE`] where the precision needs
/// one. [`Graph::in_precision`] makes the conversions, after all other passes.
///
/// # Errors
/// As [`program`].
pub fn program_for(
    cfg: &DitConfig,
    kind: ProgramKind,
    n: usize,
    guidance: Guidance,
    precision: Precision,
) -> Result<Graph, ModelError> {
    cfg.validate()?;
    if n == 0 {
        return Err(ModelError::BadValue { key: "batch", expected: "1 or more".into(), got: "0".into() });
    }
    let b = Builder::new(kind.name());
    match kind {
        ProgramKind::Denoise => {
            let out = Sampling::inputs(&b, cfg, n).denoise(cfg);
            b.output("out", out);
        }
        ProgramKind::DenoiseCfg => {
            let guidance = if guidance == Guidance::Off { Guidance::First(3) } else { guidance };
            let out = Sampling::inputs(&b, cfg, n).guided(cfg, guidance)?;
            b.output("out", out);
        }
        ProgramKind::Step => {
            let sampling = Sampling::inputs(&b, cfg, n);
            step(&sampling, cfg, sampling.guided(cfg, guidance)?);
        }
        ProgramKind::StepRows => {
            let sampling = Sampling::inputs(&b, cfg, n);
            step(&sampling, cfg, sampling.paired(cfg, guidance));
        }
        ProgramKind::Loss => {
            let _ = loss(&b, cfg, n)?;
        }
        ProgramKind::TrainStep => train_step(&b, cfg, n, has_loss_scale(kind, precision))?,
    }
    Ok(b.finish()?)
}

fn image(cfg: &DitConfig, n: usize) -> Type {
    Type::f32([n, cfg.in_channels, cfg.input_size, cfg.input_size])
}

/// Inputs of the sampling programs.
struct Sampling<'g> {
    b: &'g Builder,
    x: Value<'g>,
    t: Value<'g>,
    y: Value<'g>,
}

impl<'g> Sampling<'g> {
    fn inputs(b: &'g Builder, cfg: &DitConfig, n: usize) -> Self {
        let x = b.input("x", image(cfg, n)); // (N, C, H, W)
        let t = b.input("t", Type::f32([n])); // (N)
        let y = b.input("y", Type::new(DType::I64, [n])); // (N)
        Self { b, x, t, y }
    }

    fn denoise(&self, cfg: &DitConfig) -> Value<'g> {
        dit(&self.b.root(), self.x, self.t, self.y, self.output_multiplier(cfg), cfg) // (N, Cout, H, W)
    }

    /// muP's α, a constant here.
    fn output_multiplier(&self, cfg: &DitConfig) -> Value<'g> {
        self.b.scalar(cfg.mup.map_or(1.0, |mup| mup.output_multiplier))
    }

    /// `u + g (c − u)` on the guided channels; both halves see the same `x`.
    fn guided(&self, cfg: &DitConfig, channels: Guidance) -> Result<Value<'g>, ModelError> {
        let guided = match channels {
            Guidance::Off => return Ok(self.denoise(cfg)),
            Guidance::First(n) => n.min(cfg.in_channels),
            Guidance::All => cfg.in_channels,
        };
        let null = cfg.null_class().ok_or_else(|| ModelError::BadValue {
            key: "class_dropout_prob",
            expected: "above 0 for guidance, which needs the null class".into(),
            got: "0".into(),
        })?;
        let n = self.x.dim(0);
        let guidance = self.b.input("guidance", Type::f32([n])).reshape([n, 1, 1, 1]);
        let labels = [self.y, self.b.constant(DType::I64, [1], vec![null as f64])]; // (N) and (1)
        let [cond, uncond] = dit_with_and_without_label(
            &self.b.root(),
            self.x,
            self.t,
            labels,
            self.output_multiplier(cfg),
            cfg,
        );
        Ok(mixed(cond, uncond, guidance, guided))
    }

    /// `u + g (c − u)` on the guided channels, where `u` is the answer of the row that `pair` names.
    ///
    /// A guided sample takes two rows with the same `x` and `t`, one with its class and one with the null class; a
    /// sample without guidance is its own pair, which leaves its answer as it is. So one batch holds both kinds and
    /// computes no row for nothing.
    fn paired(&self, cfg: &DitConfig, channels: Guidance) -> Value<'g> {
        let out = self.denoise(cfg); // (N, Cout, H, W)
        let guided = match channels {
            Guidance::Off => return out,
            Guidance::First(n) => n.min(cfg.in_channels),
            Guidance::All => cfg.in_channels,
        };
        let n = self.x.dim(0);
        let pair = self.b.input("pair", Type::new(DType::I64, [n]));
        let guidance = self.b.input("guidance", Type::f32([n])).reshape([n, 1, 1, 1]);
        mixed(out, out.gather(pair), guidance, guided)
    }
}

/// `u + g (c − u)` on the first channels of answers (N, Cout, H, W), `c` itself on the others.
///
/// A choice, not a join of two parts: ONNX Runtime's CUDA provider joins parts of unequal sizes by tables of the host,
/// which no CUDA graph may read.
fn mixed<'g>(c: Value<'g>, u: Value<'g>, guidance: Value<'g>, channels: usize) -> Value<'g> {
    let (mixed, all) = (u + guidance * (c - u), c.dim(1)); // (N, Cout, H, W)
    if channels == all {
        return mixed;
    }
    let guided: Vec<f64> = (0..all).map(|i| f64::from(u8::from(i < channels))).collect();
    c.builder().constant(DType::Bool, [1, all, 1, 1], guided).select(mixed, c)
}

/// One step of any solver from the model's answer `out` (N, Cout, H, W) and a row of coefficients a sample (see
/// [`crate::solver`]).
fn step<'g>(sampling: &Sampling<'g>, cfg: &DitConfig, out: Value<'g>) {
    let (b, n) = (sampling.b, sampling.x.dim(0));
    let coef = b.input("coef", Type::f32([n, COEFFICIENTS]));
    let noise = b.input("noise", image(cfg, n));
    let history = b.input("history", image(cfg, n));
    let c = |i: usize| coef.slice(1, i, i + 1).reshape([n, 1, 1, 1]);

    let (x, channels) = (sampling.x, cfg.in_channels);
    let e = out.slice(1, 0, channels); // (N, C, H, W)
    let mut scale = c(coefficient::NOISE);
    if cfg.learn_sigma && cfg.objective == Objective::Ddpm {
        let logits = out.slice(1, channels, 2 * channels); // (N, C, H, W)
        scale = scale * (c(coefficient::NOISE_LOGIT) * logits).exp();
    }
    let x0_hat = c(coefficient::X0_X) * x + c(coefficient::X0_OUT) * e;
    let x_next = c(coefficient::NEXT_X) * x
        + c(coefficient::NEXT_OUT) * e
        + c(coefficient::NEXT_HISTORY) * history
        + scale * noise;
    let history_next = c(coefficient::HISTORY_X) * x + c(coefficient::HISTORY_OUT) * e;
    b.output("x_next", x_next);
    b.output("x0_hat", x0_hat);
    b.output("history_next", history_next);
}

/// The loss; returns the scalar.
fn loss<'g>(b: &'g Builder, cfg: &DitConfig, n: usize) -> Result<Value<'g>, ModelError> {
    let x0 = b.input("x0", image(cfg, n)); // (N, C, H, W)
    let noise = b.input("noise", image(cfg, n)); // (N, C, H, W)
    let t = b.input("t", Type::f32([n])); // (N)
    let y = b.input("y", Type::new(DType::I64, [n])); // (N)
    let [alpha, vb_weight] = HYPERPARAMETERS.map(|(name, _)| b.input(name, Type::f32([])));
    let model = |x: Value<'g>| dit(&b.root(), x, t, y, alpha, cfg);
    let Terms { mse, vb } = match cfg.objective {
        Objective::Ddpm => {
            let at = DdpmAt::new(b, t)?;
            let xt = at.diffuse(x0, noise); // (N, C, H, W)
            at.loss(model(xt), x0, xt, noise)
        }
        Objective::Flow => flow_loss(model(flow_interpolate(x0, noise, t)), x0, noise),
    };
    let per_sample = vb.map_or(mse, |vb| mse + vb_weight * vb); // (N)
    let loss = per_sample.mean(&[0]).reshape([]);
    b.output("loss", loss);
    b.output("loss.mse", mse);
    if let Some(vb) = vb {
        b.output("loss.vb", vb);
    }
    Ok(loss)
}

fn train_step(b: &Builder, cfg: &DitConfig, n: usize, scaled: bool) -> Result<(), ModelError> {
    let mut loss = loss(b, cfg, n)?;
    if scaled {
        loss = loss * b.input(LOSS_SCALE, Type::f32([]));
    }
    let parameters = b.trainable();
    let values: Vec<Value<'_>> = parameters.iter().map(|(_, v)| *v).collect();
    for ((name, _), grad) in parameters.iter().zip(b.gradients(loss, &values)?) {
        b.output(&format!("grad.{name}"), grad);
    }
    Ok(())
}
