//! `mudit replay`: AdamW steps on given batches, for parity with any trainer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use graph_builder::Shape;
use indexmap::IndexMap;
use models::Model;
use runtime::file::check_writable;
use runtime::{HostTensor, Recording, SessionOptions, read_safetensors_file};
use serde_json::json;
use train_engine::config::{Schedule, TrainConfig, TrainSection};
use train_engine::step::{StepInputs, read_lock};
use train_engine::trainer::Trainer;

use super::weights::Which;
use super::weights_file::WeightsFile;
use super::{Machine, Target, weights};
use crate::console;
use crate::execution::Execution;

/// Arguments of `mudit replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// A preset, a config.json, a checkpoint or run directory, or an engine.
    #[arg(long)]
    model: String,
    /// Parameters at the start (safetensors).
    #[arg(long)]
    weights: PathBuf,
    /// Batches (safetensors): `step<k>.x0`, `.noise` (N,C,H,W), `.t` (N), `.y` (N) for each step k.
    #[arg(long)]
    batches: PathBuf,
    /// Learning rate, at the base width under muP.
    #[arg(long, default_value_t = 1e-4)]
    lr: f64,
    /// Decay of the first moment.
    #[arg(long, default_value_t = 0.9)]
    beta1: f64,
    /// Decay of the second moment.
    #[arg(long, default_value_t = 0.999)]
    beta2: f64,
    /// Added to the root of the second moment.
    #[arg(long, default_value_t = 1e-8)]
    eps: f64,
    /// Decoupled weight decay.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Largest norm of all gradients together; 0 is no limit.
    #[arg(long, default_value_t = 0.0)]
    clip: f64,
    /// Decay of the moving average.
    #[arg(long, default_value_t = 0.9999)]
    ema_decay: f64,
    /// Write the parameters after the last step here.
    #[arg(long)]
    out: PathBuf,
    /// Write the moving average after the last step here.
    #[arg(long)]
    ema_out: Option<PathBuf>,
    /// Write the gradients of the last step here.
    #[arg(long)]
    grads_out: Option<PathBuf>,
    /// Run `mudit` ops by their function bodies instead of the native kernels.
    #[arg(long)]
    no_native_kernels: bool,
    /// Print losses and gradient norms as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    machine: Machine,
}

/// One batch of the file.
struct GivenBatch {
    x0: Vec<f32>,
    noise: Vec<f32>,
    t: Vec<f32>,
    y: Vec<i64>,
}

impl ReplayArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let execution = self.target.training(self.machine)?;
        let model = weights::model(&self.model)?;
        let file = WeightsFile::open(&model, &self.weights, Which::Model)?;
        let start = weights::read(&model, file.path())?;
        let batches = self.batches(&model)?;
        [&self.out].into_iter().chain(&self.ema_out).chain(&self.grads_out).try_for_each(check_writable)?;
        let runtime = self.machine.runtime_for(&execution.provider)?;
        let options =
            SessionOptions { native_kernels: !self.no_native_kernels, ..execution.session_options() };
        let config = self.config(batches[0].1.y.len(), &model, execution);
        let mut trainer = Trainer::from_parameters(&runtime, &config, &model, &start, &options)?;
        drop(start);
        if let Recording::Refused(reason) = trainer.compiled().recording() {
            console::note(&format!("the training step is not recorded as a CUDA graph: {reason}"));
        }
        let mut rows = Vec::new();
        for (k, (name, batch)) in (0..).zip(&batches) {
            let inputs = StepInputs { x0: &batch.x0, noise: &batch.noise, t: &batch.t, y: &batch.y };
            let (loss, report) = trainer.step_given(k, &inputs).with_context(|| format!("step `{name}`"))?;
            ensure!(report.finite, "step `{name}`: a gradient is not finite; nothing was written");
            rows.push(json!({
                "step": name, "loss": loss.loss, "mse": loss.mse, "vb": loss.vb, "grad_norm": report.grad_norm,
            }));
            if !self.json {
                console::out(&format!("{name}  loss {:.7}  grad norm {:.6}", loss.loss, report.grad_norm))?;
            }
        }
        let meta = BTreeMap::new();
        trainer.parameters()?.write_safetensors(&self.out, &meta)?;
        if let Some(path) = &self.ema_out {
            read_lock(&trainer.average()?)?.write_safetensors(path, &meta)?;
        }
        if let Some(path) = &self.grads_out {
            trainer.gradients()?.write_safetensors(path, &meta)?;
        }
        if self.json { console::json(&json!({ "steps": rows, "out": self.out })) } else { Ok(()) }
    }

    /// The configuration of a training that takes these steps.
    fn config(&self, batch_size: usize, model: &Model, execution: Execution) -> TrainConfig {
        let mut config = TrainConfig::default();
        config.objective.kind = model.objective;
        let Execution { provider, precision, threads } = execution;
        config.train = TrainSection {
            batch_size,
            learning_rate: self.lr,
            warmup_steps: 0,
            schedule: Schedule::Constant,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
            clip: self.clip,
            ema_decay: self.ema_decay,
            ema_warmup: false,
            provider,
            precision,
            threads,
            ..config.train
        };
        config
    }

    fn batches(&self, model: &Model) -> anyhow::Result<Vec<(String, GivenBatch)>> {
        let tensors = read_safetensors_file(&self.batches)?;
        let steps: BTreeSet<u64> = tensors
            .keys()
            .filter_map(|name| name.strip_prefix("step")?.split_once('.')?.0.parse().ok())
            .collect();
        let file = self.batches.display();
        ensure!(!steps.is_empty(), "`{file}` holds no batch: expected tensors such as `step0.x0`");
        let batch = |k: &u64| Ok((format!("step{k}"), given(&tensors, *k, model)?));
        let all: Vec<(String, GivenBatch)> =
            steps.iter().map(batch).collect::<anyhow::Result<_>>().with_context(|| format!("`{file}`"))?;
        let n = all[0].1.y.len();
        if let Some((name, other)) = all.iter().find(|(_, b)| b.y.len() != n) {
            anyhow::bail!("`{file}`: {name} has {} samples, the first step {n}", other.y.len());
        }
        Ok(all)
    }
}

fn given(tensors: &IndexMap<String, HostTensor>, k: u64, model: &Model) -> anyhow::Result<GivenBatch> {
    let find = |what: &str| {
        let name = format!("step{k}.{what}");
        tensors.get(&name).with_context(|| format!("tensor `{name}` is missing"))
    };
    let (x0, noise, t, y) = (find("x0")?, find("noise")?, find("t")?, find("y")?);
    let n = y.shape().numel();
    let image = model.latent().batch(n);
    for (what, tensor, expected) in
        [("x0", x0, &image[..]), ("noise", noise, &image[..]), ("t", t, &[n][..]), ("y", y, &[n][..])]
    {
        let got = tensor.shape();
        let expected = Shape::from(expected);
        ensure!(*got == expected, "tensor `step{k}.{what}`: expected shape {expected}, got {got}");
    }
    let y = y.to_i64().with_context(|| format!("tensor `step{k}.y` must hold integers"))?;
    let rows = model.conditioning().classes().map_or(0, models::Classes::rows) as i64;
    ensure!(
        y.iter().all(|y| (0..rows).contains(y)),
        "tensor `step{k}.y` holds a label outside 0..{rows} (the last is the null class)"
    );
    Ok(GivenBatch { x0: x0.to_f32(), noise: noise.to_f32(), t: t.to_f32(), y })
}
