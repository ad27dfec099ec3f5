//! Programs run on ONNX Runtime through the project's own runtime, one at a time and under a time limit.

use std::panic::resume_unwind;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use graph_builder::{DType, OnnxProgram, TensorSpec};
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use runtime::{Binding, Runtime, RuntimeOptions, Session, SessionOptions, Weights, kernels};

use crate::{Array, Feeds};

/// For one program: loading and running takes milliseconds, so a hang is seen soon and a loaded machine passes.
const LIMIT: Duration = Duration::from_mins(1);
/// For finding ONNX Runtime, which fetches it on a fresh machine.
const FETCH_LIMIT: Duration = Duration::from_mins(10);

/// What a run gave.
#[derive(Debug)]
pub struct Answer {
    /// Outputs by name.
    pub outputs: Feeds,
    /// How often each native kernel ran, in the order of [`kernels::names`].
    pub native_calls: Vec<u64>,
}

impl Answer {
    /// How often the native kernel of an op ran.
    pub fn calls(&self, op: &str) -> u64 {
        kernels::names().iter().position(|n| *n == op).map_or(0, |i| self.native_calls[i])
    }
}

/// Runs `work` on a thread of its own.
///
/// # Panics
/// When it takes longer than `limit`, and when it panics itself.
pub fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (sender, receiver) = channel();
    let worker = thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(limit) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => panic!("{what} took longer than {limit:?}"),
        Err(RecvTimeoutError::Disconnected) => match worker.join() {
            Err(panic) => resume_unwind(panic),
            Ok(()) => panic!("{what} gave no answer"),
        },
    }
}

/// The process's ONNX Runtime; what has to be fetched is said on stderr.
#[allow(clippy::print_stderr, reason = "nothing is fetched silently")]
pub fn onnx_runtime() -> Arc<Runtime> {
    static STARTED: OnceLock<Arc<Runtime>> = OnceLock::new();
    let start = || {
        let options = RuntimeOptions { progress: &|line| eprintln!("{line}"), ..RuntimeOptions::default() };
        Runtime::start(&options).unwrap_or_else(|e| panic!("{e}"))
    };
    STARTED.get_or_init(|| within(FETCH_LIMIT, "starting ONNX Runtime", start)).clone()
}

/// Runs `work` while no other proof uses ONNX Runtime, so that the counters of the kernels tell of it alone.
///
/// # Panics
/// As [`within`].
pub fn alone<T: Send + 'static>(what: &str, work: impl FnOnce(&Arc<Runtime>) -> T + Send + 'static) -> T {
    static TURN: Mutex<()> = Mutex::new(());
    let runtime = onnx_runtime();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    within(LIMIT, what, move || work(&runtime))
}

/// How the proofs load programs.
pub fn options(native_kernels: bool) -> SessionOptions {
    SessionOptions { threads: 2, spinning: false, native_kernels, ..SessionOptions::default() }
}

/// Loads `program`, feeds it and runs it once, with or without the native kernels of the `mudit` ops.
///
/// Every input needs a value.
pub fn run(program: &OnnxProgram, weights: &Weights, feeds: &Feeds, native_kernels: bool) -> Answer {
    let what = format!("running {}", program.name);
    let (program, weights, feeds) = (program.clone(), weights.clone(), feeds.clone());
    alone(&what, move |runtime| execute(runtime, &program, &weights, &feeds, &options(native_kernels)))
}

/// Loads `program`, feeds it and runs it once.
pub fn execute(
    runtime: &Arc<Runtime>,
    program: &OnnxProgram,
    weights: &Weights,
    feeds: &Feeds,
    options: &SessionOptions,
) -> Answer {
    let session = Session::load(runtime, program, weights, options).unwrap_or_else(|e| panic!("{e}"));
    let mut binding = Binding::owned(&session).unwrap_or_else(|e| panic!("{e}"));
    feed(&mut binding, &program.inputs, feeds);
    let counts = || kernels::names().map(kernels::calls);
    let before = counts();
    binding.run().unwrap_or_else(|e| panic!("{e}"));
    let native_calls = counts().iter().zip(before).map(|(after, before)| after - before).collect();
    let outputs = program.outputs.iter().map(|spec| {
        let values = match spec.dtype {
            DType::F32 => widened(binding.output_f32(&spec.name).unwrap(), |v| f64::from(*v)),
            DType::I64 => widened(binding.output::<i64>(&spec.name).unwrap(), |v| *v as f64),
            DType::Bool => widened(binding.output::<u8>(&spec.name).unwrap(), |v| f64::from(*v)),
            DType::F16 => widened(binding.output::<f16>(&spec.name).unwrap(), |v| v.to_f64()),
            DType::Bf16 => widened(binding.output::<bf16>(&spec.name).unwrap(), |v| v.to_f64()),
        };
        (spec.name.clone(), ArrayD::from_shape_vec(IxDyn(spec.shape.dims()), values).unwrap())
    });
    Answer { outputs: outputs.collect(), native_calls }
}

/// Copies values into inputs.
pub fn feed(binding: &mut Binding, inputs: &[TensorSpec], feeds: &Feeds) {
    for spec in inputs {
        let values = feeds.get(&spec.name).unwrap_or_else(|| panic!("no value for `{}`", spec.name));
        assert_eq!(values.shape(), spec.shape.dims(), "shape of `{}`", spec.name);
        let set = match spec.dtype {
            DType::F32 => binding.set_input(&spec.name, &narrowed(values, |v| v as f32)),
            DType::I64 => binding.set_input(&spec.name, &narrowed(values, |v| v as i64)),
            DType::Bool => binding.set_input(&spec.name, &narrowed(values, |v| v as u8)),
            DType::F16 => binding.set_input(&spec.name, &narrowed(values, f16::from_f64)),
            DType::Bf16 => binding.set_input(&spec.name, &narrowed(values, bf16::from_f64)),
        };
        set.unwrap_or_else(|e| panic!("{e}"));
    }
}

fn narrowed<T>(values: &Array, narrow: impl Fn(f64) -> T) -> Vec<T> {
    values.iter().map(|&v| narrow(v)).collect()
}

fn widened<T>(values: &[T], widen: impl Fn(&T) -> f64) -> Vec<f64> {
    values.iter().map(widen).collect()
}

/// An array from the values of a tensor.
pub fn array(shape: &[usize], values: &[f32]) -> Array {
    ArrayD::from_shape_vec(IxDyn(shape), values.iter().map(|&v| f64::from(v)).collect()).unwrap()
}
