//! A slow-down is noticed: by counts that do not depend on the machine, and by a ratio to a yardstick of the same run.

use std::time::{Duration, Instant};

use models::{Model, Recompute};
use mudit::roof::{Means, Product};
use mudit_tests::execution::{onnx_runtime, within};
use runtime::SessionOptions;
use train_engine::step::{CompiledStep, StepInputs, write_lock};

use crate::process::mudit;

/// Small enough to run often, large enough that matrix products are most of it.
const MODEL: &str = r#"{"model":"dit","input_size":16,"patch_size":2,"in_channels":4,"hidden_size":192,"depth":3,
    "num_heads":3,"mlp_ratio":4.0,"num_classes":10,"learn_sigma":true}"#;
const BATCH: usize = 8;
/// Side of the yardstick's product.
const SIDE: usize = 768;
/// Most that a training step may take, over the time of as many floating-point operations in one large product. It is
/// loose, for a noisy machine must pass: 1.4 is usual.
const SLOWEST: f64 = 2.2;
/// Rounds of both, within a time limit.
const ROUNDS: usize = 40;
const BUDGET: Duration = Duration::from_secs(12);

/// Most nodes that ONNX Runtime may run in a training step of DiT-S/4, and most bytes that they may move for 2 images.
const MOST_NODES: f64 = 640.0;
const MOST_BYTES: f64 = 6.6e8;

#[test]
fn the_step_keeps_its_pace() {
    let [native, plain, product] = within(Duration::from_mins(2), "timing a training step", || {
        let (mut native, mut plain) = (step(true), step(false));
        let mut product = Product::new(&onnx_runtime(), Means::Linear, SIDE, 1).unwrap();
        let (flops, whole) = (2.0 * native.cost.macs as f64, product.flops());
        let (start, mut best) = (Instant::now(), [f64::INFINITY; 3]);
        for _ in 0..ROUNDS {
            let mut time = |i: usize, flops: f64, run: &mut dyn FnMut()| {
                let began = Instant::now();
                run();
                best[i] = best[i].min(began.elapsed().as_secs_f64() / flops);
            };
            time(0, flops, &mut || run(&mut native));
            time(1, flops, &mut || run(&mut plain));
            time(2, whole, &mut || product.run().unwrap());
            if start.elapsed() > BUDGET {
                break;
            }
        }
        best
    });
    assert!(
        (1.0..SLOWEST).contains(&(native / product)),
        "a training step takes {:.2} times as long as its products would alone",
        native / product
    );
    assert!(native < plain, "the native kernels take {:.2} of ONNX Runtime's time", native / plain);
}

fn step(native_kernels: bool) -> CompiledStep {
    let model = Model::from_json(MODEL).unwrap();
    // One thread: the other core may be anybody's.
    let options = SessionOptions { threads: 1, native_kernels, ..SessionOptions::default() };
    let step = CompiledStep::compile(&onnx_runtime(), &model, BATCH, Recompute::None, &options).unwrap();
    for (i, view) in write_lock(&step.host().unwrap().parameters).unwrap().views_mut().into_iter().enumerate()
    {
        view.iter_mut().enumerate().for_each(|(k, v)| *v = 0.02 * (((i + k * 7) % 13) as f32 - 6.0));
    }
    step
}

fn run(step: &mut CompiledStep) {
    let image = vec![0.5; BATCH * 4 * 16 * 16];
    let inputs = StepInputs { x0: &image, noise: &image, t: &[500.0; BATCH], y: &[3; BATCH] };
    assert!(step.run(&inputs).unwrap().loss.is_finite());
}

#[test]
fn the_step_is_no_more_work_than_it_was() {
    let line = "profile --offline DiT-S/4 --batch 2 --repeat 1";
    let report = mudit(line.split(' ')).json();
    let all = |key: &str| -> f64 {
        let rows = report["operators"].as_array().unwrap().iter();
        rows.map(|row| row[key].as_f64().unwrap()).sum()
    };
    let (nodes, bytes) = (all("calls"), all("bytes"));
    assert!(
        nodes > 0.5 * MOST_NODES && bytes > 0.5 * MOST_BYTES,
        "the bounds are stale: {nodes} nodes, {bytes:.3e} bytes"
    );
    assert!(nodes <= MOST_NODES, "{nodes} nodes are run: {}", report["operators"]);
    assert!(bytes <= MOST_BYTES, "{bytes:.3e} bytes are moved: {}", report["operators"]);
    assert!(report["operators"].as_array().unwrap().iter().all(|o| o["name"] != ""));
}
