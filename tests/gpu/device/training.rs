//! Training on the GPU, compared with the same steps on the CPU.

use std::sync::Arc;

use graph_builder::Precision;
use models::dit::Dit;
use models::{Model, Network, Objective};
use mudit_tests::difference::relative_l2;
use mudit_tests::draws::Draws;
use mudit_tests::execution::array;
use runtime::{Provider, Runtime};
use train_engine::config::TrainConfig;
use train_engine::data::Batch;
use train_engine::trainer::Trainer;

use super::{fixture, on_gpu, runtime};

const BATCH: usize = 8;
const STEPS: u64 = 6;

/// What a few steps end with.
struct Run {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// Every parameter of the moving average, one after the other.
    average: Vec<f32>,
}

fn config(provider: Provider, precision: Precision, accumulate: usize) -> TrainConfig {
    let mut config = TrainConfig::default();
    let train = &mut config.train;
    (train.batch_size, train.accumulate, train.learning_rate) = (BATCH, accumulate, 1e-3);
    (train.clip, train.ema_decay, train.precision, train.provider) = (1.0, 0.5, precision, provider);
    config.objective.kind = Objective::Flow;
    config
}

fn model() -> Model {
    let text = fixture().join("config.json").display().to_string();
    let model = Model::resolve(&text).unwrap();
    let Network::Dit(dit) = &model.network;
    let network = Network::Dit(Dit { learn_sigma: false, ..dit.clone() });
    Model { objective: Objective::Flow, network, ..model }
}

fn batch(model: &Model, step: u64) -> Batch {
    let mut draws = Draws::new(step);
    let image = model.latent().values();
    let x0 = (0..BATCH * image).map(|_| draws.between(-1.0, 1.0) as f32).collect();
    Batch { step, indices: (0..BATCH).collect(), x0, y: (0..BATCH).map(|i| (i % 4) as i64).collect() }
}

fn run(runtime: &Arc<Runtime>, config: &TrainConfig) -> Run {
    let model = model();
    let mut trainer = Trainer::new(runtime, config, &model).unwrap_or_else(|e| panic!("{e}"));
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        let (loss, update) = trainer.step(&batch(&model, step)).unwrap_or_else(|e| panic!("{e}"));
        losses.push(loss.loss);
        norms.push(update.grad_norm);
        assert!(update.finite || config.train.precision == Precision::F16, "step {step}");
    }
    let average = trainer.average().unwrap();
    let average = average.read().unwrap().iter().flat_map(|(_, _, values)| values.to_vec()).collect();
    Run { losses, norms, average }
}

#[test]
fn steps_are_those_of_the_cpu() {
    let Some(gpu) = on_gpu("training") else { return };
    let runtime = runtime();
    for accumulate in [1, 2] {
        let cpu = run(&runtime, &config(Provider::default(), Precision::F32, accumulate));
        for (precision, limit) in [(Precision::F32, 1e-4), (Precision::Bf16, 5e-2), (Precision::F16, 2e-2)] {
            let found = run(&runtime, &config(gpu.clone(), precision, accumulate));
            let flat = |run: &Run| array(&[run.average.len()], &run.average);
            let apart = relative_l2(&flat(&found), &flat(&cpu));
            println!("{precision}, {accumulate} micro-batches: {:?} for {:?}", found.losses, cpu.losses);
            println!("  norms {:?} for {:?}; average {apart:.1e} apart", found.norms, cpu.norms);
            for (a, b) in found.losses.iter().zip(&cpu.losses) {
                assert!((a - b).abs() <= limit * b.abs(), "{precision}: loss {a} for {b}");
            }
            assert!(apart <= limit, "{precision}: average {apart:e}");
        }
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused_with_one_that_does() {
    let Some(gpu) = on_gpu("running out of memory") else { return };
    let mut config = config(gpu, Precision::Bf16, 1);
    // More than any GPU holds, and no more than the kernels take.
    config.train.batch_size = 1 << 15;
    let model = Model::resolve("DiT-XL/2").unwrap();
    config.objective.kind = model.objective;
    let refusal = Trainer::new(&runtime(), &config, &model).map(|_| ()).unwrap_err().to_string();
    println!("{refusal}");
    assert!(refusal.contains("memory") && refusal.contains("train.batch_size = "), "{refusal}");
}
