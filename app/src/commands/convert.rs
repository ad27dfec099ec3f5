//! `mudit convert`: checkpoints for programs that know no muP.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use clap::Args;
use graph_builder::Role;
use models::{Model, ProgramKind, ProgramSpec};
use runtime::file::{check_writable, write_atomically};
use serde_json::json;
use train_engine::checkpoint::{CONFIG_FILE, EMA_FILE, MODEL_FILE};
use train_engine::mup::Stamp;

use super::weights;
use crate::Usage;
use crate::console;

/// Arguments of `mudit convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A checkpoint directory or a run directory.
    #[arg(long)]
    checkpoint: PathBuf,
    /// Multiply the output layer's weight by what muP multiplies its product with, α·base width/width, so that a plain
    /// DiT computes the same.
    #[arg(long, required = true)]
    fold_output_multiplier: bool,
    /// The new checkpoint's directory.
    #[arg(long)]
    out: PathBuf,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

impl ConvertArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if !self.checkpoint.is_dir() {
            return Err(Usage(format!("`{}` is no checkpoint directory", self.checkpoint.display())).into());
        }
        let directory = weights::directory(&self.checkpoint)?;
        let model = Model::resolve(&directory.join(CONFIG_FILE).display().to_string())?;
        let Some(mup) = model.mup else {
            return Err(Usage(format!(
                "`{}` is a plain checkpoint already: its {CONFIG_FILE} names no muP",
                directory.display()
            ))
            .into());
        };
        ensure!(!self.out.join(CONFIG_FILE).exists(), "`{}` holds a checkpoint already", self.out.display());
        check_writable(self.out.join(CONFIG_FILE))?;
        let scale = mup.output_multiplier / model.width_multiplier();
        let plain = Model { mup: None, ..model.clone() };
        let mut files = Vec::new();
        for name in [MODEL_FILE, EMA_FILE] {
            let from = directory.join(name);
            if from.is_file() {
                let to = self.out.join(name);
                fold(&model, &plain, scale, &from, &to)?;
                files.push(to);
            }
        }
        ensure!(!files.is_empty(), "`{}` holds no {MODEL_FILE}", directory.display());
        // Last: without it the directory is no checkpoint.
        let (config, text) = (self.out.join(CONFIG_FILE), plain.to_json());
        write_atomically(&config, |out| out.write_all(text.as_bytes()))?;
        files.push(config);
        if self.json {
            return console::json(&json!({ "checkpoint": self.out, "scale": scale, "files": files }));
        }
        console::out(&format!("final_layer.linear.weight times {scale}"))?;
        files.iter().try_for_each(|file| console::out(&file.display().to_string()))
    }
}

fn fold(model: &Model, plain: &Model, scale: f64, from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut parameters = weights::read(model, from)?;
    let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, 1))?;
    for (i, parameter) in graph.parameters().iter().enumerate() {
        if graph.role(i) == Role::Output {
            for value in parameters.view_mut(&parameter.name)? {
                *value = (f64::from(*value) * scale) as f32;
            }
        }
    }
    Ok(parameters.write_safetensors(to, &Stamp::of(plain).metadata()?)?)
}
