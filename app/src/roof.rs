//! What this machine can do at best, measured: the yardstick of every profile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use graph_builder::{Builder, DType, Type, Weights};
use runtime::{Binding, Runtime, Session, SessionOptions};
use serde::Serialize;

/// Sides of the square products that are tried.
const SIDES: [usize; 2] = [768, 1024];
/// Values of each of the three arrays of the memory probe: far more than any cache holds.
const PROBE: usize = 32 << 20;

/// The fastest rates of this machine, by the means of this program.
#[derive(Clone, Debug, Serialize)]
pub struct Roof {
    /// Of a large f32 matrix product, in 10⁹ floating-point operations a second, two a multiply-add.
    pub gflops_per_s: f64,
    /// Which product that was.
    pub product: String,
    /// Of `a = b + s·c` over arrays that no cache holds, in 10⁹ bytes a second, read and written.
    pub gb_per_s: f64,
    /// Threads that worked.
    pub threads: usize,
}

/// Measures for about `budget`; `threads` 0 is one a core.
///
/// # Errors
/// A session that does not load or run.
pub fn measure(runtime: &Arc<Runtime>, threads: usize, budget: Duration) -> anyhow::Result<Roof> {
    let (mut best, mut product) = (0.0, String::new());
    for (side, product_of) in SIDES.into_iter().flat_map(|side| Product::ALL.map(|p| (side, p))) {
        let rate = product_rate(runtime, product_of, side, threads, budget / 8)?;
        if rate > best {
            (best, product) = (rate, format!("{} {side} × {side} × {side}", product_of.name()));
        }
    }
    let workers = if threads > 0 {
        threads
    } else {
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
    };
    Ok(Roof { gflops_per_s: best, product, gb_per_s: memory_rate(workers, budget / 4), threads: workers })
}

/// The matrix products that a program can be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Product {
    /// ONNX Runtime's own.
    MatMul,
    /// The native kernel of linear layers.
    Linear,
}

impl Product {
    const ALL: [Self; 2] = [Self::MatMul, Self::Linear];

    fn name(self) -> &'static str {
        match self {
            Self::MatMul => "ONNX Runtime's MatMul",
            Self::Linear => "mudit's Linear",
        }
    }
}

/// Rate of a square product, the best of several runs, in GFLOP/s.
fn product_rate(
    runtime: &Arc<Runtime>,
    product: Product,
    side: usize,
    threads: usize,
    budget: Duration,
) -> anyhow::Result<f64> {
    let b = Builder::new("product");
    let square = || Type::f32([side, side]);
    let (left, right) = (b.input("left", square()), b.input("right", square()));
    let out = match product {
        Product::MatMul => left.matmul(right),
        Product::Linear => left.linear(right, b.constant(DType::F32, [side], vec![0.0])),
    };
    b.output("out", out);
    let program = b.finish()?.emit(Weights::Inputs)?;
    let options = SessionOptions { threads, ..SessionOptions::default() };
    let session = Session::load(runtime, &program, &runtime::Weights::Inside, &options)?;
    let mut binding = Binding::owned(&session)?;
    for name in ["left", "right"] {
        binding.input_f32(name)?.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 17) as f32 - 8.0);
    }
    binding.run()?;
    let best = best_seconds(budget, || binding.run())?;
    Ok(2.0 * (side as f64).powi(3) / best / 1e9)
}

/// Rate of `a = b + s·c`, the best of several runs, in GB/s.
fn memory_rate(threads: usize, budget: Duration) -> f64 {
    let (mut a, b, c) = (vec![0.0_f32; PROBE], vec![1.0_f32; PROBE], vec![2.0_f32; PROBE]);
    let part = PROBE.div_ceil(threads);
    let best = best_seconds(budget, || {
        std::thread::scope(|scope| {
            for ((a, b), c) in a.chunks_mut(part).zip(b.chunks(part)).zip(c.chunks(part)) {
                scope.spawn(move || {
                    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
                        *a = b + 3.0 * c;
                    }
                });
            }
        });
        Ok::<(), std::convert::Infallible>(())
    });
    std::hint::black_box(&a);
    best.map_or(0.0, |seconds| (3 * PROBE * size_of::<f32>()) as f64 / seconds / 1e9)
}

/// The shortest of at least three runs and of as many as fit into `budget`.
fn best_seconds<E>(budget: Duration, mut run: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let (start, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
    while runs < 3 || start.elapsed() < budget {
        let began = Instant::now();
        run()?;
        best = best.min(began.elapsed().as_secs_f64());
        runs += 1;
    }
    Ok(best)
}
