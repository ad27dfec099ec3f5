//! Choosing the memory of a program's inputs and outputs.
#![allow(unsafe_code, reason = "answers for the addresses of memory that ONNX Runtime is given")]

use std::ptr::NonNull;
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};

use graph_builder::{DType, TensorSpec};
use indexmap::IndexMap;

use super::staging::{Plan, Staging};
use super::table::AddressTable;
use super::{Binding, Side, find, find_typed};
use crate::arena::{Arena, ArenaLayout, SharedArena};
use crate::cuda::kernels::NormalStream;
use crate::cuda::{DeviceArena, Gpu};
use crate::error::{Result, RuntimeError};
use crate::session::Session;
use crate::storage::Storage;

/// An arena that a binding's ports lie in.
pub(super) struct BoundArena {
    pub(super) place: ArenaPlace,
    written: bool,
}

/// Where an arena is.
pub(super) enum ArenaPlace {
    Host {
        arena: SharedArena,
        /// What the arena looked like when it was bound; holding the layout keeps its identity unique.
        layout: Arc<ArenaLayout>,
        start: NonNull<f32>,
    },
    Device(Arc<DeviceArena>),
}

/// The right to use an arena during a run.
pub(super) enum Guard<'a> {
    Read(RwLockReadGuard<'a, Arena>),
    Write(RwLockWriteGuard<'a, Arena>),
    /// Of an arena on the GPU, where the order of the stream does it.
    Queued,
}

impl Guard<'_> {
    /// The arena of the host.
    pub(super) fn arena(&self) -> Option<&Arena> {
        match self {
            Self::Read(guard) => Some(guard),
            Self::Write(guard) => Some(guard),
            Self::Queued => None,
        }
    }

    /// The arena of the host, to be written.
    pub(super) fn arena_mut(&mut self) -> Option<&mut Arena> {
        match self {
            Self::Write(guard) => Some(guard),
            Self::Read(_) | Self::Queued => None,
        }
    }
}

impl BoundArena {
    pub(super) fn lock(&self, program: &str) -> Result<Guard<'_>> {
        let ArenaPlace::Host { arena, layout, start } = &self.place else { return Ok(Guard::Queued) };
        let stale =
            |reason: &str| RuntimeError::StaleArena { program: program.into(), reason: reason.into() };
        let poisoned = || stale("a thread panicked while it held one of the bound arenas");
        let guard = if self.written {
            let mut arena = arena.write().map_err(|_| poisoned())?;
            arena.thaw();
            Guard::Write(arena)
        } else {
            Guard::Read(arena.read().map_err(|_| poisoned())?)
        };
        let same = |a: &Arena| a.start() == *start && Arc::ptr_eq(a.layout(), layout);
        if guard.arena().is_some_and(same) {
            return Ok(guard);
        }
        Err(stale("a bound arena was replaced by another one"))
    }

    /// For an order of locking that all threads share.
    fn key(&self) -> usize {
        match &self.place {
            ArenaPlace::Host { arena, .. } => Arc::as_ptr(arena).addr(),
            ArenaPlace::Device(arena) => Arc::as_ptr(arena).addr(),
        }
    }
}

/// Memory behind one input or output.
pub(super) enum Port {
    /// In an arena, from this element on.
    Arena { arena: usize, offset: usize },
    /// In a buffer of the binding's own.
    Owned(Storage<u8>),
    /// In the blocks for what crosses the bus to a GPU, by its number on its side.
    Staged(usize),
}

/// Chooses the memory of a program's inputs and outputs; see [`Binding`].
pub struct BindingBuilder {
    session: Arc<Session>,
    inputs: IndexMap<String, Port>,
    outputs: IndexMap<String, Port>,
    arenas: Vec<BoundArena>,
    /// Inputs that the GPU can draw.
    drawn: Vec<String>,
}

impl BindingBuilder {
    pub(super) fn new(session: &Arc<Session>) -> Self {
        let session = session.clone();
        let (inputs, outputs) = (IndexMap::new(), IndexMap::new());
        Self { session, inputs, outputs, arenas: Vec::new(), drawn: Vec::new() }
    }

    /// Lets an f32 input read an arena's entry of the same shape in place. On a GPU the input may be narrower: the copy
    /// there is rounded.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`], [`RuntimeError::WrongShape`],
    /// [`RuntimeError::Aliased`] when the arena also takes outputs.
    pub fn bind_input_arena(&mut self, input: &str, arena: &SharedArena, entry: &str) -> Result<&mut Self> {
        self.bind(Side::Input, input, self.on_host(arena)?, entry)
    }

    /// Lets an f32 output be written in place into an arena's entry of the same shape.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`], [`RuntimeError::WrongShape`],
    /// [`RuntimeError::Aliased`] when the arena also feeds inputs, or the entry takes another output.
    pub fn bind_output_arena(&mut self, output: &str, arena: &SharedArena, entry: &str) -> Result<&mut Self> {
        self.bind(Side::Output, output, self.on_host(arena)?, entry)
    }

    /// Binds every input that has the name of an arena's entry to that entry; returns how many.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_input_arena`].
    pub fn bind_inputs_by_name(&mut self, arena: &SharedArena) -> Result<usize> {
        let layout = lock_for_binding(arena, self.session.name())?.layout().clone();
        self.bind_by_name(Side::Input, "", &layout, None, |this| this.on_host(arena))
    }

    /// Binds every output named `prefix` + an arena's entry (`grad.` for gradients) to that entry; returns how many.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_output_arena`].
    pub fn bind_outputs_by_name(&mut self, arena: &SharedArena, prefix: &str) -> Result<usize> {
        let layout = lock_for_binding(arena, self.session.name())?.layout().clone();
        self.bind_by_name(Side::Output, prefix, &layout, None, |this| this.on_host(arena))
    }

    /// Lets an input of a program on a GPU read an entry of an arena there, of the same shape and element type, in place.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_input_arena`]; [`RuntimeError::InvalidValue`] when the program does not run on the
    /// arena's GPU.
    pub fn bind_device_input(
        &mut self,
        input: &str,
        arena: &Arc<DeviceArena>,
        entry: &str,
    ) -> Result<&mut Self> {
        self.bind(Side::Input, input, ArenaPlace::Device(arena.clone()), entry)
    }

    /// Lets an output of a program on a GPU be written in place into an entry of an arena there, of the same shape and
    /// element type.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_output_arena`]; [`RuntimeError::InvalidValue`] when the program does not run on the
    /// arena's GPU.
    pub fn bind_device_output(
        &mut self,
        output: &str,
        arena: &Arc<DeviceArena>,
        entry: &str,
    ) -> Result<&mut Self> {
        self.bind(Side::Output, output, ArenaPlace::Device(arena.clone()), entry)
    }

    /// Binds every input that has the name of an entry, and the element type, of an arena on the GPU; returns how many.
    /// Two arenas of one layout, one in f32 and one in the compute type, so serve a program of mixed precision.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_device_input`].
    pub fn bind_device_inputs_by_name(&mut self, arena: &Arc<DeviceArena>) -> Result<usize> {
        let on_device = |_: &Self| Ok(ArenaPlace::Device(arena.clone()));
        self.bind_by_name(Side::Input, "", arena.layout(), Some(arena.dtype()), on_device)
    }

    /// Binds every output named `prefix` + an entry of an arena on the GPU, and of its element type; returns how many.
    ///
    /// # Errors
    /// As [`BindingBuilder::bind_device_output`].
    pub fn bind_device_outputs_by_name(&mut self, arena: &Arc<DeviceArena>, prefix: &str) -> Result<usize> {
        let on_device = |_: &Self| Ok(ArenaPlace::Device(arena.clone()));
        self.bind_by_name(Side::Output, prefix, arena.layout(), Some(arena.dtype()), on_device)
    }

    /// Lets an f32 input be drawn where the program runs; see [`Binding::draw`]. Returns whether it can be: not on the CPU,
    /// and on a GPU only with this crate's kernels.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`].
    pub fn draw_input(&mut self, input: &str) -> Result<bool> {
        find_typed(&self.session, Side::Input, input, DType::F32)?;
        let rows = find(&self.session, Side::Input, input)?.shape.dims().first().copied().unwrap_or(1);
        let kernels = |gpu: &Arc<Gpu>| gpu.loaded().and_then(|loaded| loaded.require_kernels(gpu)).is_ok();
        let drawn = rows <= NormalStream::MOST && self.session.gpu().is_some_and(kernels);
        if drawn {
            self.drawn.push(input.to_owned());
        }
        Ok(drawn)
    }

    /// Gives every input and output that is not bound yet a buffer and hands all addresses to ONNX Runtime.
    ///
    /// # Errors
    /// [`RuntimeError::OutOfMemory`], [`RuntimeError::GpuOutOfMemory`], [`RuntimeError::Ort`].
    pub fn finish(self) -> Result<Binding> {
        let Self { session, mut inputs, mut outputs, mut arenas, drawn } = self;
        let (io, gpu) = (AddressTable::new(&session)?, session.gpu());
        let mut plan = Plan::default();
        // Streams first and what they stand for last: what does cross the bus lies together.
        let drawn: Vec<&TensorSpec> = session
            .inputs()
            .iter()
            .filter(|s| drawn.contains(&s.name) && !inputs.contains_key(&s.name))
            .collect();
        let streams: Vec<usize> = drawn.iter().map(|spec| plan.add_streams(spec)).collect();
        for (specs, ports, side) in
            [(session.inputs(), &mut inputs, Side::Input), (session.outputs(), &mut outputs, Side::Output)]
        {
            let late = |s: &TensorSpec| side == Side::Input && drawn.iter().any(|d| d.name == s.name);
            let mut own: Vec<_> = specs.iter().filter(|s| !ports.contains_key(&s.name)).collect();
            own.sort_by_key(|s| late(s));
            for spec in own {
                let bytes = spec.shape.numel() * spec.dtype.bytes();
                let port = match gpu {
                    Some(_) => Port::Staged(plan.add(side == Side::Input, spec)),
                    None => Port::Owned(Storage::zeros(bytes, &spec.name)?),
                };
                ports.insert(spec.name.clone(), port);
            }
        }
        for (spec, streams) in drawn.iter().zip(streams) {
            if let Some(Port::Staged(input)) = inputs.get(&spec.name) {
                plan.draw(streams, *input, spec);
            }
        }
        let order = {
            let mut order: Vec<usize> = (0..arenas.len()).collect();
            order.sort_by_key(|&i| arenas[i].key());
            order
        };
        let mut staging = gpu.map(|gpu| Staging::new(gpu, plan, session.name())).transpose()?;
        let ordinal = gpu.map(|g| g.info().ordinal);
        for (specs, ports, side) in
            [(session.inputs(), &inputs, Side::Input), (session.outputs(), &outputs, Side::Output)]
        {
            let input = side == Side::Input;
            for spec in specs {
                let address = match (&ports[&spec.name], &mut staging) {
                    (Port::Staged(port), Some(staging)) => staging.address(input, *port) as *mut u8,
                    (Port::Staged(_), None) => std::ptr::null_mut(),
                    (Port::Owned(buffer), _) => buffer.start().as_ptr(),
                    (Port::Arena { arena, offset }, staging) => match (&arenas[*arena].place, staging) {
                        (ArenaPlace::Device(arena), _) => arena.address(*offset) as *mut u8,
                        (ArenaPlace::Host { .. }, Some(staging)) => {
                            let place = order.iter().position(|i| i == arena).unwrap_or_default();
                            staging.mirror(input, spec, place, *offset)? as *mut u8
                        }
                        // SAFETY: `bind` took the offset from the layout of this very arena.
                        (ArenaPlace::Host { start, .. }, None) => unsafe {
                            start.as_ptr().add(*offset).cast()
                        },
                    },
                };
                // SAFETY: the address is of `spec`'s size and lives as long as the binding: the buffers, the blocks on
                // the GPU and the arenas' handles move into it, and `run` refuses an arena whose memory was exchanged.
                unsafe { io.bind(input, spec, address, ordinal)? };
            }
        }
        arenas.sort_by_key(BoundArena::key);
        Binding::new(io, staging, inputs, outputs, arenas, session)
    }

    fn on_host(&self, arena: &SharedArena) -> Result<ArenaPlace> {
        let locked = lock_for_binding(arena, self.session.name())?;
        let (layout, start) = (locked.layout().clone(), locked.start());
        drop(locked);
        Ok(ArenaPlace::Host { arena: arena.clone(), layout, start })
    }

    fn bind_by_name(
        &mut self,
        side: Side,
        prefix: &str,
        layout: &ArenaLayout,
        dtype: Option<DType>,
        place: impl Fn(&Self) -> Result<ArenaPlace>,
    ) -> Result<usize> {
        let session = self.session.clone();
        let mut bound = 0;
        for spec in side.specs(&session) {
            let entry = spec.name.strip_prefix(prefix).filter(|e| layout.entries().contains_key(*e));
            if let Some(entry) = entry.filter(|_| dtype.is_none_or(|d| d == spec.dtype)) {
                self.bind(side, &spec.name, place(self)?, entry)?;
                bound += 1;
            }
        }
        Ok(bound)
    }

    fn bind(&mut self, side: Side, name: &str, place: ArenaPlace, entry: &str) -> Result<&mut Self> {
        let spec = find(&self.session, side, name)?;
        let words = || format!("{} `{name}` of program `{}`", side.word(), self.session.name());
        self.check_device(&place, &words)?;
        self.check_type(side, spec, &place)?;
        let layout = match &place {
            ArenaPlace::Host { layout, .. } => layout.clone(),
            ArenaPlace::Device(arena) => arena.layout().clone(),
        };
        let found = layout.entry(entry)?;
        if found.shape != spec.shape {
            return Err(RuntimeError::WrongShape {
                place: format!("the arena for {}", words()),
                name: entry.to_owned(),
                expected: spec.shape.clone(),
                got: found.shape.clone(),
            });
        }
        let aliased = |what: String| RuntimeError::Aliased { program: self.session.name().to_owned(), what };
        let bound = BoundArena { place, written: side == Side::Output };
        let known = self.arenas.iter().position(|a| a.key() == bound.key());
        if known.is_some_and(|i| self.arenas[i].written != bound.written) {
            return Err(aliased(format!("{} shares an arena with an {}", words(), side.other().word())));
        }
        let offset = found.offset;
        let taken = |port: &Port| matches!(port, Port::Arena { arena, offset: o } if Some(*arena) == known && *o == offset);
        if bound.written
            && !spec.shape.dims().contains(&0)
            && let Some((twin, _)) = self.outputs.iter().find(|(n, p)| n.as_str() != name && taken(p))
        {
            return Err(aliased(format!("outputs `{twin}` and `{name}` go to one arena entry `{entry}`")));
        }
        let ports = if bound.written { &mut self.outputs } else { &mut self.inputs };
        ports.insert(name.to_owned(), Port::Arena { arena: known.unwrap_or(self.arenas.len()), offset });
        if known.is_none() {
            self.arenas.push(bound);
        }
        Ok(self)
    }

    /// An arena on a GPU serves programs there.
    fn check_device(&self, place: &ArenaPlace, words: &dyn Fn() -> String) -> Result<()> {
        let ArenaPlace::Device(arena) = place else { return Ok(()) };
        if self.session.gpu().is_some_and(|gpu| Arc::ptr_eq(gpu, arena.gpu())) {
            return Ok(());
        }
        let device = |gpu: Option<usize>| gpu.map_or("the CPU".to_owned(), |n| format!("GPU {n}"));
        Err(RuntimeError::InvalidValue {
            what: format!("the place of the arena for {}", words()),
            expected: format!(
                "{}, where the program runs",
                device(self.session.gpu().map(|g| g.info().ordinal))
            ),
            got: device(Some(arena.gpu().info().ordinal)),
        })
    }

    fn check_type(&self, side: Side, spec: &TensorSpec, place: &ArenaPlace) -> Result<()> {
        let (fits, expected) = match place {
            ArenaPlace::Device(arena) => {
                (spec.dtype == arena.dtype(), format!("{}, as in the arena", arena.dtype()))
            }
            ArenaPlace::Host { .. } => {
                // The copy on a GPU is another memory than the arena: it can be rounded.
                let rounded = self.session.gpu().is_some() && side == Side::Input && spec.dtype.is_float();
                (spec.dtype == DType::F32 || rounded, "f32, as in every arena".to_owned())
            }
        };
        if fits {
            return Ok(());
        }
        Err(RuntimeError::WrongType {
            place: format!("program `{}`", self.session.name()),
            name: spec.name.clone(),
            expected,
            got: spec.dtype.to_string(),
        })
    }
}

fn lock_for_binding<'a>(arena: &'a SharedArena, program: &str) -> Result<RwLockReadGuard<'a, Arena>> {
    arena.read().map_err(|_| RuntimeError::StaleArena {
        program: program.to_owned(),
        reason: "a thread panicked while it held one of the arenas".to_owned(),
    })
}
