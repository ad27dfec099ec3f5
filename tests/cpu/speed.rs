//! A slow-down is noticed: by counts that do not depend on the machine, and by a ratio to a yardstick of the same run.

use std::time::{Duration, Instant};

use models::DitConfig;
use mudit::roof::Product;
use mudit_tests::execution::{onnx_runtime, within};
use runtime::SessionOptions;
use serde_json::Value;
use train_engine::step::{CompiledStep, StepInputs, write_lock};

use crate::process::mudit;

/// Small enough to run often, large enough that matrix products are most of it.
const MODEL: &str = r#"{"model":"dit","input_size":16,"patch_size":2,"in_channels":4,"hidden_size":192,"depth":3,
    "num_heads":3,"mlp_ratio":4.0,"num_classes":10,"learn_sigma":true}"#;
const BATCH: usize = 8;
/// Side of the yardstick's product.
const SIDE: usize = 768;
/// Most that a training step may take, over the time of as many floating-point operations in one large product. It is
/// loose: a noisy machine must pass, and a step that lost its kernels or its fusions must not.
const SLOWEST: f64 = 4.0;
/// Rounds of both, within a time limit.
const ROUNDS: usize = 40;
const BUDGET: Duration = Duration::from_secs(12);

/// Most nodes that ONNX Runtime may run in a training step of DiT-S/2, and most bytes that they may move for 2 images.
const MOST_NODES: f64 = 1750.0;
const MOST_BYTES: f64 = 2.2e9;

#[test]
fn the_step_keeps_its_pace() {
    let ratio = within(Duration::from_mins(2), "timing a training step", || {
        let model = DitConfig::from_json(MODEL).unwrap();
        // One thread: the other core may be anybody's.
        let options = SessionOptions { threads: 1, ..SessionOptions::default() };
        let mut step = CompiledStep::compile(onnx_runtime(), &model, BATCH, &options).unwrap();
        for (i, view) in write_lock(&step.parameters).unwrap().views_mut().into_iter().enumerate() {
            view.iter_mut().enumerate().for_each(|(k, v)| *v = 0.02 * (((i + k * 7) % 13) as f32 - 6.0));
        }
        let image = vec![0.5; BATCH * 4 * 16 * 16];
        let (t, y) = (vec![500.0; BATCH], vec![3; BATCH]);
        let inputs = StepInputs { x0: &image, noise: &image, t: &t, y: &y };
        let mut product = Product::new(onnx_runtime(), SIDE, 1).unwrap();
        let flops = 2.0 * step.cost.macs as f64;
        let (start, mut best) = (Instant::now(), [f64::INFINITY; 2]);
        for _ in 0..ROUNDS {
            let began = Instant::now();
            assert!(step.run(&inputs).unwrap().loss.is_finite());
            best[0] = best[0].min(began.elapsed().as_secs_f64());
            let began = Instant::now();
            product.run().unwrap();
            best[1] = best[1].min(began.elapsed().as_secs_f64());
            if start.elapsed() > BUDGET {
                break;
            }
        }
        (best[0] / flops) / (best[1] / product.flops())
    });
    assert!(
        (1.0..SLOWEST).contains(&ratio),
        "a training step takes {ratio:.2} times as long as its products would alone"
    );
}

#[test]
fn the_step_is_no_more_work_than_it_was() {
    let line = "profile --offline DiT-S/2 --batch 2 --repeat 1";
    let report = mudit(line.split(' ')).json();
    let all = |key: &str| -> f64 {
        let rows = report["operators"].as_array().unwrap().iter();
        rows.map(|row| row[key].as_f64().unwrap()).sum()
    };
    let (nodes, bytes) = (all("calls"), all("bytes"));
    assert!(
        nodes > 0.5 * MOST_NODES && bytes > 0.5 * MOST_BYTES,
        "the bounds are stale: {nodes} {bytes:.3e}"
    );
    assert!(nodes <= MOST_NODES, "{nodes} nodes are run: {}", report["operators"]);
    assert!(bytes <= MOST_BYTES, "{bytes:.3e} bytes are moved: {}", report["operators"]);
    assert!(report["operators"].as_array().unwrap().iter().all(|o| o["name"] != Value::from("")));
}
