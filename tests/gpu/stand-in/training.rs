//! Training whose state is on the device. Only the update's kernels run: every gradient is zero, and what the moments do to
//! the parameters remains.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use graph_builder::{DType, Precision};
use half::bf16;
use models::dit::Dit;
use models::{InitScheme, Model, Network, Objective};
use mudit_tests::draws::Draws;
use runtime::cuda::{DeviceAdamW, DeviceArena, DeviceUpdate, Gpu, GradientGroup};
use runtime::update::{UpdateState, UpdateStep, trainable_layout};
use runtime::{AdamW, Arena, ArenaLayout, Provider, Runtime, RuntimeOptions};
use train_engine::checkpoint::{self, State};
use train_engine::config::TrainConfig;
use train_engine::data::{Batch, GaussianImages};
use train_engine::random::{Purpose, Stream};
use train_engine::signals::StopSignal;
use train_engine::step::StepLoss;
use train_engine::trainer::{self, MemoryPlan, Observer, Outcome, RunInfo, StepReport, Trainer};

use super::counts::Counts;

const BATCH: usize = 8;
const SIDE: usize = 8;

fn model() -> Model {
    let network = Network::Dit(Dit {
        input_size: SIDE,
        patch_size: 4,
        in_channels: 1,
        hidden_size: 32,
        depth: 2,
        num_heads: 2,
        mlp_ratio: 4.0,
        class_dropout_prob: 0.1,
        num_classes: 4,
        learn_sigma: true,
    });
    Model { network, objective: Objective::Ddpm, init: InitScheme::Mup, mup: None, class_names: None }
}

fn config(provider: &str, precision: Precision, accumulate: usize) -> TrainConfig {
    let mut config = TrainConfig::default();
    let train = &mut config.train;
    (train.steps, train.batch_size, train.accumulate, train.threads) = (3, BATCH, accumulate, 1);
    (train.learning_rate, train.weight_decay, train.clip) = (1e-2, 0.1, 1.0);
    (train.provider, train.precision) = (provider.parse().unwrap(), precision);
    config
}

fn onnx_runtime() -> Arc<Runtime> {
    let options = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    Runtime::start(&options).unwrap_or_else(|e| panic!("{e}"))
}

fn batch(step: u64) -> Batch {
    let mut draws = Draws::new(step);
    let x0 = (0..BATCH * SIDE * SIDE).map(|_| draws.between(-1.0, 1.0) as f32).collect();
    Batch { step, indices: (0..BATCH).collect(), x0, y: (0..BATCH as i64).map(|i| i % 4).collect() }
}

fn state(step: u64) -> State {
    State {
        format_version: State::FORMAT_VERSION,
        step,
        total_steps: step,
        images_seen: 0,
        epoch: 0,
        epoch_batch: 0,
        seed: 0,
        elapsed_seconds: 0.0,
        config_hash: String::new(),
        loss_scale: None,
        decay_steps: None,
        data: None,
        origin: None,
        mup: serde_json::Value::Null,
    }
}

fn write(trainer: &Trainer, folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    trainer.write(folder, &state(2)).unwrap_or_else(|e| panic!("{e}"));
}

/// A checkpoint of two steps on the CPU, with moments that are not zero.
fn checkpoint_of_the_host(folder: &Path) {
    let mut trainer = Trainer::new(&onnx_runtime(), &config("cpu", Precision::F32, 1), &model()).unwrap();
    for step in 0..2 {
        let (loss, report) = trainer.step(&batch(step)).unwrap();
        assert!(loss.loss > 0.0 && report.grad_norm > 0.0);
    }
    write(&trainer, folder);
}

fn same_files(left: &Path, right: &Path) {
    for file in checkpoint::FILES {
        assert!(fs::read(left.join(file)).unwrap() == fs::read(right.join(file)).unwrap(), "{file} differs");
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn a_checkpoint_goes_to_the_device_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let (host, device, again) =
        (folder.path().join("host"), folder.path().join("device"), folder.path().join("again"));
    checkpoint_of_the_host(&host);
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        let mut trainer = Trainer::new(&onnx_runtime(), &config("cuda", precision, 1), &model()).unwrap();
        trainer.read(&host).unwrap();
        write(&trainer, &device);
        same_files(&host, &device);
        let mut trainer = Trainer::new(&onnx_runtime(), &config("cpu", Precision::F32, 1), &model()).unwrap();
        trainer.read(&device).unwrap();
        write(&trainer, &again);
        same_files(&host, &again);
    }
}

/// What a checkpoint's state becomes by steps whose gradients are zero.
struct Expected {
    parameters: Arena,
    average: Arena,
    moments: [Arena; 2],
}

impl Expected {
    fn after_steps(trainer: &Trainer, config: &TrainConfig, start: &Path, steps: u64) -> Self {
        let graph = trainer.compiled().graph();
        let layout = train_engine::step::parameter_layout(graph.parameters()).unwrap();
        let trainable = |name: &str| graph.parameters().iter().any(|p| p.trainable && p.name == name);
        let gradients = Arc::new(trainable_layout(&layout, |name, _| trainable(name)).unwrap());
        let file = |name: &str| start.join(name);
        let mut parameters = Arena::read_safetensors(&layout, file(checkpoint::MODEL_FILE), false).unwrap();
        let mut average = Arena::read_safetensors(&layout, file(checkpoint::EMA_FILE), false).unwrap();
        let mut moments = ["exp_avg.", "exp_avg_sq."].map(|prefix| {
            Arena::read_prefixed_safetensors(&gradients, prefix, file(checkpoint::OPTIMIZER_FILE)).unwrap()
        });
        let train = &config.train;
        let optimizer = AdamW::new(&layout, &gradients, (train.beta1, train.beta2, train.eps), 1).unwrap();
        let (lr, decay) = trainer.mup().rates(&gradients, train.learning_rate, train.weight_decay);
        let zeros = Arena::zeros(gradients).unwrap();
        for step in 0..steps {
            let [first_moments, second_moments] = &mut moments;
            let state = UpdateState {
                parameters: &mut parameters,
                gradients: &zeros,
                first_moments,
                second_moments,
                ema: Some((&mut average, train.ema_decay)),
            };
            let update = UpdateStep {
                step: 3 + step,
                lr: &lr,
                weight_decay: &decay,
                clip: Some(train.clip),
                gradient_scale: 1.0,
            };
            assert!(optimizer.step(state, &update).unwrap().finite);
        }
        Self { parameters, average, moments }
    }

    fn is_in(&self, folder: &Path) {
        let file = |name: &str| folder.join(name);
        let same = |want: &Arena, got: &Arena, what: &str| {
            for ((name, _, want), (_, _, got)) in want.iter().zip(got.iter()) {
                let equal = want.iter().zip(got).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(equal, "{what} of `{name}`");
            }
        };
        let whole =
            |name: &str| Arena::read_safetensors(self.parameters.layout(), file(name), false).unwrap();
        same(&self.parameters, &whole(checkpoint::MODEL_FILE), "parameters");
        same(&self.average, &whole(checkpoint::EMA_FILE), "average");
        for (want, prefix) in self.moments.iter().zip(["exp_avg.", "exp_avg_sq."]) {
            let path = file(checkpoint::OPTIMIZER_FILE);
            same(want, &Arena::read_prefixed_safetensors(want.layout(), prefix, path).unwrap(), prefix);
        }
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn steps_on_the_device_have_the_hosts_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (start, end) = (folder.path().join("start"), folder.path().join("end"));
    checkpoint_of_the_host(&start);
    for (precision, accumulate) in [
        (Precision::F32, 1),
        (Precision::F32, 2),
        (Precision::Bf16, 1),
        (Precision::Bf16, 4),
        (Precision::F16, 2),
    ] {
        let config = config("cuda", precision, accumulate);
        let mut trainer = Trainer::new(&onnx_runtime(), &config, &model()).unwrap_or_else(|e| panic!("{e}"));
        trainer.read(&start).unwrap();
        for step in 2..5 {
            trainer.enqueue(&batch(step)).unwrap();
            if step == 3 {
                trainer.prepare(&batch(step + 1)).unwrap();
            }
            let (loss, report) = trainer.complete().unwrap();
            let StepLoss { loss, mse, vb } = loss;
            assert_eq!((loss, mse, vb), (0.0, vec![0.0; BATCH], vec![0.0; BATCH]), "{precision}");
            assert_eq!((report.grad_norm, report.clip_scale, report.finite), (0.0, 1.0, true), "{precision}");
        }
        write(&trainer, &end);
        Expected::after_steps(&trainer, &config, &start, 3).is_in(&end);
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn a_step_moves_a_batch_and_its_losses_over_the_bus_and_nothing_else() {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut trainer = Trainer::new(&onnx_runtime(), &config("cuda", precision, 1), &model()).unwrap();
        for step in 0..2 {
            trainer.step(&batch(step)).unwrap();
        }
        let crossed = Counts::during(|| drop(trainer.step(&batch(2)).unwrap()));
        let graph = trainer.compiled().graph();
        let entries = graph.parameters().iter().filter(|p| p.trainable).count();
        // Where the noise comes from, images, times and labels at multiples of 256 bytes in one piece; the update's 40 bytes
        // a parameter. The noise itself would be 2048 bytes more.
        let inputs = 256 + BATCH * SIDE * SIDE * 4 + 256 + BATCH * 8;
        let table = entries * 40;
        assert_eq!(crossed.to_device, 2, "{precision}: {crossed:?}");
        assert_eq!(crossed.to_device_bytes, (inputs + table) as u64, "{precision}: {crossed:?}");
        // Losses, and what the update decided.
        assert_eq!(crossed.from_device, 2, "{precision}: {crossed:?}");
        assert!(crossed.from_device_bytes <= 3 * 256 + 16, "{precision}: {crossed:?}");
    }
}

/// Every micro-batch has the host's noise, whether it was sent ahead or not, though none crosses the bus.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn the_noise_of_a_step_is_drawn_on_the_device() {
    for (accumulate, provider) in [(1, "cuda"), (4, "cuda"), (2, "cuda+graph")] {
        let config = config(provider, Precision::Bf16, accumulate);
        let mut trainer = Trainer::new(&onnx_runtime(), &config, &model()).unwrap_or_else(|e| panic!("{e}"));
        for step in [0, 1, 7] {
            trainer.enqueue(&batch(step)).unwrap();
            trainer.complete().unwrap();
            // The last micro-batch's is still there.
            let rows = BATCH / accumulate;
            let want = (BATCH - rows..BATCH).flat_map(|row| {
                let mut values = vec![0.0; SIDE * SIDE];
                Stream::new(config.train.seed, Purpose::Noise, step, row as u64).fill_normal(&mut values);
                values
            });
            let got = trainer.compiled().input("noise").unwrap();
            assert!(got.iter().map(|z| z.to_bits()).eq(want.map(f32::to_bits)), "{accumulate}, step {step}");
            if step == 0 {
                trainer.prepare(&batch(1)).unwrap();
            }
        }
    }
}

/// One group in bf16 and one in f32, whose norm is taken together; and sums over micro-batches.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn gradients_of_two_types_are_one_update() {
    let gpu = Gpu::open(0).unwrap();
    let shapes = [("a", vec![3000]), ("b", vec![5, 7]), ("frozen", vec![9]), ("c", vec![64]), ("d", vec![])];
    let all = ArenaLayout::new(shapes.map(|(name, dims)| (name.to_owned(), dims.into()))).unwrap();
    let part = |names: &[&str]| Arc::new(trainable_layout(&all, |name, _| names.contains(&name)).unwrap());
    let (gradients, narrow, wide) = (part(&["a", "b", "c", "d"]), part(&["a", "c"]), part(&["b", "d"]));
    let mut draws = Draws::new(11);
    let mut filled = |layout: &Arc<ArenaLayout>, size: f64| {
        let mut arena = Arena::zeros(layout.clone()).unwrap();
        for view in arena.views_mut() {
            view.fill_with(|| bf16::from_f64(draws.between(-size, size)).to_f32());
        }
        arena
    };
    let whole = Arc::new(all);
    let (mut parameters, mut average) = (filled(&whole, 1.0), filled(&whole, 1.0));
    let mut moments = [filled(&gradients, 0.0), filled(&gradients, 0.0)];
    let (betas, epsilons) = ((0.9, 0.999), vec![1e-8, 2e-8, 3e-8, 4e-8]);
    let host = AdamW::new(&whole, &gradients, (betas.0, betas.1, 0.0), 1).unwrap();
    let host = host.with_epsilons(epsilons.clone()).unwrap();

    let zeros = |layout: &Arc<ArenaLayout>, dtype| {
        DeviceArena::zeros(&gpu, layout.clone(), dtype, "a proof").unwrap()
    };
    let (masters, ema, copy) =
        (zeros(&whole, DType::F32), zeros(&whole, DType::F32), zeros(&whole, DType::Bf16));
    masters.upload(&parameters).unwrap();
    ema.upload(&average).unwrap();
    let groups = [(narrow, DType::Bf16), (wide, DType::F32)].map(|(layout, dtype)| {
        let f32s = || zeros(&layout, DType::F32);
        (zeros(&layout, dtype), f32s(), f32s(), f32s(), layout)
    });
    let layouts: Vec<_> = groups.iter().map(|g| g.4.clone()).collect();
    let mut device = DeviceAdamW::new(&gpu, &whole, &gradients, &layouts, betas, &epsilons).unwrap();
    for step in 1..=4 {
        let micro = [filled(&gradients, 1.0), filled(&gradients, 1.0)];
        let mut sum = Arena::zeros(gradients.clone()).unwrap();
        for (k, values) in micro.iter().enumerate() {
            sum.add_scaled(values, 0.5).unwrap();
            for (grads, total, _, _, layout) in &groups {
                let mut own = Arena::zeros(layout.clone()).unwrap();
                for name in layout.entries().keys() {
                    own.view_mut(name).unwrap().copy_from_slice(values.view(name).unwrap());
                }
                grads.upload(&own).unwrap();
                total.accumulate(grads, 0.5, k == 0).unwrap();
            }
        }
        let update = UpdateStep {
            step,
            lr: &[1e-2, 3e-3, 5e-2, 1e-3],
            weight_decay: &[0.0, 0.1, 0.3, 0.2],
            // Far from and far beyond the norm, whose last bit depends on the order of its sum.
            clip: (step == 3).then_some(1e6),
            gradient_scale: 0.25,
        };
        let [first_moments, second_moments] = &mut moments;
        let state = UpdateState {
            parameters: &mut parameters,
            gradients: &sum,
            first_moments,
            second_moments,
            ema: Some((&mut average, 0.99)),
        };
        let want = host.step(state, &update).unwrap();
        let parts = groups.each_ref().map(|(_, total, first, second, _)| GradientGroup {
            gradients: total,
            first_moments: first,
            second_moments: second,
        });
        let state =
            DeviceUpdate { parameters: &masters, groups: &parts, ema: Some((&ema, 0.99)), copy: Some(&copy) };
        device.enqueue(&state, &update).unwrap();
        let got = device.report().unwrap();
        assert!((got.grad_norm - want.grad_norm).abs() <= 1e-14 * want.grad_norm, "{got:?} {want:?}");
        assert_eq!((got.clip_scale, got.finite), (want.clip_scale, want.finite));
    }
    let same = |want: &Arena, arena: &DeviceArena, what: &str| {
        let mut got = Arena::zeros(arena.layout().clone()).unwrap();
        arena.download(&mut got).unwrap();
        for (name, _, got) in got.iter() {
            let want = want.view(name).unwrap();
            let bits = |(a, b): (&f32, &f32)| match arena.dtype() {
                DType::Bf16 => bf16::from_f32(*a).to_f32().to_bits() == b.to_bits(),
                _ => a.to_bits() == b.to_bits(),
            };
            assert!(want.iter().zip(got).all(bits), "{what} of `{name}`");
        }
    };
    same(&parameters, &masters, "parameters");
    same(&average, &ema, "average");
    for (_, _, first, second, _) in &groups {
        same(&moments[0], first, "first moments");
        same(&moments[1], second, "second moments");
    }
    for name in ["a", "b", "c", "d"] {
        let mut got = Arena::zeros(whole.clone()).unwrap();
        copy.download(&mut got).unwrap();
        let want = parameters.view(name).unwrap().iter().map(|v| bf16::from_f32(*v).to_f32());
        assert!(want.zip(got.view(name).unwrap()).all(|(a, b)| a == *b), "copy of `{name}`");
    }
}

#[derive(Default)]
struct Seen {
    plans: Vec<MemoryPlan>,
    steps: Vec<StepReport>,
    samples: Vec<f32>,
}

impl Observer for Seen {
    fn planned(&mut self, plan: &MemoryPlan) {
        self.plans.push(plan.clone());
    }
    fn started(&mut self, _: &RunInfo) {}
    fn stepped(&mut self, report: &StepReport) {
        self.steps.push(report.clone());
    }
    fn saved(&mut self, _: &Path) {}
    fn sample(&mut self, _: u64, _: &Model, ema: &runtime::SharedArena) -> train_engine::Result<()> {
        let arena = ema.read().unwrap();
        self.samples.push(arena.iter().flat_map(|(_, _, v)| v).map(|v| v.abs()).sum());
        Ok(())
    }
    fn warn(&mut self, _: &str) {}
}

fn run(config: &TrainConfig, folder: &Path) -> (train_engine::Result<Outcome>, Seen) {
    let mut config = config.clone();
    let from = model();
    let Network::Dit(from) = &from.network;
    config.model.patch_size = Some(from.patch_size);
    (config.model.hidden_size, config.model.depth) = (Some(from.hidden_size), Some(from.depth));
    (config.model.num_heads, config.mup.base_width) = (Some(from.num_heads), from.hidden_size);
    let dataset: Arc<dyn train_engine::data::Dataset> = Arc::new(GaussianImages::new(64, 1, SIDE, 4));
    let mut seen = Seen::default();
    let outcome = trainer::run(
        &onnx_runtime(),
        &config,
        folder,
        &dataset,
        &StopSignal::install(|| ()).unwrap(),
        &mut seen,
    );
    (outcome, seen)
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn a_run_on_the_device_goes_on_on_the_host_and_back() {
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config("cuda", precision, 2);
        (config.sample.every_steps, config.log.every_steps) = (2, 1);
        let (outcome, seen) = run(&config, folder.path());
        assert_eq!(outcome.unwrap_or_else(|e| panic!("{precision}: {e}")), Outcome::Finished);
        assert_eq!(seen.steps.iter().map(|r| r.step).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(seen.samples.len() == 1 && seen.samples[0] > 0.0, "the average came back");
        assert!(seen.plans.len() == 1 && seen.plans[0].to_string().contains("together"));
        if precision != Precision::F32 {
            continue;
        }
        for (provider, steps) in [(Provider::default(), 5), ("cuda".parse().unwrap(), 7)] {
            (config.train.provider, config.train.steps) = (provider, steps);
            let (outcome, seen) = run(&config, folder.path());
            assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")), Outcome::Finished);
            assert_eq!(seen.steps.len(), 2);
            let on_host = !config.train.provider.is_gpu();
            assert_eq!(seen.steps[0].loss.loss > 0.0, on_host);
        }
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn a_run_that_does_not_fit_says_what_would() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config("cuda", Precision::F32, 1);
    config.train.batch_size = 64;
    let (outcome, seen) = run(&config, folder.path());
    let text = outcome.unwrap_err().to_string();
    assert!(seen.plans[0].bytes() > seen.plans[0].free && seen.steps.is_empty(), "{text}");
    assert!(text.starts_with("GPU 0 cannot give"), "{text}");
    assert!(text.contains("images at once fit: `train.batch_size = "), "{text}");
    // And by the plan that one fits: it is let through. Whether it then runs is up to the libraries' own memory.
    let images = text.split("`train.batch_size = ").nth(1).unwrap().split('`').next().unwrap();
    config.train.batch_size = images.parse().unwrap();
    let (outcome, seen) = run(&config, tempfile::tempdir().unwrap().path());
    assert!(seen.plans[0].bytes() <= seen.plans[0].free);
    let refused = outcome.err().map_or(String::new(), |e| e.to_string());
    assert!(!refused.contains("the state of the training run"), "{refused}");
}
