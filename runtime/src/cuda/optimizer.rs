//! The parameter update on a GPU: the plan's kernels over arenas that stay there.
#![allow(unsafe_code, reason = "queues copies to and from page-locked memory of its own")]

use std::sync::Arc;

use cudarc::driver::CudaEvent;
use graph_builder::DType;

use super::arena::DeviceArena;
use super::gpu::Gpu;
use super::kernels::{
    Address, Arguments, Control, GpuQueue, Launch, Queue, UPDATE, UpdatePlaces, UpdatePlan,
};
use super::memory::DeviceMemory;
use super::pinned::PinnedMemory;
use crate::arena::ArenaLayout;
use crate::error::{Result, RuntimeError};
use crate::update::{UpdateReport, UpdateStep};

/// Gradients of one element type, and the moments of their parameters: three arenas of one layout.
#[derive(Clone, Copy, Debug)]
pub struct GradientGroup<'a> {
    /// The gradients, or their sum over micro-batches.
    pub gradients: &'a DeviceArena,
    /// First moments, f32.
    pub first_moments: &'a DeviceArena,
    /// Second moments, f32.
    pub second_moments: &'a DeviceArena,
}

/// The arenas of an update on a GPU.
#[derive(Clone, Copy, Debug)]
pub struct DeviceUpdate<'a> {
    /// All parameters, f32.
    pub parameters: &'a DeviceArena,
    /// Gradients and moments, in the order of the groups that the update was made for.
    pub groups: &'a [GradientGroup<'a>],
    /// Moving average of the parameters, f32, with its decay.
    pub ema: Option<(&'a DeviceArena, f64)>,
    /// Copy of the parameters in the compute type.
    pub copy: Option<&'a DeviceArena>,
}

/// One group's tables.
#[derive(Debug)]
struct Part {
    plan: UpdatePlan,
    layout: Arc<ArenaLayout>,
    /// For each of its entries the index in the layout of all gradients.
    indices: Vec<usize>,
    pieces: DeviceMemory,
    /// Where its segments begin in the table of all.
    segments_at: usize,
}

/// [`AdamW`](crate::AdamW) on a GPU: the same bits, but for the order in which the gradients' norm is summed.
///
/// Gradients of a program of mixed precision have two element types: each is a group with a layout of its own, and the
/// norm is taken over all groups together.
#[derive(Debug)]
pub struct DeviceAdamW {
    parts: Vec<Part>,
    parameters: ArenaLayout,
    /// The table of all segments, and the page-locked memory that it comes from.
    segments: (DeviceMemory, PinnedMemory),
    /// The table has left the host.
    sent: CudaEvent,
    /// What the last update decided, there and here.
    control: (DeviceMemory, PinnedMemory),
    /// It is here.
    decided: CudaEvent,
    gradient_scale: f64,
    gpu: Arc<Gpu>,
}

impl DeviceAdamW {
    /// Prepares updates of `parameters` by `gradients`, which `groups` divide by element type.
    ///
    /// `epsilons` are those of all gradients in layout order.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongShape`], [`RuntimeError::WrongLength`],
    /// [`RuntimeError::InvalidValue`] for a constant outside its range, [`RuntimeError::GpuOutOfMemory`].
    pub fn new(
        gpu: &Arc<Gpu>,
        parameters: &ArenaLayout,
        gradients: &ArenaLayout,
        groups: &[Arc<ArenaLayout>],
        betas: (f64, f64),
        epsilons: &[f64],
    ) -> Result<Self> {
        // The host's update refuses what cannot be updated.
        let checked = crate::AdamW::new(parameters, gradients, (betas.0, betas.1, 0.0), 1)?;
        checked.with_epsilons(epsilons.to_vec())?;
        let (mut parts, mut segments_at) = (Vec::new(), 0);
        for layout in groups {
            let index = |name: &String| {
                gradients.entry(name).map(|_| gradients.entries().get_index_of(name).unwrap_or_default())
            };
            let indices: Vec<usize> = layout.entries().keys().map(index).collect::<Result<_>>()?;
            let own = indices.iter().map(|&i| epsilons[i]).collect();
            let plan = UpdatePlan::new(parameters, layout, betas, own)?;
            let table: &[u8] = bytemuck::cast_slice(plan.pieces());
            let pieces = DeviceMemory::zeros(gpu, table.len(), "the update's tables")?;
            pieces.upload(0, table)?;
            let count = indices.len();
            parts.push(Part { plan, layout: layout.clone(), indices, pieces, segments_at });
            segments_at += count * Self::SEGMENT;
        }
        let both = |bytes: usize, what: &str| -> Result<(DeviceMemory, PinnedMemory)> {
            Ok((DeviceMemory::zeros(gpu, bytes, what)?, PinnedMemory::zeros(gpu, bytes, what)?))
        };
        let update = Self {
            parts,
            parameters: parameters.clone(),
            segments: both(segments_at, "the update's tables")?,
            sent: gpu.event()?,
            control: both(size_of::<Control>(), "the update's decision")?,
            decided: gpu.event()?,
            gradient_scale: 1.0,
            gpu: gpu.clone(),
        };
        gpu.record(&update.sent, gpu.stream())?;
        gpu.record(&update.decided, gpu.stream())?;
        Ok(update)
    }

    /// Bytes of one entry of the table of segments.
    const SEGMENT: usize = size_of::<super::kernels::Segment>();

    /// Queues one update; [`DeviceAdamW::report`] waits for what it decided. Gradients that are not finite leave everything
    /// as it was.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`], [`RuntimeError::WrongLength`], [`RuntimeError::InvalidValue`],
    /// [`RuntimeError::Kernel`], [`RuntimeError::Cuda`].
    pub fn enqueue(&mut self, state: &DeviceUpdate<'_>, step: &UpdateStep<'_>) -> Result<()> {
        self.check(state)?;
        step.check(self.parts.iter().map(|p| p.indices.len()).sum())?;
        let _turn = self.gpu.turn();
        self.gpu.wait(&self.sent)?;
        for part in &self.parts {
            let pick = |values: &[f64]| part.indices.iter().map(|&i| values[i]).collect::<Vec<f64>>();
            let (lr, weight_decay) = (pick(step.lr), pick(step.weight_decay));
            let own = UpdateStep { lr: &lr, weight_decay: &weight_decay, ..*step };
            let table = part.plan.segments(&own)?;
            let table: &[u8] = bytemuck::cast_slice(&table);
            self.segments.1.as_mut_slice()[part.segments_at..][..table.len()].copy_from_slice(table);
        }
        let stream = self.gpu.stream();
        // SAFETY: the bytes change again only after `sent`, and `drop` waits for everything.
        unsafe { self.segments.0.queue_upload(stream, 0, self.segments.1.as_slice())? };
        self.gpu.record(&self.sent, stream)?;
        let at = |arena: &DeviceArena| Address(arena.address(0));
        let control = Address(self.control.0.address());
        let parts: Vec<(&UpdatePlan, UpdatePlaces)> = self
            .parts
            .iter()
            .zip(state.groups)
            .map(|(part, group)| {
                let segments = Address(self.segments.0.address()).offset(part.segments_at);
                let places = UpdatePlaces {
                    tables: (segments, Address(part.pieces.address())),
                    parameters: at(state.parameters),
                    gradients: (at(group.gradients), group.gradients.dtype()),
                    moments: (at(group.first_moments), at(group.second_moments)),
                    average: state.ema.map(|(arena, decay)| (at(arena), decay)),
                    copy: state.copy.map(|arena| (at(arena), arena.dtype())),
                    control,
                };
                (&part.plan, places)
            })
            .collect();
        UpdatePlan::enqueue_together(&parts, &GpuQueue::new(&self.gpu)?, step)?;
        // SAFETY: the bytes are read only after `decided`, and `drop` waits for everything.
        unsafe { self.control.0.queue_download(0, self.control.1.as_mut_slice())? };
        self.gradient_scale = step.gradient_scale;
        self.gpu.record(&self.decided, stream)
    }

    /// What the last update decided, when it has.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`] with the first failure of what was queued.
    pub fn report(&self) -> Result<UpdateReport> {
        self.gpu.wait(&self.decided)?;
        let control: Control = bytemuck::pod_read_unaligned(self.control.1.as_slice());
        let finite = control.finite != 0;
        let clip_scale = if finite { f64::from(control.scale) / self.gradient_scale } else { 1.0 };
        Ok(UpdateReport { grad_norm: control.grad_norm, clip_scale, finite })
    }

    fn check(&self, state: &DeviceUpdate<'_>) -> Result<()> {
        let expected = self.parts.len();
        if state.groups.len() != expected {
            let what = "the update's groups of gradients".to_owned();
            return Err(RuntimeError::WrongLength { what, expected, got: state.groups.len() });
        }
        let whole = [Some(state.parameters), state.ema.map(|(arena, _)| arena), state.copy];
        let whole = whole.into_iter().flatten().map(|arena| (&self.parameters, arena));
        let groups = self.parts.iter().zip(state.groups).flat_map(|(part, group)| {
            [group.gradients, group.first_moments, group.second_moments].map(|arena| (&*part.layout, arena))
        });
        for (layout, arena) in whole.chain(groups) {
            if layout != &**arena.layout() {
                let (left, right) = (layout.entries().len(), arena.layout().entries().len());
                return Err(RuntimeError::LayoutMismatch { action: "update parameters", left, right });
            }
        }
        Ok(())
    }
}

impl Drop for DeviceAdamW {
    fn drop(&mut self) {
        // Copies of the page-locked memory may be queued; a driver that is shutting down has none.
        drop(self.gpu.synchronize());
    }
}

impl DeviceArena {
    /// Queues `self ← scale · gradients`, or `self ← self + scale · gradients`: the sum over micro-batches, f32 whatever
    /// the gradients are.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`], [`RuntimeError::InvalidValue`] for a sum that is not f32,
    /// [`RuntimeError::Kernel`], [`RuntimeError::Cuda`].
    pub fn accumulate(&self, gradients: &Self, scale: f32, first: bool) -> Result<()> {
        /// Elements of a thread, threads of a block, and blocks at most.
        const GRID: (usize, usize, usize) = (4, 256, 8192);
        let (elements, threads, most) = GRID;
        if self.layout() != gradients.layout() {
            let (left, right) = (self.layout().entries().len(), gradients.layout().entries().len());
            return Err(RuntimeError::LayoutMismatch { action: "add gradients", left, right });
        }
        if self.dtype() != DType::F32 {
            return Err(RuntimeError::InvalidValue {
                what: "the element type of a sum of gradients".to_owned(),
                expected: "f32".to_owned(),
                got: self.dtype().to_string(),
            });
        }
        let count = self.layout().len();
        if count == 0 {
            return Ok(());
        }
        let arguments = Arguments::default().address(Address(gradients.address(0)));
        let arguments = arguments.address(Address(self.address(0))).with(scale).with(u32::from(first));
        GpuQueue::new(self.gpu())?.launch(Launch {
            source: &UPDATE,
            kernel: &format!("accumulate_{}", gradients.dtype()),
            grid: [count.div_ceil(elements * threads).min(most) as u32, 1, 1],
            threads: threads as u32,
            shared_bytes: 0,
            arguments: arguments.with(count as u64),
        })
    }
}
