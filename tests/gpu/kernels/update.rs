//! The update's kernels against the host's update.

use std::sync::Arc;

use graph_builder::{DType, Shape};
use half::bf16;
use mudit_tests::draws::Draws;
use runtime::cuda::Gpu;
use runtime::cuda::kernels::{Control, GpuQueue, UpdatePlaces, UpdatePlan};
use runtime::update::{UpdateState, UpdateStep, trainable_layout};
use runtime::{AdamW, Arena, ArenaLayout};

use super::memory::Buffer;

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;
const DECAY: f64 = 0.99;

fn layouts() -> (Arc<ArenaLayout>, Arc<ArenaLayout>) {
    // More than one piece; a frozen one; lengths that no access divides.
    let shapes = [("a", vec![20_011]), ("frozen", vec![7]), ("b", vec![3, 5]), ("c", vec![])];
    let parameters = ArenaLayout::new(shapes.map(|(name, dims)| (name.to_owned(), Shape(dims)))).unwrap();
    let gradients = trainable_layout(&parameters, |name, _| name != "frozen").unwrap();
    (Arc::new(parameters), Arc::new(gradients))
}

fn filled(layout: &Arc<ArenaLayout>, draws: &mut Draws, size: f64) -> Arena {
    let mut arena = Arena::zeros(layout.clone()).unwrap();
    for view in arena.views_mut() {
        view.fill_with(|| bf16::from_f64(draws.between(-size, size)).to_f32());
    }
    arena
}

/// The arena as it lies in memory, gaps included.
fn flat(arena: &Arena) -> Vec<f32> {
    let mut all = vec![0.0; arena.layout().len()];
    for (_, entry, view) in arena.iter() {
        all[entry.range()].copy_from_slice(view);
    }
    all
}

struct Device {
    gpu: Arc<Gpu>,
    plan: UpdatePlan,
    buffers: [Buffer; 6],
    control: Buffer,
}

impl Device {
    fn step(&self, gradients: (&Arena, DType), step: &UpdateStep<'_>) -> Control {
        let [parameters, first, second, average, copy, pieces] = &self.buffers;
        let segments = Buffer::of(&self.gpu, &self.plan.segments(step).unwrap());
        let (arena, dtype) = gradients;
        let gradients = Buffer::floats(&self.gpu, dtype, flat(arena).into_iter().map(f64::from));
        let places = UpdatePlaces {
            tables: (segments.at(), pieces.at()),
            parameters: parameters.at(),
            gradients: (gradients.at(), dtype),
            moments: (first.at(), second.at()),
            average: Some((average.at(), DECAY)),
            copy: Some((copy.at(), DType::Bf16)),
            control: self.control.at(),
        };
        self.plan.enqueue(&GpuQueue::new(&self.gpu).unwrap(), &places, step).unwrap();
        self.control.read::<Control>(1)[0]
    }
}

fn same(got: &Buffer, want: &Arena, what: &str) {
    let got = got.read::<f32>(want.layout().len());
    for (name, entry, view) in want.iter() {
        for (i, (got, want)) in got[entry.range()].iter().zip(view).enumerate() {
            assert_eq!(got.to_bits(), want.to_bits(), "{what} of `{name}`, element {i}: {got} and {want}");
        }
    }
}

/// The update has the host's bits, and gradients that are not finite leave everything as it was. `change` as for the ops.
pub(crate) fn update_is_the_hosts(gpu: &Arc<Gpu>, change: &dyn Fn(bool)) {
    let (pl, gl) = layouts();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let mut draws = Draws::new(5);
        let (mut parameters, mut first, mut second) = (
            filled(&pl, &mut draws, 1.0),
            Arena::zeros(gl.clone()).unwrap(),
            Arena::zeros(gl.clone()).unwrap(),
        );
        let mut average = parameters.duplicate().unwrap();
        let host = AdamW::new(&pl, &gl, (BETAS.0, BETAS.1, EPSILON), 1).unwrap();
        let plan = UpdatePlan::new(&pl, &gl, BETAS, vec![EPSILON; 3]).unwrap();
        let pieces = Buffer::of(gpu, plan.pieces());
        let zeros = || Buffer::of(gpu, &vec![0.0_f32; gl.len()]);
        let start = || Buffer::of(gpu, &flat(&parameters));
        let copy = Buffer::of(gpu, &vec![bf16::ZERO; pl.len()]);
        let buffers = [start(), zeros(), zeros(), start(), copy, pieces];
        let device = Device { gpu: gpu.clone(), plan, buffers, control: Buffer::new(gpu, 16) };
        for step in 1..=4 {
            let update = UpdateStep {
                step,
                lr: &[1e-2, 3e-3, 5e-2],
                weight_decay: &[0.0, 0.1, 0.3],
                clip: (step != 2).then_some(1.0),
                gradient_scale: 0.25,
            };
            let gradients = filled(&gl, &mut draws, 1.0);
            let state = UpdateState {
                parameters: &mut parameters,
                gradients: &gradients,
                first_moments: &mut first,
                second_moments: &mut second,
                ema: Some((&mut average, DECAY)),
            };
            let report = host.step(state, &update).unwrap();
            change(step % 2 == 0);
            let control = device.step((&gradients, dtype), &update);
            change(false);
            assert_eq!(control.finite, 1);
            let error = (control.grad_norm - report.grad_norm).abs() / report.grad_norm;
            assert!(error < 1e-14, "norm {} and {}", control.grad_norm, report.grad_norm);
        }
        let [p, m, v, e, c, _] = &device.buffers;
        for (got, want, what) in [
            (p, &parameters, "parameter"),
            (m, &first, "first moment"),
            (v, &second, "second moment"),
            (e, &average, "average"),
        ] {
            same(got, want, what);
        }
        let copies = c.read::<bf16>(pl.len());
        for (name, entry, view) in parameters.iter().filter(|(name, ..)| *name != "frozen") {
            let want: Vec<bf16> = view.iter().map(|&v| bf16::from_f32(v)).collect();
            assert!(copies[entry.range()] == want[..], "the copy of `{name}`");
        }

        let mut gradients = filled(&gl, &mut draws, 1.0);
        gradients.view_mut("b").unwrap()[7] = f32::INFINITY;
        let update = UpdateStep {
            step: 5,
            lr: &[1.0; 3],
            weight_decay: &[0.0; 3],
            clip: Some(1.0),
            gradient_scale: 1.0,
        };
        assert_eq!(device.step((&gradients, dtype), &update).finite, 0);
        same(&device.buffers[0], &parameters, "parameter after a step left out");
        same(&device.buffers[2], &second, "second moment after a step left out");
    }
}
