//! Training of the small classifier whose features measure small images.

use std::sync::Arc;

use graph_builder::Precision;
use models::Recompute;
use models::classifier::Classifier;
use runtime::update::{UpdateState, UpdateStep};
use runtime::{AdamW, Arena, Binding, Runtime, Session, SessionOptions, SharedArena};

use crate::data::Dataset;
use crate::error::{Result, TrainError};
use crate::mup::draw_parameters;
use crate::random::{Purpose, Stream, permutation};
use crate::step::{Prepared, StepArenas, read_lock, write_lock};

/// Images of one run when features are computed.
const EVALUATION_BATCH: usize = 250;
/// Part of the steps during which the learning rate rises; it falls to zero over the others.
const WARMUP: f64 = 0.2;
/// Constants of AdamW.
const BETAS: (f64, f64, f64) = (0.9, 0.99, 1e-8);

/// How the classifier is trained. The defaults reach 90 % on Fashion-MNIST.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassifierTraining {
    /// Passes over the training images.
    pub epochs: usize,
    /// Images of a step.
    pub batch: usize,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Seed of the first values and of the order of the images.
    pub seed: u64,
    /// Threads inside one op; 0 is one a core.
    pub threads: usize,
}

impl Default for ClassifierTraining {
    fn default() -> Self {
        Self { epochs: 4, batch: 128, learning_rate: 3e-3, weight_decay: 0.02, seed: 0, threads: 0 }
    }
}

/// A classifier that can be run.
#[derive(Debug)]
pub struct ClassifierModel {
    /// What it is for.
    pub shape: Classifier,
    /// Its parameters.
    pub parameters: SharedArena,
    binding: Binding,
}

/// The classifier that fits a data set.
pub fn classifier_for(data: &dyn Dataset) -> Classifier {
    Classifier {
        channels: data.channels(),
        height: data.height(),
        width: data.width(),
        classes: data.num_classes(),
    }
}

impl ClassifierModel {
    /// Images of one run.
    pub const BATCH: usize = EVALUATION_BATCH;

    /// Compiles the program that gives features and binds it to `parameters`.
    ///
    /// # Errors
    /// [`TrainError::Model`], [`TrainError::Runtime`] when the parameters are not the classifier's.
    pub fn new(
        runtime: &Arc<Runtime>,
        shape: Classifier,
        parameters: SharedArena,
        options: &SessionOptions,
    ) -> Result<Self> {
        let graph = shape.features(EVALUATION_BATCH)?;
        let program = graph.emit(graph_builder::Weights::Inputs).map_err(models::ModelError::from)?;
        let session = Session::load(runtime, &program, &runtime::Weights::Inside, options)?;
        let mut builder = Binding::builder(&session);
        builder.bind_inputs_by_name(&parameters)?;
        Ok(Self { shape, binding: builder.finish()?, parameters })
    }

    /// Features (N, 128) and class scores (N, classes) of at most [`Self::BATCH`] images (N, C, H, W) on −1..1.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] for more images or a number of values that is no number of images.
    pub fn run(&mut self, images: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        let image = self.shape.channels * self.shape.height * self.shape.width;
        let n = images.len() / image;
        let mut padded = images.to_vec();
        if n <= EVALUATION_BATCH && images.len() == n * image {
            padded.resize(EVALUATION_BATCH * image, 0.0);
        }
        self.binding.set_input("x", &padded)?;
        self.binding.run()?;
        let rows = |name: &str| -> Result<Vec<f32>> {
            let all = self.binding.output_f32(name)?;
            Ok(all[..n * (all.len() / EVALUATION_BATCH)].to_vec())
        };
        Ok((rows("features")?, rows("logits")?))
    }

    /// Part of a data set's images that are given their own class.
    ///
    /// # Errors
    /// What reading an image gives; [`TrainError::Runtime`].
    pub fn accuracy(&mut self, data: &dyn Dataset) -> Result<f64> {
        let all: Vec<usize> = (0..data.len()).collect();
        let mut right = 0;
        for indices in all.chunks(EVALUATION_BATCH) {
            let (images, labels) = read(data, indices)?;
            let (_, logits) = self.run(&images)?;
            let rows = logits.chunks(self.shape.classes).zip(&labels);
            right += rows.filter(|(scores, label)| best(scores) as i64 == **label).count();
        }
        Ok(right as f64 / data.len() as f64)
    }
}

/// Trains the classifier of a data set; `progress` gets (steps done, steps in all, loss). The same seed, data and number
/// of threads give the same parameters on one machine.
///
/// # Errors
/// What reading an image gives; [`TrainError::Model`], [`TrainError::Runtime`]; [`TrainError::BadValue`] for settings
/// that train nothing or a loss that is not finite.
pub fn train_classifier(
    runtime: &Arc<Runtime>,
    data: &dyn Dataset,
    settings: &ClassifierTraining,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<ClassifierModel> {
    let shape = classifier_for(data);
    let per_epoch = data.len() / settings.batch.max(1);
    let steps = per_epoch * settings.epochs;
    if steps == 0 || settings.batch == 0 {
        return Err(TrainError::BadValue {
            key: "batch",
            value: settings.batch.to_string(),
            allowed: format!("1 to {} images, and 1 epoch or more", data.len()),
        });
    }
    let graph = shape.train_step(settings.batch)?;
    let options = SessionOptions { threads: settings.threads, ..SessionOptions::default() };
    let prepared = Prepared::new(&graph, Recompute::None, &[], Precision::F32)?;
    let (mut binding, arenas) = prepared.bind(runtime, Precision::F32, &options)?;
    let StepArenas::Host(step) = arenas else {
        return Err(TrainError::Internal("the classifier is trained on the CPU".into()));
    };
    draw_parameters(&graph, settings.seed, 1.0, &mut *write_lock(&step.parameters)?)?;
    let (parameters, gradients) =
        (read_lock(&step.parameters)?.layout().clone(), read_lock(&step.gradients)?.layout().clone());
    let update = AdamW::new(&parameters, &gradients, BETAS, settings.threads)?;
    let (mut first, mut second) = (Arena::zeros(gradients.clone())?, Arena::zeros(gradients.clone())?);
    let entries = gradients.entries().len();
    let mut order = Vec::new();
    for number in 0..steps {
        let (epoch, at) = (number / per_epoch, number % per_epoch);
        if at == 0 {
            order = permutation(settings.seed, epoch as u64, data.len());
        }
        let indices = &order[at * settings.batch..(at + 1) * settings.batch];
        let (images, labels) = read(data, indices)?;
        binding.set_input("x", &images)?;
        binding.set_input("y", &labels)?;
        binding.run()?;
        let loss = f64::from(binding.output_f32("loss")?.first().copied().unwrap_or(f32::NAN));
        let rate = settings.learning_rate * schedule(number, steps);
        update.step(
            UpdateState {
                parameters: &mut *write_lock(&step.parameters)?,
                gradients: &*read_lock(&step.gradients)?,
                first_moments: &mut first,
                second_moments: &mut second,
                ema: None,
            },
            &UpdateStep {
                step: number as u64 + 1,
                lr: &vec![rate; entries],
                weight_decay: &vec![settings.weight_decay; entries],
                clip: Some(1.0),
                gradient_scale: 1.0,
            },
        )?;
        progress(number + 1, steps, loss);
    }
    ClassifierModel::new(runtime, shape, step.parameters, &options)
}

/// Factor on the learning rate: up, then down to zero.
fn schedule(step: usize, steps: usize) -> f64 {
    let at = (step + 1) as f64 / (steps + 1) as f64;
    (at / WARMUP).min((1.0 - at) / (1.0 - WARMUP))
}

/// Images (N, C, H, W) and labels.
fn read(data: &dyn Dataset, indices: &[usize]) -> Result<(Vec<f32>, Vec<i64>)> {
    let mut images = vec![0.0; indices.len() * data.image_len()];
    let mut draw = Stream::new(0, Purpose::Validation, 0, 0); // images are no distributions: nothing is drawn
    let rows = indices.iter().zip(images.chunks_mut(data.image_len()));
    let labels = rows.map(|(&i, image)| data.read(i, false, &mut draw, image)).collect::<Result<_>>()?;
    Ok((images, labels))
}

fn best(scores: &[f32]) -> usize {
    (0..scores.len()).fold(0, |best, i| if scores[i] > scores[best] { i } else { best })
}
