//! The six programs of a model: the contract between the compiler and everything that runs its output.

use std::fmt;
use std::str::FromStr;

use graph_builder::{Builder, DType, Graph, Precision, Type, Value};
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::error::ModelError;
use crate::model::Model;
use crate::nearest::hint;
use crate::network::Parameterised;
use crate::objective::{DdpmAt, Objective, Terms, flow_interpolate, flow_loss};
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

impl Guidance {
    /// The channels that are guided where nothing else is asked for: 3 for DDPM models as in the DiT reference, else all.
    pub const fn usual(objective: Objective) -> Self {
        match objective {
            Objective::Ddpm => Self::First(3),
            Objective::Flow => Self::All,
        }
    }
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

/// Scalars that stay inputs of the training programs, with the value that leaves the published loss as it is.
pub const HYPERPARAMETERS: [(&str, f32); 2] = [("hp.output_multiplier", 1.0), ("hp.vb_weight", 1.0)];

/// Factor on the loss whose gradients a training step in f16 gives: an input, scalar f32. The losses that it reports
/// are without it. Small cotangents would be zero in f16 without a large factor; the update divides by it.
pub const LOSS_SCALE: &str = "hp.loss_scale";

/// Whether the program takes [`LOSS_SCALE`].
pub fn has_loss_scale(kind: ProgramKind, precision: Precision) -> bool {
    kind == ProgramKind::TrainStep && precision == Precision::F16
}

impl Recompute {
    /// The optimised graph of a training step, rewritten; `stacks` are the scopes of its stacks of blocks.
    ///
    /// # Errors
    /// [`ModelError::Graph`] when the rewritten graph breaks an invariant.
    pub fn apply(self, optimised: Graph, stacks: &[&str]) -> Result<Graph, ModelError> {
        match self {
            Self::None => Ok(optimised),
            Self::Blocks => stacks.iter().try_fold(optimised, |graph, stack| Ok(graph.recomputed(stack)?)),
        }
    }
}

/// A program of a model: which one, and how it is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProgramSpec {
    /// Which program.
    pub kind: ProgramKind,
    /// Samples of one run.
    pub batch: usize,
    /// Channels that guidance changes, in sampling programs.
    pub guidance: Guidance,
    /// What a training step computes again.
    pub recompute: Recompute,
    /// What it computes in.
    pub precision: Precision,
}

impl ProgramSpec {
    /// Without guidance, in f32, everything kept.
    pub const fn new(kind: ProgramKind, batch: usize) -> Self {
        let (guidance, recompute, precision) = (Guidance::Off, Recompute::None, Precision::F32);
        Self { kind, batch, guidance, recompute, precision }
    }

    /// With guidance.
    #[must_use]
    pub const fn guided(self, guidance: Guidance) -> Self {
        Self { guidance, ..self }
    }

    /// Computing again.
    #[must_use]
    pub const fn recomputing(self, recompute: Recompute) -> Self {
        Self { recompute, ..self }
    }

    /// In a precision.
    #[must_use]
    pub const fn in_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }
}

impl Model {
    /// Builds a program as its author wrote it: f32 throughout, with [`LOSS_SCALE`] where the precision needs one.
    /// [`Model::compiled`] makes what runs.
    ///
    /// # Errors
    /// [`ModelError::Graph`] when the graph cannot be built, [`ModelError::BadValue`] for a model that is none, a batch of
    /// zero and guidance that the model cannot give.
    pub fn program(&self, spec: &ProgramSpec) -> Result<Graph, ModelError> {
        self.validate()?;
        let (kind, n) = (spec.kind, spec.batch);
        if n == 0 {
            return Err(ModelError::BadValue { key: "batch", expected: "1 or more".into(), got: "0".into() });
        }
        let b = Builder::new(kind.name());
        match kind {
            ProgramKind::Denoise => {
                let out = Sampling::inputs(&b, self, n).denoise();
                b.output("out", out);
            }
            ProgramKind::DenoiseCfg => {
                let guidance = if spec.guidance == Guidance::Off {
                    Guidance::usual(self.objective)
                } else {
                    spec.guidance
                };
                let out = Sampling::inputs(&b, self, n).guided(guidance)?;
                b.output("out", out);
            }
            ProgramKind::Step => {
                let sampling = Sampling::inputs(&b, self, n);
                sampling.step(sampling.guided(spec.guidance)?);
            }
            ProgramKind::StepRows => {
                let sampling = Sampling::inputs(&b, self, n);
                sampling.step(sampling.paired(spec.guidance));
            }
            ProgramKind::Loss => {
                let _ = loss(&b, self, n)?;
            }
            ProgramKind::TrainStep => train_step(&b, self, n, has_loss_scale(kind, spec.precision))?,
        }
        Ok(b.finish()?)
    }

    /// The program as it runs: [`Model::program`], all passes, what is computed again, and the conversions of its precision
    /// last.
    ///
    /// # Errors
    /// As [`Model::program`].
    pub fn compiled(&self, spec: &ProgramSpec) -> Result<Graph, ModelError> {
        let graph = spec.recompute.apply(self.program(spec)?.optimised()?, self.network.stacks())?;
        Ok(graph.in_precision(spec.precision)?)
    }

    /// Type of a batch of what is denoised.
    fn image(&self, n: usize) -> Type {
        Type::f32(self.latent().batch(n))
    }

    fn denoised<'g>(
        &self,
        b: &'g Builder,
        (x, t): (Value<'g>, Value<'g>),
        condition: &Condition<'g>,
        output_multiplier: Value<'g>,
    ) -> Value<'g> {
        let (init, width_multiplier) = (self.init, self.width_multiplier());
        let parameterised = Parameterised { init, width_multiplier, output_multiplier };
        self.network.forward(&b.root(), x, t, condition, parameterised) // (N, Cout, H, W)
    }
}

/// Inputs of the sampling programs.
struct Sampling<'g, 'm> {
    b: &'g Builder,
    model: &'m Model,
    x: Value<'g>,
    t: Value<'g>,
    condition: Condition<'g>,
}

impl<'g, 'm> Sampling<'g, 'm> {
    fn inputs(b: &'g Builder, model: &'m Model, n: usize) -> Self {
        let x = b.input("x", model.image(n)); // (N, C, H, W)
        let t = b.input("t", Type::f32([n])); // (N)
        let condition = model.conditioning().declare(b, n);
        Self { b, model, x, t, condition }
    }

    fn denoise(&self) -> Value<'g> {
        self.denoised(self.x, self.t, &self.condition) // (N, Cout, H, W)
    }

    /// muP's α is a constant here.
    fn denoised(&self, x: Value<'g>, t: Value<'g>, condition: &Condition<'g>) -> Value<'g> {
        let alpha = self.b.scalar(self.model.mup.map_or(1.0, |mup| mup.output_multiplier));
        self.model.denoised(self.b, (x, t), condition, alpha)
    }

    /// Channels that guidance changes; `None` without guidance.
    fn channels(&self, guidance: Guidance) -> Option<usize> {
        let all = self.model.latent().channels;
        match guidance {
            Guidance::Off => None,
            Guidance::First(n) => Some(n.min(all)),
            Guidance::All => Some(all),
        }
    }

    /// `u + g (c − u)` on the guided channels, from one run of 2N samples: with the condition, and with the null condition.
    fn guided(&self, guidance: Guidance) -> Result<Value<'g>, ModelError> {
        let Some(channels) = self.channels(guidance) else { return Ok(self.denoise()) };
        let n = self.x.dim(0);
        let conditioning = self.model.conditioning();
        let null = conditioning.null(&self.condition).ok_or_else(|| conditioning.no_null())?;
        let guidance = self.b.input("guidance", Type::f32([n])).reshape([n, 1, 1, 1]);
        let twice = |v: Value<'g>| v.concat(&[v], 0);
        let out = self.denoised(twice(self.x), twice(self.t), &self.condition.concat(null)); // (2N, Cout, H, W)
        let [cond, uncond] = out.chunk(0); // 2 × (N, Cout, H, W)
        Ok(mixed(cond, uncond, guidance, channels))
    }

    /// `u + g (c − u)` on the guided channels, where `u` is the answer of the row that `pair` names.
    ///
    /// A guided sample takes two rows with the same `x` and `t`, one with its condition and one with the null condition; a
    /// sample without guidance is its own pair, which leaves its answer as it is. So one batch holds both kinds and
    /// computes no row for nothing.
    fn paired(&self, guidance: Guidance) -> Value<'g> {
        let out = self.denoise(); // (N, Cout, H, W)
        let Some(channels) = self.channels(guidance) else { return out };
        let n = self.x.dim(0);
        let pair = self.b.input("pair", Type::new(DType::I64, [n]));
        let guidance = self.b.input("guidance", Type::f32([n])).reshape([n, 1, 1, 1]);
        mixed(out, out.gather(pair), guidance, channels)
    }

    /// One step of any solver from the model's answer `out` (N, Cout, H, W) and a row of coefficients a sample (see
    /// [`crate::solver`]).
    fn step(&self, out: Value<'g>) {
        let (b, x, n) = (self.b, self.x, self.x.dim(0));
        let coef = b.input("coef", Type::f32([n, COEFFICIENTS]));
        let noise = b.input("noise", self.model.image(n));
        let history = b.input("history", self.model.image(n));
        let c = |i: usize| coef.slice(1, i, i + 1).reshape([n, 1, 1, 1]);

        let channels = self.model.latent().channels;
        let e = out.slice(1, 0, channels); // (N, C, H, W)
        let mut scale = c(coefficient::NOISE);
        if self.model.learns_variance() && self.model.objective == Objective::Ddpm {
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

/// The loss; returns the scalar.
fn loss<'g>(b: &'g Builder, model: &Model, n: usize) -> Result<Value<'g>, ModelError> {
    let x0 = b.input("x0", model.image(n)); // (N, C, H, W)
    let noise = b.input("noise", model.image(n)); // (N, C, H, W)
    let t = b.input("t", Type::f32([n])); // (N)
    let condition = model.conditioning().declare(b, n);
    let [alpha, vb_weight] = HYPERPARAMETERS.map(|(name, _)| b.input(name, Type::f32([])));
    let denoised = |x: Value<'g>| model.denoised(b, (x, t), &condition, alpha);
    let Terms { mse, vb } = match model.objective {
        Objective::Ddpm => {
            let at = DdpmAt::new(b, t)?;
            let xt = at.diffuse(x0, noise); // (N, C, H, W)
            at.loss(denoised(xt), x0, xt, noise)
        }
        Objective::Flow => flow_loss(denoised(flow_interpolate(x0, noise, t)), x0, noise),
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

fn train_step(b: &Builder, model: &Model, n: usize, scaled: bool) -> Result<(), ModelError> {
    let mut loss = loss(b, model, n)?;
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
