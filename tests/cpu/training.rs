//! What training does to a model: the muP coordinate check, and a run whose losses are known.

use std::collections::BTreeMap;
use std::time::Duration;

use graph_builder::Weights as Parameters;
use models::dit::Dit;
use models::{InitScheme, Model, MupConfig, Network, Objective, ProgramKind, ProgramSpec};
use mudit_tests::draws::Draws;
use mudit_tests::execution::{onnx_runtime, within};
use mudit_tests::tolerance::MODEL;
use runtime::{Binding, Session, SessionOptions, Weights};
use train_engine::config::TrainConfig;
use train_engine::data::Batch;
use train_engine::trainer::Trainer;

use crate::tiny_run::{TinyRun, losses};

const HEAD: usize = 36;
const WIDTHS: [usize; 4] = [2 * HEAD, 4 * HEAD, 8 * HEAD, 16 * HEAD];
const STEPS: u64 = 4;
const BATCH: usize = 16;
/// At the smallest width; large enough that a few steps show what it does to a layer.
const LEARNING_RATE: f64 = 1.0 / 128.0;
const SEEDS: u64 = 2;
const LIMIT: Duration = Duration::from_mins(1);

fn model(width: usize, objective: Objective, mup: bool) -> Model {
    let network = Network::Dit(Dit {
        input_size: 8,
        patch_size: 4,
        in_channels: 1,
        hidden_size: width,
        depth: 2,
        num_heads: width / HEAD,
        mlp_ratio: 4.0,
        class_dropout_prob: 0.1,
        num_classes: 4,
        learn_sigma: objective == Objective::Ddpm,
    });
    Model {
        network,
        objective,
        init: InitScheme::Mup,
        mup: mup.then_some(MupConfig { base_width: WIDTHS[0], output_multiplier: 1.0 }),
        class_names: None,
    }
}

fn normal(draws: &mut Draws, count: usize) -> Vec<f32> {
    // Twelve uniform numbers have the variance 1.
    (0..count).map(|_| (0..12).map(|_| draws.between(-0.5, 0.5)).sum::<f64>() as f32).collect()
}

/// The mean size of every layer's answer after a few steps of training, by layer.
fn sizes_after_training(model: &Model, seed: u64) -> BTreeMap<String, f64> {
    let mut config = TrainConfig::default();
    config.train.seed = seed;
    config.train.batch_size = BATCH;
    config.train.learning_rate = LEARNING_RATE;
    config.train.threads = 1;
    config.objective.kind = model.objective;
    let runtime = onnx_runtime();
    let mut trainer = Trainer::new(&runtime, &config, model).unwrap_or_else(|e| panic!("{e}"));
    let mut draws = Draws::new(seed);
    let classes: Vec<i64> = (0..BATCH).map(|i| (i % 4) as i64).collect();
    for step in 0..STEPS {
        let x0 = normal(&mut draws, BATCH * 64);
        trainer.step(&Batch { step, indices: (0..BATCH).collect(), x0, y: classes.clone() }).unwrap();
    }

    let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, BATCH)).unwrap();
    let scopes: Vec<String> =
        graph.scopes().iter().filter(|s| !s.is_empty()).map(|s| (*s).to_owned()).collect();
    let probed = graph.with_outputs_at(scopes.iter().map(String::as_str)).unwrap().optimised().unwrap();
    let options = SessionOptions { threads: 1, spinning: false, ..SessionOptions::default() };
    let emitted = probed.emit(Parameters::Inputs).unwrap();
    let session = Session::load(&runtime, &emitted, &Weights::Inside, &options).unwrap();
    let mut builder = Binding::builder(&session);
    builder.bind_inputs_by_name(&trainer.compiled().host().unwrap().parameters).unwrap();
    let mut binding = builder.finish().unwrap();
    binding.set_input("x", &normal(&mut draws, BATCH * 64)).unwrap();
    let times: Vec<f32> = (0..BATCH).map(|i| (i * 1000 / BATCH) as f32).collect();
    binding.set_input("t", &times).unwrap();
    binding.set_input("y", &classes).unwrap();
    binding.run().unwrap();
    let size = |scope: &String| {
        let values = binding.output_f32(&format!("at.{scope}")).unwrap();
        (scope.clone(), values.iter().map(|v| f64::from(v.abs())).sum::<f64>() / values.len() as f64)
    };
    scopes.iter().map(size).collect()
}

/// The largest ratio of a layer's sizes over the widths, by layer; sizes are averaged over a few seeds.
fn spread(objective: Objective, mup: bool) -> BTreeMap<String, f64> {
    let sizes = WIDTHS.map(|width| {
        let mut mean = BTreeMap::new();
        for seed in 0..SEEDS {
            for (layer, size) in sizes_after_training(&model(width, objective, mup), seed) {
                *mean.entry(layer).or_insert(0.0) += size / SEEDS as f64;
            }
        }
        mean
    });
    let ratio = |layer: &String| {
        let of = sizes.each_ref().map(|sizes| sizes[layer]);
        assert!(of.iter().all(|size| size.is_finite() && *size > 0.0), "{layer}: {of:?}");
        of.iter().fold(0.0_f64, |a, b| a.max(*b)) / of.iter().fold(f64::MAX, |a, b| a.min(*b))
    };
    sizes[0].keys().map(|layer| (layer.clone(), ratio(layer))).collect()
}

#[test]
fn activations_keep_their_size_over_widths_under_mup_only() {
    for objective in [Objective::Flow, Objective::Ddpm] {
        let [with, without] =
            [true, false].map(|mup| within(LIMIT, "the coordinate check", move || spread(objective, mup)));
        assert!(
            with.len() >= 20 && with.contains_key("blocks.1.mlp.fc2"),
            "all layers are looked at: {with:?}"
        );
        let largest = |spread: &BTreeMap<String, f64>| spread.values().fold(0.0_f64, |a, b| a.max(*b));
        let (mup, standard) = (largest(&with), largest(&without));
        println!(
            "{objective}: sizes of a layer differ up to {mup:.2} times under muP, {standard:.1} times without"
        );
        assert!(mup < 2.0, "{objective}, muP: {with:#?}");
        assert!(standard > 4.0, "{objective}, standard: {without:#?}");
    }
}

/// Losses of the first steps of the tiny run.
const LOSSES: [(&str, [f64; 6]); 2] = [
    ("ddpm", [0.866_719_8, 0.963_109_7, 1.008_461_5, 0.990_962_9, 0.922_808_5, 0.990_410_4]),
    ("flow", [1.190_673_9, 1.171_947_9, 1.348_714_6, 1.293_582_9, 1.183_390_4, 1.347_301_7]),
];

#[test]
fn the_losses_of_a_run_are_known() {
    let tiny = TinyRun::new();
    for (objective, want) in LOSSES {
        let kind = format!("objective.kind={objective}");
        tiny.train(objective, &["train.steps=6", &kind]).succeeds();
        let rows = losses(&tiny.path(objective));
        let got: Vec<f64> = rows.iter().map(|(_, row)| row["loss"].as_f64().unwrap()).collect();
        assert_eq!(got.len(), want.len());
        for (got_one, want) in got.iter().zip(want) {
            assert!((got_one - want).abs() <= MODEL * want, "{objective}: {got:?}");
        }
    }
}
