//! Programs bound once to their memory: a run then costs no allocation, no copy and no look-up.
#![allow(unsafe_code, reason = "runs programs on memory that it answers for")]

mod builder;
mod staging;
mod table;

use std::fmt;
use std::sync::Arc;

use graph_builder::{DType, TensorSpec};
use half::{bf16, f16};
use indexmap::IndexMap;

pub use builder::BindingBuilder;

use crate::cuda::kernels::NormalStream;
use crate::error::{Result, RuntimeError, nearest};
use crate::huge_pages;
use crate::session::Session;
use builder::{BoundArena, Guard, Port};
use staging::Staging;
use table::{AddressTable, RunOptions};

/// An element type that host code can read and write in a binding's buffers.
pub trait Element: bytemuck::Pod + sealed::Sealed {
    /// The type in a program's signature.
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}
elements!(f32 => F32, f16 => F16, bf16 => Bf16, i64 => I64, u8 => Bool);

/// Which side of a program a name is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Input,
    Output,
}

impl Side {
    fn word(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Output => "output",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Input => Self::Output,
            Self::Output => Self::Input,
        }
    }

    fn specs(self, session: &Session) -> &[TensorSpec] {
        match self {
            Self::Input => session.inputs(),
            Self::Output => session.outputs(),
        }
    }
}

/// A program with memory for every input and output, ready to run again and again.
///
/// Inputs and outputs that were bound to an arena are read and written in place. The others have buffers of the
/// binding's own, zero at first. A run locks the host's arenas it reads for reading and the ones it writes for writing, so
/// host code and runs never touch the same memory at the same time.
///
/// On a GPU, arenas there are used in place too. The other ports cross the bus: those in buffers of the binding's own
/// with one copy in each direction, if the host has changed an input since the last run; those in arenas of the host
/// when the arena has changed. All addresses that the program sees stay the same.
pub struct Binding {
    // Released before the memory that it points into.
    io: AddressTable,
    options: Option<RunOptions>,
    /// What crosses the bus to a GPU.
    staging: Option<Staging>,
    inputs: IndexMap<String, Port>,
    outputs: IndexMap<String, Port>,
    /// In address order, so that runs on several threads lock in one order.
    arenas: Vec<BoundArena>,
    session: Arc<Session>,
    runs: u32,
}

/// Run after which a session's buffers stay where they are: the first measures them, the second lays them out.
const SETTLED: u32 = 2;

// SAFETY: the pointers inside point to memory that the binding owns or keeps alive; ONNX Runtime's binding object
// has no ties to a thread.
unsafe impl Send for Binding {}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Binding").field("session", &self.session).finish_non_exhaustive()
    }
}

impl Binding {
    /// Starts binding a program.
    pub fn builder(session: &Arc<Session>) -> BindingBuilder {
        BindingBuilder::new(session)
    }

    fn new(
        io: AddressTable,
        staging: Option<Staging>,
        inputs: IndexMap<String, Port>,
        outputs: IndexMap<String, Port>,
        arenas: Vec<BoundArena>,
        session: Arc<Session>,
    ) -> Result<Self> {
        let options = session.gpu().map(|_| RunOptions::queued(session.next_graph()?)).transpose()?;
        Ok(Self { io, options, staging, inputs, outputs, arenas, session, runs: 0 })
    }

    /// A binding in which every input and output has a buffer of its own.
    ///
    /// # Errors
    /// As [`BindingBuilder::finish`].
    pub fn owned(session: &Arc<Session>) -> Result<Self> {
        Self::builder(session).finish()
    }

    /// The program.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The buffer of an input, to be filled before a run.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`], [`RuntimeError::BoundToArena`].
    pub fn input<T: Element>(&mut self, name: &str) -> Result<&mut [T]> {
        find_typed(&self.session, Side::Input, name, T::DTYPE)?;
        match self.inputs.get_mut(name) {
            Some(Port::Owned(buffer)) => Ok(bytemuck::cast_slice_mut(buffer.as_mut_slice())),
            Some(Port::Staged(port)) if let Some(staging) = &mut self.staging => {
                Ok(bytemuck::cast_slice_mut(staging.input(*port)?))
            }
            _ => Err(bound_to_arena(&self.session, Side::Input, name)),
        }
    }

    /// The buffer of an output, as the last run left it; zeros before the first.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`], [`RuntimeError::BoundToArena`].
    pub fn output<T: Element>(&self, name: &str) -> Result<&[T]> {
        find_typed(&self.session, Side::Output, name, T::DTYPE)?;
        match self.outputs.get(name) {
            Some(Port::Owned(buffer)) => Ok(bytemuck::cast_slice(buffer.as_slice())),
            Some(Port::Staged(port)) if let Some(staging) = &self.staging => {
                Ok(bytemuck::cast_slice(staging.output(*port)?))
            }
            _ => Err(bound_to_arena(&self.session, Side::Output, name)),
        }
    }

    /// [`Binding::input`] of f32 values.
    ///
    /// # Errors
    /// As [`Binding::input`].
    pub fn input_f32(&mut self, name: &str) -> Result<&mut [f32]> {
        self.input(name)
    }

    /// [`Binding::input`] of i64 values.
    ///
    /// # Errors
    /// As [`Binding::input`].
    pub fn input_i64(&mut self, name: &str) -> Result<&mut [i64]> {
        self.input(name)
    }

    /// [`Binding::output`] of f32 values.
    ///
    /// # Errors
    /// As [`Binding::output`].
    pub fn output_f32(&self, name: &str) -> Result<&[f32]> {
        self.output(name)
    }

    /// Copies values into an input's buffer.
    ///
    /// # Errors
    /// As [`Binding::input`], and [`RuntimeError::WrongLength`].
    pub fn set_input<T: Element>(&mut self, name: &str, values: &[T]) -> Result<()> {
        let what = || format!("input `{name}` of program `{}`", self.session.name());
        let expected = find(&self.session, Side::Input, name)?.shape.numel();
        if values.len() != expected {
            return Err(RuntimeError::WrongLength { what: what(), expected, got: values.len() });
        }
        self.input(name)?.copy_from_slice(values);
        Ok(())
    }

    /// Whether the GPU can draw an input; see [`BindingBuilder::draw_input`].
    pub fn draws(&self, name: &str) -> bool {
        match (self.inputs.get(name), &self.staging) {
            (Some(Port::Staged(port)), Some(staging)) => staging.draws(*port),
            _ => false,
        }
    }

    /// Lets the GPU fill an input's rows with normal draws ahead of the next run, a stream a row: the streams cross the bus,
    /// the values do not. They have the bits that the host would draw. What comes last counts, this or the host's values.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::InvalidValue`] for an input that is not drawn there,
    /// [`RuntimeError::WrongLength`] when there are not as many streams as rows, [`RuntimeError::Cuda`].
    pub fn draw(&mut self, name: &str, streams: &[NormalStream]) -> Result<()> {
        find(&self.session, Side::Input, name)?;
        let what = || format!("input `{name}` of program `{}`", self.session.name());
        match (self.inputs.get(name), &mut self.staging) {
            (Some(Port::Staged(port)), Some(staging)) if staging.draws(*port) => {
                match staging.draw(*port, streams)? {
                    None => Ok(()),
                    Some(expected) => Err(RuntimeError::WrongLength {
                        what: format!("streams for {}", what()),
                        expected,
                        got: streams.len(),
                    }),
                }
            }
            _ => Err(RuntimeError::InvalidValue {
                what: what(),
                expected: "one that the GPU draws".to_owned(),
                got: "one that the host fills".to_owned(),
            }),
        }
    }

    /// A copy of an input's values in the program's memory, which the last run has read.
    ///
    /// # Errors
    /// As [`Binding::input`]; [`RuntimeError::Cuda`].
    pub fn read_input<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        find_typed(&self.session, Side::Input, name, T::DTYPE)?;
        match (self.inputs.get(name), &self.staging) {
            (Some(Port::Owned(buffer)), _) => Ok(bytemuck::cast_slice(buffer.as_slice()).to_vec()),
            (Some(Port::Staged(port)), Some(staging)) => {
                let bytes = staging.read(*port)?;
                Ok(bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
            }
            _ => Err(bound_to_arena(&self.session, Side::Input, name)),
        }
    }

    /// Sends the inputs that have changed ahead of the next run, on a GPU while the last one may still go on. The host may
    /// fill them again at once: it then waits for the copy, not for the run. On the CPU there is nothing to do.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`], [`RuntimeError::GpuOutOfMemory`].
    pub fn send_ahead(&mut self) -> Result<()> {
        self.staging.as_mut().map_or(Ok(()), Staging::send_ahead)
    }

    /// Runs the program once, and waits for its outputs.
    ///
    /// # Errors
    /// [`RuntimeError::Run`] with ONNX Runtime's words; [`RuntimeError::StaleArena`];
    /// [`RuntimeError::GpuOutOfMemory`], [`RuntimeError::Cuda`].
    pub fn run(&mut self) -> Result<()> {
        self.enqueue()?;
        self.wait()
    }

    /// Queues one run on a GPU's stream: what is queued there later sees its outputs, and [`Binding::output`] waits for
    /// them. On the CPU this is [`Binding::run`].
    ///
    /// # Errors
    /// As [`Binding::run`].
    pub fn enqueue(&mut self) -> Result<()> {
        let Self { io, options, staging, arenas, session, .. } = self;
        let program = session.name();
        let mut guards: Vec<Guard<'_>> = arenas.iter().map(|a| a.lock(program)).collect::<Result<_>>()?;
        let turn = session.gpu().map(|gpu| gpu.turn());
        if let Some(staging) = staging.as_mut() {
            let empty: (&[f32], u64) = (&[], 0);
            staging.send(|i| guards[i].arena().map_or(empty, |a| (a.as_slice(), a.version())))?;
        }
        let locked = session.lock();
        // SAFETY: every bound address is alive (see `finish`); the guards and `&mut self` give this run exclusive
        // access to what it writes and shared access to what it reads; on a GPU the order of the stream does, and all
        // that is dropped or read by the host waits for it.
        let result = unsafe { io.run(&locked, options.as_ref()) };
        drop(locked);
        let fetched = match staging.as_mut().filter(|_| result.is_ok()) {
            Some(staging) => staging.fetch(),
            None => Ok(()),
        };
        drop(turn);
        fetched?;
        if let Some(staging) = staging.as_ref().filter(|_| result.is_ok()) {
            staging.fetch_arenas(|i, at, values| {
                if let Some(arena) = guards[i].arena_mut() {
                    arena.as_mut_slice()[at..at + values.len()].copy_from_slice(values);
                }
            })?;
        }
        drop(guards);
        self.runs = self.runs.saturating_add(1);
        if self.runs == SETTLED && self.staging.is_none() {
            huge_pages::collapse();
        }
        result.map_err(|e| self.session.run_error(&e))
    }

    /// Waits until the outputs of the last run are there.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`] with the first failure of what was queued.
    pub fn wait(&self) -> Result<()> {
        self.staging.as_ref().map_or(Ok(()), Staging::wait)
    }
}

fn find<'s>(session: &'s Session, side: Side, name: &str) -> Result<&'s TensorSpec> {
    let specs = side.specs(session);
    specs.iter().find(|s| s.name == name).ok_or_else(|| RuntimeError::UnknownName {
        kind: side.word(),
        place: format!("program `{}`", session.name()),
        name: name.to_owned(),
        nearest: nearest(name, specs.iter().map(|s| s.name.as_str())),
    })
}

fn find_typed(session: &Session, side: Side, name: &str, dtype: DType) -> Result<()> {
    let spec = find(session, side, name)?;
    if spec.dtype == dtype {
        return Ok(());
    }
    Err(RuntimeError::WrongType {
        place: format!("the {}s of program `{}`", side.word(), session.name()),
        name: name.to_owned(),
        expected: dtype.to_string(),
        got: spec.dtype.to_string(),
    })
}

fn bound_to_arena(session: &Session, side: Side, name: &str) -> RuntimeError {
    RuntimeError::BoundToArena {
        program: session.name().to_owned(),
        side: side.word(),
        name: name.to_owned(),
    }
}

#[cfg(test)]
mod tests;
