//! Noise of sampled images on the device: what a step of the sampler or of a server reads is what the host would draw.

use std::sync::Arc;

use models::dit::Dit;
use models::{Guidance, Model, Network, Objective, ProgramKind, ProgramSpec, Solver, SolverKind};
use mudit::built::ProgramSource;
use mudit::execution::{Execution, Placed};
use mudit::sampler::{NoiseSource, Sampler, Settings};
use mudit::serve::batching::stepper::{Recipe, RowProgram, Slot};
use runtime::{Arena, Runtime, RuntimeOptions};
use train_engine::random::{Purpose, Stream};
use train_engine::step::parameter_layout;

use super::counts::Counts;

const SEED: u64 = 0x0123_4567_89ab_cdef;

/// Small, for its kernels run on the host.
fn model() -> Model {
    let model = Model::resolve("DiT-S/4@8x8x4:10").unwrap();
    let Network::Dit(dit) = &model.network;
    let network = Network::Dit(Dit { hidden_size: 32, num_heads: 2, depth: 1, ..dit.clone() });
    Model { network, ..model }
}

/// The model's parameters, all zero, on the device.
fn placed(model: &Model, execution: &Execution) -> Placed {
    let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, 1)).unwrap();
    let parameters = Arena::zeros(parameter_layout(graph.parameters()).unwrap()).unwrap().into_shared();
    Placed::of(&parameters, model, execution).unwrap()
}

fn execution() -> Execution {
    Execution { provider: "cuda".parse().unwrap(), ..Execution::default() }
}

fn onnx_runtime() -> Arc<Runtime> {
    let options = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    Runtime::start(&options).unwrap_or_else(|e| panic!("{e}"))
}

fn normals(streams: impl Iterator<Item = Option<Stream>>, values: usize) -> Vec<u32> {
    let row = |stream: Option<Stream>| {
        let mut row = vec![0.0; values];
        if let Some(mut stream) = stream {
            stream.fill_normal(&mut row);
        }
        row.into_iter().map(f32::to_bits)
    };
    streams.flat_map(row).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// A batch of four for six images: the second one is half full.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn a_samplers_noise_is_drawn_on_the_device() {
    let execution = execution();
    let ddpm = model();
    let Network::Dit(dit) = &ddpm.network;
    let network = Network::Dit(Dit { learn_sigma: false, ..dit.clone() });
    let flow = Model { objective: Objective::Flow, network, ..ddpm };
    for (model, kind, steps) in [(flow, SolverKind::Euler, 1), (model(), SolverKind::Ddpm, 3)] {
        let parameters = placed(&model, &execution);
        let values = model.latent().values();
        let settings = Settings {
            solver: Solver::new(kind, steps),
            guidance: 4.0,
            guided: Guidance::First(3),
            batch: 4,
            execution: execution.clone(),
        };
        let mut sampler = Sampler::new(&onnx_runtime(), &model, &parameters, &settings).unwrap();
        let source = NoiseSource::Seeded { seed: SEED, first: 7 };
        let crossed = Counts::during(|| drop(sampler.run(&[1; 6], source, None, &mut |_| {}).unwrap()));
        // The second batch's last step.
        let rows = |purpose, step| {
            (0..4_u64).map(move |row| (row < 2).then(|| Stream::new(SEED + 7 + 4 + row, purpose, step, 0)))
        };
        let (input, want) = match kind {
            SolverKind::Ddpm => ("noise", rows(Purpose::SampleNoise, steps as u64 - 1)),
            _ => ("x", rows(Purpose::SampleInit, 0)),
        };
        assert_eq!(bits(&sampler.read_input(input).unwrap()), normals(want, values), "{input}");
        // History once a batch, x but for the first step; never noise. The rest is small.
        let images = (2 + 2 * (steps as u64 - 1)) * 4 * values as u64 * 4;
        let rest = crossed.to_device_bytes - images;
        assert!(rest < 2 * steps as u64 * 8 * 256, "{steps} steps: {rest} bytes beside {images}");
    }
}

/// Two guided images and one that is not, of different seeds and steps, one of them without noise; two rows are empty.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn a_servers_noise_is_drawn_on_the_device() {
    let (model, execution) = (model(), execution());
    let recipe = Recipe {
        runtime: onnx_runtime(),
        programs: ProgramSource::Compiled(placed(&model, &execution)),
        guided: Guidance::First(3),
        execution,
        model: model.clone(),
    };
    let values = model.latent().values();
    let mut rows = RowProgram::new(&recipe, 7).unwrap();
    let slot = |kind, seed, guidance, done| {
        let plan = Solver::new(kind, 5).plan(model.objective, model.learns_variance()).unwrap();
        Slot { seed, guidance, done, plan: Arc::new(plan), x: vec![0.5; values], ..Slot::still(1) }
    };
    let mut slots = [
        slot(SolverKind::Ddpm, 11, 4.0, 2),
        slot(SolverKind::Ddim, 12, 1.0, 0),
        slot(SolverKind::Ddpm, 13, 2.0, 3),
    ];
    for made in 0..2_u64 {
        rows.step(&mut slots).unwrap();
        let stream = |seed, step| Some(Stream::new(seed, Purpose::SampleNoise, step + made, 0));
        let want = [stream(11, 2), None, None, stream(13, 3), None, None, None];
        assert_eq!(
            bits(&rows.read_input("noise").unwrap()),
            normals(want.into_iter(), values),
            "step {made}"
        );
    }
}
