//! Programs bound once to their memory: a run then costs no allocation, no copy and no look-up.
#![allow(unsafe_code, reason = "answers for the addresses of host memory that ONNX Runtime is given")]

mod mirror;
mod table;

use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};

use graph_builder::{DType, TensorSpec};
use half::{bf16, f16};
use indexmap::IndexMap;

use crate::arena::{Arena, ArenaLayout, SharedArena};
use crate::error::{Result, RuntimeError, nearest};
use crate::huge_pages;
use crate::session::Session;
use crate::storage::Storage;
use mirror::Mirrors;
use table::AddressTable;

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
}

/// An arena that a binding's ports lie in.
struct BoundArena {
    arena: SharedArena,
    /// What the arena looked like when it was bound; holding the layout keeps its identity unique.
    layout: Arc<ArenaLayout>,
    start: NonNull<f32>,
    written: bool,
}

enum Guard<'a> {
    Read(RwLockReadGuard<'a, Arena>),
    Write(RwLockWriteGuard<'a, Arena>),
}

impl Guard<'_> {
    fn arena(&self) -> &Arena {
        match self {
            Self::Read(guard) => guard,
            Self::Write(guard) => guard,
        }
    }
}

impl BoundArena {
    fn lock(&self, program: &str) -> Result<Guard<'_>> {
        let stale =
            |reason: &str| RuntimeError::StaleArena { program: program.into(), reason: reason.into() };
        let poisoned = || stale("a thread panicked while it held one of the bound arenas");
        let guard = if self.written {
            let mut arena = self.arena.write().map_err(|_| poisoned())?;
            arena.thaw();
            Guard::Write(arena)
        } else {
            Guard::Read(self.arena.read().map_err(|_| poisoned())?)
        };
        let arena = guard.arena();
        if arena.start() != self.start || !Arc::ptr_eq(arena.layout(), &self.layout) {
            return Err(stale("a bound arena was replaced by another one"));
        }
        Ok(guard)
    }
}

/// Memory behind one input or output.
enum Port {
    /// In an arena, from this element on.
    Arena { arena: usize, offset: usize },
    /// In a buffer of the binding's own.
    Owned(Storage<u8>),
}

/// Chooses the memory of a program's inputs and outputs; see [`Binding`].
pub struct BindingBuilder {
    session: Arc<Session>,
    inputs: IndexMap<String, Port>,
    outputs: IndexMap<String, Port>,
    arenas: Vec<BoundArena>,
}

/// A program with memory for every input and output, ready to run again and again.
///
/// Inputs and outputs that were bound to an arena are read and written in place. The others have buffers of the
/// binding's own, zero at first. A run locks the arenas it reads for reading and the ones it writes for writing, so
/// host code and runs never touch the same memory at the same time. On a GPU each input and output has a copy there,
/// which a run fills before and reads after.
pub struct Binding {
    // Released before the memory that it points into.
    io: AddressTable,
    /// What the program reads and writes when it runs on a GPU.
    mirrors: Option<Mirrors>,
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

impl BindingBuilder {
    /// Lets an f32 input read an arena's entry of the same shape in place.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`], [`RuntimeError::WrongShape`],
    /// [`RuntimeError::Aliased`] when the arena also takes outputs.
    pub fn bind_input_arena(&mut self, input: &str, arena: &SharedArena, entry: &str) -> Result<&mut Self> {
        self.bind(Side::Input, input, arena, entry)
    }

    /// Lets an f32 output be written in place into an arena's entry of the same shape.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`], [`RuntimeError::WrongShape`],
    /// [`RuntimeError::Aliased`] when the arena also feeds inputs, or the entry takes another output.
    pub fn bind_output_arena(&mut self, output: &str, arena: &SharedArena, entry: &str) -> Result<&mut Self> {
        self.bind(Side::Output, output, arena, entry)
    }

    /// Binds every input that has the name of an arena's entry to that entry; returns how many.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_input_arena`].
    pub fn bind_inputs_by_name(&mut self, arena: &SharedArena) -> Result<usize> {
        self.bind_by_name(Side::Input, arena, "")
    }

    /// Binds every output named `prefix` + an arena's entry (`grad.` for gradients) to that entry; returns how many.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_output_arena`].
    pub fn bind_outputs_by_name(&mut self, arena: &SharedArena, prefix: &str) -> Result<usize> {
        self.bind_by_name(Side::Output, arena, prefix)
    }

    /// Gives every input and output that is not bound yet a buffer and hands all addresses to ONNX Runtime.
    ///
    /// # Errors
    /// [`RuntimeError::OutOfMemory`], [`RuntimeError::Ort`].
    pub fn finish(mut self) -> Result<Binding> {
        let session = self.session.clone();
        let io = AddressTable::new(&session)?;
        let mut mirrors = session.gpu().map(Mirrors::new);
        let ordinal = session.gpu().map(|g| g.info().ordinal);
        for (specs, ports, side) in [
            (session.inputs(), &mut self.inputs, Side::Input),
            (session.outputs(), &mut self.outputs, Side::Output),
        ] {
            for spec in specs {
                if !ports.contains_key(&spec.name) {
                    let bytes = spec.shape.numel() * spec.dtype.bytes();
                    ports.insert(spec.name.clone(), Port::Owned(Storage::zeros(bytes, &spec.name)?));
                }
                let address = match &ports[&spec.name] {
                    Port::Owned(buffer) => buffer.start().as_ptr(),
                    // SAFETY: `bind` took the offset from the layout of this very arena.
                    Port::Arena { arena, offset } => unsafe {
                        self.arenas[*arena].start.as_ptr().add(*offset).cast()
                    },
                };
                let address = match &mut mirrors {
                    Some(mirrors) => mirrors.add(side == Side::Input, spec, address)?,
                    None => address,
                };
                // SAFETY: the address is of `spec`'s size and lives as long as the binding: the buffers and the
                // arenas' handles, or the GPU's copies, move into it, and `run` refuses an arena whose memory was exchanged.
                unsafe { io.bind(side == Side::Input, spec, address, ordinal)? };
            }
        }
        let Self { inputs, outputs, mut arenas, .. } = self;
        arenas.sort_by_key(|a| Arc::as_ptr(&a.arena).addr());
        Ok(Binding { io, mirrors, inputs, outputs, arenas, session, runs: 0 })
    }

    fn bind_by_name(&mut self, side: Side, arena: &SharedArena, prefix: &str) -> Result<usize> {
        let layout = lock_for_binding(arena, self.session.name())?.layout().clone();
        let session = self.session.clone();
        let specs = if side == Side::Input { session.inputs() } else { session.outputs() };
        let mut bound = 0;
        for spec in specs {
            if let Some(entry) = spec.name.strip_prefix(prefix).filter(|e| layout.entries().contains_key(*e))
            {
                self.bind(side, &spec.name, arena, entry)?;
                bound += 1;
            }
        }
        Ok(bound)
    }

    fn bind(&mut self, side: Side, name: &str, arena: &SharedArena, entry: &str) -> Result<&mut Self> {
        let spec = find(&self.session, side, name)?;
        let place = || format!("{} `{name}` of program `{}`", side.word(), self.session.name());
        if spec.dtype != DType::F32 {
            return Err(RuntimeError::WrongType {
                place: format!("program `{}`", self.session.name()),
                name: name.to_owned(),
                expected: "f32, as in every arena".to_owned(),
                got: spec.dtype.to_string(),
            });
        }
        let (layout, start) = {
            let arena = lock_for_binding(arena, self.session.name())?;
            (arena.layout().clone(), arena.start())
        };
        let found = layout.entry(entry)?;
        if found.shape != spec.shape {
            return Err(RuntimeError::WrongShape {
                place: format!("the arena for {}", place()),
                name: entry.to_owned(),
                expected: spec.shape.clone(),
                got: found.shape.clone(),
            });
        }
        let aliased = |what: String| RuntimeError::Aliased { program: self.session.name().to_owned(), what };
        let written = side == Side::Output;
        let known = self.arenas.iter().position(|a| Arc::ptr_eq(&a.arena, arena));
        if known.is_some_and(|i| self.arenas[i].written != written) {
            return Err(aliased(format!("{} shares an arena with an {}", place(), other(side).word())));
        }
        let offset = found.offset;
        let taken = |port: &Port| matches!(port, Port::Arena { arena, offset: o } if Some(*arena) == known && *o == offset);
        if written
            && !spec.shape.dims().contains(&0)
            && let Some((twin, _)) = self.outputs.iter().find(|(n, p)| n.as_str() != name && taken(p))
        {
            return Err(aliased(format!("outputs `{twin}` and `{name}` go to one arena entry `{entry}`")));
        }
        let index = known.unwrap_or(self.arenas.len());
        if known.is_none() {
            self.arenas.push(BoundArena { arena: arena.clone(), layout: layout.clone(), start, written });
        }
        let ports = if written { &mut self.outputs } else { &mut self.inputs };
        ports.insert(name.to_owned(), Port::Arena { arena: index, offset });
        Ok(self)
    }
}

impl Binding {
    /// Starts binding a program.
    pub fn builder(session: &Arc<Session>) -> BindingBuilder {
        BindingBuilder {
            session: session.clone(),
            inputs: IndexMap::new(),
            outputs: IndexMap::new(),
            arenas: Vec::new(),
        }
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

    /// Runs the program once.
    ///
    /// # Errors
    /// [`RuntimeError::Run`] with ONNX Runtime's words; [`RuntimeError::StaleArena`].
    pub fn run(&mut self) -> Result<()> {
        let program = self.session.name();
        let guards: Vec<_> = self.arenas.iter().map(|a| a.lock(program)).collect::<Result<_>>()?;
        let session = self.session.lock();
        // SAFETY: every bound address is alive (see `finish`); the guards and `&mut self` give this run exclusive
        // access to what it writes and shared access to what it reads.
        let result = unsafe {
            if let Some(mirrors) = &self.mirrors {
                mirrors.upload()?;
            }
            let result = self.io.run(&session);
            if let (Ok(()), Some(mirrors)) = (&result, &self.mirrors) {
                mirrors.download()?;
            }
            result
        };
        drop(session);
        drop(guards);
        self.runs = self.runs.saturating_add(1);
        if self.runs == SETTLED {
            huge_pages::collapse();
        }
        result.map_err(|e| RuntimeError::Run { program: program.to_owned(), reason: e.to_string() })
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Input => Side::Output,
        Side::Output => Side::Input,
    }
}

fn find<'s>(session: &'s Session, side: Side, name: &str) -> Result<&'s TensorSpec> {
    let specs = if side == Side::Input { session.inputs() } else { session.outputs() };
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

fn lock_for_binding<'a>(arena: &'a SharedArena, program: &str) -> Result<RwLockReadGuard<'a, Arena>> {
    arena.read().map_err(|_| RuntimeError::StaleArena {
        program: program.to_owned(),
        reason: "a thread panicked while it held one of the arenas".to_owned(),
    })
}

#[cfg(test)]
mod tests;
