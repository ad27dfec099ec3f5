//! Ranges of the values: checked once, before anything expensive.

use std::fmt::Display;

use models::SolverKind;
use runtime::session::MAX_THREADS;

use super::{DataKind, Orient, TrainConfig};
use crate::error::{Result, TrainError};
use crate::random::Stream;

/// The largest seed TOML can hold.
const MAX_SEED: u64 = i64::MAX as u64;
/// More rows than anybody looks at, and few enough for memory.
const MAX_PER_CLASS: usize = 1000;

impl TrainConfig {
    /// Checks every value's range and the values that belong together.
    ///
    /// # Errors
    /// [`TrainError::BadValue`] for the first that is wrong.
    pub fn validate(&self) -> Result<()> {
        self.validate_model()?;
        self.validate_objective()?;
        self.validate_data()?;
        self.validate_train()?;
        check("checkpoint.keep", self.checkpoint.keep, self.checkpoint.keep >= 1, "at least 1")?;
        if let Some(seconds) = self.checkpoint.every_seconds {
            check("checkpoint.every_seconds", seconds, seconds >= 1, "at least 1")?;
        }
        check("log.every_steps", self.log.every_steps, self.log.every_steps >= 1, "at least 1")?;
        self.validate_sample()
    }

    fn validate_model(&self) -> Result<()> {
        let model = &self.model;
        if let (Some(preset), Some(_)) = (&model.preset, &model.config) {
            let allowed = "left out beside `model.config`: give one of the two";
            return Err(bad("model.preset", preset, allowed));
        }
        let sizes = [
            ("model.input_size", model.input_size),
            ("model.patch_size", model.patch_size),
            ("model.in_channels", model.in_channels),
            ("model.hidden_size", model.hidden_size),
            ("model.depth", model.depth),
            ("model.num_heads", model.num_heads),
            ("model.num_classes", model.num_classes),
        ];
        for (key, value) in sizes {
            if let Some(value) = value {
                check(key, value, value >= 1, "at least 1")?;
            }
        }
        if let Some(ratio) = model.mlp_ratio {
            positive("model.mlp_ratio", ratio)?;
        }
        if let Some(p) = model.class_dropout_prob {
            probability("model.class_dropout_prob", p)?;
        }
        let mup = &self.mup;
        check("mup.base_width", mup.base_width, mup.base_width >= 1, "at least 1")?;
        positive("mup.init_scale", mup.init_scale)?;
        positive("mup.output_multiplier", mup.output_multiplier)
    }

    fn validate_objective(&self) -> Result<()> {
        let objective = &self.objective;
        finite("objective.time_mean", objective.time_mean)?;
        positive("objective.time_std", objective.time_std)?;
        not_negative("objective.vb_weight", objective.vb_weight)
    }

    fn validate_data(&self) -> Result<()> {
        let data = &self.data;
        if data.kind != DataKind::FashionMnist && data.path.is_none() {
            let allowed = "the file or directory of the images, as `data.kind` is not `fashion-mnist`";
            return Err(bad("data.path", "unset", allowed));
        }
        if let (Some(labels), true) = (&data.labels, data.kind != DataKind::Idx) {
            return Err(bad("data.labels", labels.display(), "left out unless `data.kind` is `idx`"));
        }
        if data.kind == DataKind::Folder && data.image_size.is_none() {
            return Err(bad(
                "data.image_size",
                "unset",
                "the side in pixels that `folder` images are cropped to",
            ));
        }
        if data.orient != Orient::Off && data.kind != DataKind::Folder {
            return Err(bad("data.orient", "apply", "left out unless `data.kind` is `folder`"));
        }
        if let Some(size) = data.image_size {
            check("data.image_size", size, (1..=16_384).contains(&size), "from 1 to 16384 pixels")?;
        }
        check("data.prefetch", data.prefetch, (1..=1024).contains(&data.prefetch), "from 1 to 1024 batches")?;
        check("data.workers", data.workers, (1..=1024).contains(&data.workers), "from 1 to 1024 threads")
    }

    fn validate_train(&self) -> Result<()> {
        let train = &self.train;
        let steps = 1..Stream::MAX_STEP;
        check("train.steps", train.steps, steps.contains(&train.steps), "from 1 to 2^40 - 1")?;
        check("train.batch_size", train.batch_size, train.batch_size >= 1, "at least 1 image")?;
        let divides = train.accumulate >= 1 && train.batch_size.is_multiple_of(train.accumulate);
        let allowed = format!("a divisor of `train.batch_size` ({})", train.batch_size);
        check("train.accumulate", train.accumulate, divides, &allowed)?;
        check("train.seed", train.seed, train.seed <= MAX_SEED, "at most 2^63 - 1")?;
        positive("train.learning_rate", train.learning_rate)?;
        probability("train.final_fraction", train.final_fraction)?;
        let allowed = format!("at most `train.steps` ({})", train.steps);
        check("train.warmup_steps", train.warmup_steps, train.warmup_steps <= train.steps, &allowed)?;
        if let Some(decay) = train.decay_steps {
            if train.decay_end().is_none() {
                let allowed = "left out where `train.schedule` is `constant`: nothing decays";
                return Err(bad("train.decay_steps", decay, allowed));
            }
            let within = (train.warmup_steps.max(1)..Stream::MAX_STEP).contains(&decay);
            let allowed = format!("from `train.warmup_steps` ({}) to 2^40 - 1", train.warmup_steps.max(1));
            check("train.decay_steps", decay, within, &allowed)?;
        }
        let allowed = format!("at most {MAX_THREADS}; 0 is one a core");
        check("train.threads", train.threads, train.threads <= MAX_THREADS, &allowed)?;
        not_negative("train.weight_decay", train.weight_decay)?;
        for (key, beta) in
            [("train.beta1", train.beta1), ("train.beta2", train.beta2), ("train.ema_decay", train.ema_decay)]
        {
            check(key, beta, (0.0..1.0).contains(&beta), "at least 0 and below 1")?;
        }
        positive("train.eps", train.eps)?;
        not_negative("train.clip", train.clip)?;
        train.label_drop.map_or(Ok(()), |p| probability("train.label_drop", p))
    }

    fn validate_sample(&self) -> Result<()> {
        let sample = &self.sample;
        let fits = (1..=MAX_PER_CLASS).contains(&sample.per_class);
        check("sample.per_class", sample.per_class, fits, &format!("from 1 to {MAX_PER_CLASS} pictures"))?;
        check("sample.steps", sample.steps, sample.steps >= 1, "at least 1")?;
        finite("sample.guidance", sample.guidance)?;
        match sample.sampler {
            Some(sampler) if sampler.objective() != self.objective.kind => {
                let fitting =
                    SolverKind::ALL.iter().filter(|solver| solver.objective() == self.objective.kind);
                let names: Vec<String> = fitting.map(|solver| format!("`{solver}`")).collect();
                let allowed =
                    format!("one of {}, as `objective.kind` is `{}`", names.join(", "), self.objective.kind);
                return Err(bad("sample.sampler", sampler, &allowed));
            }
            _ => {}
        }
        // The first picture may come after days of training.
        let (objective, solver) = (self.objective.kind, sample.solver(self.objective.kind));
        match solver.plan(objective, false) {
            Ok(_) => Ok(()),
            Err(error) => {
                let allowed = format!("a number of steps that the solver `{}` takes: {error}", solver.kind);
                Err(bad("sample.steps", sample.steps, &allowed))
            }
        }
    }
}

fn bad(key: &'static str, value: impl Display, allowed: &str) -> TrainError {
    TrainError::BadValue { key, value: value.to_string(), allowed: allowed.to_owned() }
}

fn check(key: &'static str, value: impl Display, holds: bool, allowed: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(bad(key, value, allowed)) }
}

fn finite(key: &'static str, value: f64) -> Result<()> {
    check(key, value, value.is_finite(), "a finite number")
}

fn positive(key: &'static str, value: f64) -> Result<()> {
    check(key, value, value.is_finite() && value > 0.0, "a finite number above 0")
}

fn not_negative(key: &'static str, value: f64) -> Result<()> {
    check(key, value, value.is_finite() && value >= 0.0, "a finite number, 0 or above")
}

fn probability(key: &'static str, value: f64) -> Result<()> {
    check(key, value, (0.0..=1.0).contains(&value), "from 0 to 1")
}
