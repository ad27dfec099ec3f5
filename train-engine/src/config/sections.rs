//! The sections of a run's configuration, their keys, units and defaults.

use std::path::PathBuf;

use graph_builder::Precision;
use models::{InitScheme, Objective, Recompute, Solver, SolverKind};
use runtime::Provider;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::by_name;
use crate::mup::{Conventions, DecayRule, EpsRule};

/// `[model]`: a preset, a file, or the official constructor's keys; keys beside a preset or a file override it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelSection {
    /// Name of a published model, such as `DiT-S/2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// A `config.json` with the official constructor's names, relative to the working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// Model family; `dit` where none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Side of the input, in pixels or latent cells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_size: Option<usize>,
    /// Side of a patch, in the same unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<usize>,
    /// Channels of the input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_channels: Option<usize>,
    /// Width of the residual stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_size: Option<usize>,
    /// Number of blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Attention heads of a block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_heads: Option<usize>,
    /// Width of the MLP over the width of the residual stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mlp_ratio: Option<f64>,
    /// Probability that a training label becomes the null class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_dropout_prob: Option<f64>,
    /// Number of classes, without the null class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_classes: Option<usize>,
    /// Whether the model also predicts its variance (twice the output channels).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learn_sigma: Option<bool>,
}

impl ModelSection {
    /// The constructor's keys that are set, under their official names: everything but `preset` and `config`.
    pub fn constructor_keys(&self) -> Map<String, Value> {
        let Ok(Value::Object(mut keys)) = serde_json::to_value(self) else { return Map::new() };
        keys.shift_remove("preset");
        keys.shift_remove("config");
        keys
    }
}

/// How flow matching draws its times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeSampling {
    /// `sigmoid(mean + std·z)`, z standard normal.
    #[default]
    LogitNormal,
    /// Uniform in [0, 1).
    Uniform,
}

/// `[objective]`: what is minimised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ObjectiveSection {
    /// `ddpm` or `flow`.
    #[serde(with = "by_name")]
    pub kind: Objective,
    /// Flow only: `logit-normal` or `uniform`.
    pub time: TimeSampling,
    /// Flow with `logit-normal`: mean of the logit.
    pub time_mean: f64,
    /// Flow with `logit-normal`: standard deviation of the logit.
    pub time_std: f64,
    /// DDPM with `learn_sigma`: weight of the variational bound.
    pub vb_weight: f64,
}

impl Default for ObjectiveSection {
    fn default() -> Self {
        Self {
            kind: Objective::default(),
            time: TimeSampling::default(),
            time_mean: 0.0,
            time_std: 1.0,
            vb_weight: 1.0,
        }
    }
}

/// `[mup]`: width transfer of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MupSection {
    /// Whether learning rates follow the parameters' roles; otherwise one rate serves all.
    pub enabled: bool,
    /// `hidden_size` at which `train.learning_rate` holds unscaled.
    pub base_width: usize,
    /// Multiplier of the model's output.
    pub output_multiplier: f64,
    /// `mup` (the muP experiments') or `dit` (the original).
    #[serde(with = "by_name")]
    pub init: InitScheme,
    /// Factor σ on the random first values of all parameters.
    pub init_scale: f64,
    /// `scaled` (hidden weights' decay · m, so that rate · decay stays; the published package's) or `constant`.
    pub weight_decay: DecayRule,
    /// `constant` (the published package's) or `scaled` (epsilon / m where gradients fall as 1 / m).
    pub eps: EpsRule,
}

impl MupSection {
    /// The choices on which implementations differ.
    pub fn conventions(&self) -> Conventions {
        Conventions { weight_decay: self.weight_decay, eps: self.eps }
    }
}

impl Default for MupSection {
    fn default() -> Self {
        Self {
            enabled: true,
            base_width: 96,
            output_multiplier: 1.0,
            init: InitScheme::Mup,
            init_scale: 1.0,
            weight_decay: DecayRule::default(),
            eps: EpsRule::default(),
        }
    }
}

/// What the images come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataKind {
    /// The 60,000 training images of Fashion-MNIST, found or fetched.
    #[default]
    FashionMnist,
    /// A pair of idx files, plain or gzipped.
    Idx,
    /// A directory with one sub-directory of PNG or JPEG files a class.
    Folder,
    /// A `.safetensors` file with `latents` and `labels`.
    Latents,
}

/// What is done about the orientation that cameras note in EXIF data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Orient {
    /// Images are read as they are stored, as the reference's loader does.
    #[default]
    Off,
    /// Images are turned as viewers show them.
    Apply,
}

impl Orient {
    /// Unset keys are not written, so that configurations keep their bytes.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde calls")]
    fn is_off(&self) -> bool {
        *self == Self::Off
    }
}

/// `[data]`: the images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSection {
    /// `fashion-mnist`, `idx`, `folder` or `latents`.
    pub kind: DataKind,
    /// The file or directory; may be left out for `fashion-mnist`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// `idx` only: the labels' file where `path` is the images' file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<PathBuf>,
    /// Side of the image in pixels: `folder` crops to it, the other kinds must already have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// `folder` only: `off` or `apply`, for images whose EXIF data say how to turn them.
    #[serde(skip_serializing_if = "Orient::is_off")]
    pub orient: Orient,
    /// Whether each image is mirrored with probability one half.
    pub flip: bool,
    /// Batches read ahead of the training step.
    pub prefetch: usize,
    /// Threads that decode images.
    pub workers: usize,
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            kind: DataKind::default(),
            path: None,
            labels: None,
            image_size: None,
            orient: Orient::default(),
            flip: true,
            prefetch: 2,
            workers: 1,
        }
    }
}

/// What the learning rate does after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays.
    #[default]
    Constant,
    /// Falls in a straight line to `final_fraction`.
    Linear,
    /// Falls along half a cosine to `final_fraction`.
    Cosine,
}

/// `[train]`: the optimizer and the length of the run. Defaults are the DiT paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainSection {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// What a new run takes its first parameters from: a checkpoint's directory, a run's, or a `.safetensors` file. The
    /// moving average where there is one; the optimizer starts anew. A run that goes on does not read it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// Images of one optimizer step.
    pub batch_size: usize,
    /// Micro-batches an optimizer step is split into; divides `batch_size`.
    pub accumulate: usize,
    /// `none` or `blocks`: what is computed again for the backward pass rather than kept. The results are the same
    /// bits; `blocks` needs less memory and about a third more time.
    pub recompute: Recompute,
    /// `f32`, `bf16` or `f16`: what the training step computes in. Masters, moments and averages are f32.
    pub precision: Precision,
    /// `cpu`, `cuda` or `tensorrt`: who runs the training step; `cuda:1` is the GPU of that number.
    #[serde(with = "by_name")]
    pub provider: Provider,
    /// Seed of every draw.
    pub seed: u64,
    /// Compute threads; 0 takes all cores.
    pub threads: usize,
    /// AdamW's learning rate (at `mup.base_width` where muP is on).
    pub learning_rate: f64,
    /// `constant`, `linear` or `cosine`.
    pub schedule: Schedule,
    /// The step at which a decaying learning rate has reached its end, where it stays; `steps` where none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// Learning rate at the end over the one after the warm-up.
    pub final_fraction: f64,
    /// Steps over which the learning rate rises from 0; under muP the same number at every width.
    pub warmup_steps: u64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub eps: f64,
    /// Largest global L2 norm of the gradient; 0 is off. Under muP the same at every width.
    pub clip: f64,
    /// Decay of the parameters' moving average, per step.
    pub ema_decay: f64,
    /// Whether early decays are held to `(1 + k) / (10 + k)` at step k.
    pub ema_warmup: bool,
    /// Probability that a label becomes the null class; the model's `class_dropout_prob` where none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_drop: Option<f64>,
}

impl TrainSection {
    /// The step at which a decaying learning rate has reached its end; none where it stays.
    pub fn decay_end(&self) -> Option<u64> {
        (self.schedule != Schedule::Constant).then(|| self.decay_steps.unwrap_or(self.steps))
    }
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            steps: 400_000,
            from: None,
            batch_size: 256,
            accumulate: 1,
            recompute: Recompute::None,
            precision: Precision::F32,
            provider: Provider::default(),
            seed: 0,
            threads: 0,
            learning_rate: 1e-4,
            schedule: Schedule::default(),
            decay_steps: None,
            final_fraction: 0.0,
            warmup_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            clip: 0.0,
            ema_decay: 0.9999,
            ema_warmup: false,
            label_drop: None,
        }
    }
}

/// `[checkpoint]`: when the run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckpointSection {
    /// Steps between checkpoints; 0 saves at the end only.
    pub every_steps: u64,
    /// Seconds between checkpoints, beside `every_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_seconds: Option<u64>,
    /// Newest checkpoints that are kept.
    pub keep: usize,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { every_steps: 5_000, every_seconds: None, keep: 3 }
    }
}

/// `[log]`: what is written while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogSection {
    /// Steps between rows of `metrics.jsonl`.
    pub every_steps: u64,
    /// Whether TensorBoard event files are written too.
    pub tensorboard: bool,
}

impl Default for LogSection {
    fn default() -> Self {
        Self { every_steps: 50, tensorboard: true }
    }
}

/// `[sample]`: grids of pictures drawn while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SampleSection {
    /// Training steps between grids; 0 draws none.
    pub every_steps: u64,
    /// Pictures of each class.
    pub per_class: usize,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale; 1 is off.
    pub guidance: f64,
    /// A solver's name; `ddim` for DDPM models and `euler` for flow models where none is given.
    #[serde(with = "by_name::optional", skip_serializing_if = "Option::is_none")]
    pub sampler: Option<SolverKind>,
}

impl Default for SampleSection {
    fn default() -> Self {
        Self { every_steps: 0, per_class: 4, steps: 50, guidance: 1.5, sampler: None }
    }
}

impl SampleSection {
    /// The solver that pictures of models of an objective are made with.
    pub fn solver(&self, objective: Objective) -> Solver {
        let kind = self.sampler.unwrap_or(match objective {
            Objective::Ddpm => SolverKind::Ddim,
            Objective::Flow => SolverKind::Euler,
        });
        Solver::new(kind, self.steps)
    }
}
