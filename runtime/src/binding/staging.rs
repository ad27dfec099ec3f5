//! What crosses the bus to a program on a GPU: its small inputs and outputs, and arenas of the host.
#![allow(unsafe_code, reason = "queues copies to and from memory of the host")]

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaEvent;
use graph_builder::{DType, TensorSpec};
use half::{bf16, f16};

use crate::cuda::kernels::{Address, GpuQueue, NormalStream, draw_normal};
use crate::cuda::{DeviceMemory, Gpu, PinnedMemory};
use crate::error::Result;

/// Alignment of the ports in a block, in bytes: that of the driver's own allocations.
const ALIGNMENT: usize = 256;

/// Where the newest value of an input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Newest {
    /// In the program's memory, or on the way there.
    Program,
    /// In the block for the next run.
    Ahead,
    /// On the host alone.
    Host,
}

/// A copy out of the pinned block that may still be going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    Ahead,
    Direct,
}

#[derive(Debug)]
struct Input {
    range: Range<usize>,
    newest: Newest,
    copying: Option<Copying>,
}

/// An input that the GPU can draw by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawn {
    /// The input's number, and that of the [`NormalStream`]s of its rows, which cross the bus in its place.
    input: usize,
    streams: usize,
    /// Rows, and values of one.
    size: (usize, usize),
}

/// The entry of an arena of the host, with its copy on the GPU.
#[derive(Debug)]
struct Mirror {
    arena: usize,
    elements: Range<usize>,
    dtype: DType,
    memory: DeviceMemory,
    /// The arena's version when it was copied.
    copied: Option<u64>,
}

/// Blocks and events of one binding.
///
/// Inputs lie in one page-locked block of the host and, at the same offsets, in one block that the program reads, whose
/// address never changes. A second block takes the next run's inputs on the stream for transfers while the program runs;
/// they move over on the GPU. Outputs likewise lie in one block each: a run copies once in each direction.
#[derive(Debug)]
pub(super) struct Staging {
    inputs: Vec<Input>,
    outputs: Vec<Range<usize>>,
    drawn: Vec<Drawn>,
    mirrored_inputs: Vec<Mirror>,
    mirrored_outputs: Vec<Mirror>,
    host_inputs: PinnedMemory,
    host_outputs: PinnedMemory,
    device_inputs: DeviceMemory,
    device_outputs: DeviceMemory,
    /// Made when it is first needed.
    ahead: Option<DeviceMemory>,
    /// The block for the next run is filled.
    filled: CudaEvent,
    /// It is emptied.
    emptied: CudaEvent,
    /// Inputs that did not go ahead are on the GPU.
    direct: CudaEvent,
    /// The outputs of the last run are on the host.
    done: CudaEvent,
    gpu: Arc<Gpu>,
}

/// The places of the ports, before there is memory for them.
#[derive(Debug, Default)]
pub(super) struct Plan {
    inputs: Vec<Range<usize>>,
    outputs: Vec<Range<usize>>,
    drawn: Vec<Drawn>,
}

impl Plan {
    /// Gives a port a place; returns its number on its side.
    pub(super) fn add(&mut self, input: bool, spec: &TensorSpec) -> usize {
        self.place(input, spec.shape.numel() * spec.dtype.bytes())
    }

    /// Gives the streams of an input that the GPU can draw a place, ahead of the input's own; returns their number.
    pub(super) fn add_streams(&mut self, spec: &TensorSpec) -> usize {
        let rows = spec.shape.dims().first().copied().unwrap_or(1);
        self.place(true, rows * size_of::<NormalStream>())
    }

    /// The same, for an input that has a place: it is drawn when its streams are new.
    pub(super) fn draw(&mut self, streams: usize, input: usize, spec: &TensorSpec) {
        let rows = spec.shape.dims().first().copied().unwrap_or(1);
        let size = (rows, spec.shape.numel() / rows.max(1));
        self.drawn.push(Drawn { input, streams, size });
    }

    fn place(&mut self, input: bool, bytes: usize) -> usize {
        let side = if input { &mut self.inputs } else { &mut self.outputs };
        let start = end(side).next_multiple_of(ALIGNMENT);
        side.push(start..start + bytes);
        side.len() - 1
    }
}

fn end(ranges: &[Range<usize>]) -> usize {
    ranges.last().map_or(0, |r| r.end)
}

impl Staging {
    /// Memory for all ports of a plan, zero at first.
    ///
    /// # Errors
    /// [`GpuOutOfMemory`](crate::RuntimeError::GpuOutOfMemory), [`OutOfMemory`](crate::RuntimeError::OutOfMemory).
    pub(super) fn new(gpu: &Arc<Gpu>, plan: Plan, program: &str) -> Result<Self> {
        let (inputs, outputs) = (format!("inputs of `{program}`"), format!("outputs of `{program}`"));
        let input =
            |range: &Range<usize>| Input { range: range.clone(), newest: Newest::Program, copying: None };
        let staging = Self {
            inputs: plan.inputs.iter().map(input).collect(),
            host_inputs: PinnedMemory::zeros(gpu, end(&plan.inputs), &inputs)?,
            host_outputs: PinnedMemory::zeros(gpu, end(&plan.outputs), &outputs)?,
            device_inputs: DeviceMemory::zeros(gpu, end(&plan.inputs), &inputs)?,
            device_outputs: DeviceMemory::zeros(gpu, end(&plan.outputs), &outputs)?,
            outputs: plan.outputs,
            drawn: plan.drawn,
            mirrored_inputs: Vec::new(),
            mirrored_outputs: Vec::new(),
            ahead: None,
            filled: gpu.event()?,
            emptied: gpu.event()?,
            direct: gpu.event()?,
            done: gpu.event()?,
            gpu: gpu.clone(),
        };
        // Neither stream waits for what has never been.
        gpu.record(&staging.emptied, gpu.stream())?;
        gpu.record(&staging.done, gpu.stream())?;
        Ok(staging)
    }

    /// The GPU's address of a port.
    pub(super) fn address(&self, input: bool, port: usize) -> u64 {
        let (memory, range) = if input {
            (&self.device_inputs, &self.inputs[port].range)
        } else {
            (&self.device_outputs, &self.outputs[port])
        };
        memory.address() + range.start as u64
    }

    /// Gives an entry of an arena of the host a copy on the GPU, of the port's element type; returns its address.
    pub(super) fn mirror(
        &mut self,
        input: bool,
        spec: &TensorSpec,
        arena: usize,
        offset: usize,
    ) -> Result<u64> {
        let elements = offset..offset + spec.shape.numel();
        let bytes = elements.len() * spec.dtype.bytes();
        let memory = DeviceMemory::zeros(&self.gpu, bytes, &format!("`{}`", spec.name))?;
        let address = memory.address();
        let side = if input { &mut self.mirrored_inputs } else { &mut self.mirrored_outputs };
        side.push(Mirror { arena, elements, dtype: spec.dtype, memory, copied: None });
        Ok(address)
    }

    /// Whether the GPU can draw an input.
    pub(super) fn draws(&self, port: usize) -> bool {
        self.drawn.iter().any(|d| d.input == port)
    }

    /// Lets the GPU draw an input ahead of the next run, a stream a row; gives the number of rows where there are not as
    /// many streams.
    pub(super) fn draw(&mut self, port: usize, streams: &[NormalStream]) -> Result<Option<usize>> {
        let Some(drawn) = self.drawn.iter().find(|d| d.input == port).copied() else { return Ok(Some(0)) };
        if streams.len() != drawn.size.0 {
            return Ok(Some(drawn.size.0));
        }
        self.input(drawn.streams)?.copy_from_slice(bytemuck::cast_slice(streams));
        // What the host may have put there is not wanted any more.
        self.inputs[port].newest = Newest::Program;
        Ok(None)
    }

    /// An input's values as the program would read them now.
    pub(super) fn read(&self, port: usize) -> Result<Vec<u8>> {
        let range = self.inputs[port].range.clone();
        let mut bytes = vec![0; range.len()];
        self.device_inputs.download(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// An input's bytes on the host, to be filled for the next run.
    pub(super) fn input(&mut self, port: usize) -> Result<&mut [u8]> {
        if let Some(streams) = self.drawn.iter().find(|d| d.input == port).map(|d| d.streams) {
            self.inputs[streams].newest = Newest::Program;
        }
        if let Some(copying) = self.inputs[port].copying {
            self.gpu.wait(if copying == Copying::Ahead { &self.filled } else { &self.direct })?;
            for input in &mut self.inputs {
                input.copying = input.copying.filter(|c| *c != copying);
            }
        }
        let input = &mut self.inputs[port];
        input.newest = Newest::Host;
        Ok(&mut self.host_inputs.as_mut_slice()[input.range.clone()])
    }

    /// An output's bytes on the host, when the last run is done.
    pub(super) fn output(&self, port: usize) -> Result<&[u8]> {
        self.wait()?;
        Ok(&self.host_outputs.as_slice()[self.outputs[port].clone()])
    }

    /// Waits for the outputs of the last run.
    pub(super) fn wait(&self) -> Result<()> {
        self.gpu.wait(&self.done)
    }

    /// Queues bringing the new inputs to the block for the next run, on the stream for transfers.
    pub(super) fn send_ahead(&mut self) -> Result<()> {
        let new = runs(&self.inputs, Newest::Host);
        if new.is_empty() {
            return Ok(());
        }
        let _turn = self.gpu.turn();
        if self.ahead.is_none() {
            let block = DeviceMemory::zeros(&self.gpu, end_of(&self.inputs), "the next run's inputs")?;
            // It was cleared on the other stream.
            self.gpu.record(&self.emptied, self.gpu.stream())?;
            self.ahead = Some(block);
        }
        let Some(ahead) = &self.ahead else { return Ok(()) };
        self.gpu.order(self.gpu.transfers(), &self.emptied)?;
        for range in new {
            let bytes = &self.host_inputs.as_slice()[range.clone()];
            // SAFETY: `input` waits for `filled` before it gives these bytes out, and `drop` waits for everything.
            unsafe { ahead.queue_upload(self.gpu.transfers(), range.start, bytes)? };
        }
        self.gpu.record(&self.filled, self.gpu.transfers())?;
        for input in self.inputs.iter_mut().filter(|i| i.newest == Newest::Host) {
            (input.newest, input.copying) = (Newest::Ahead, Some(Copying::Ahead));
        }
        Ok(())
    }

    /// Queues bringing every new input to the program; `arena` gives the values and the version of an arena of the host.
    pub(super) fn send<'a>(&mut self, arena: impl Fn(usize) -> (&'a [f32], u64)) -> Result<()> {
        let new = |d: &&Drawn| self.inputs[d.streams].newest != Newest::Program;
        let drawn: Vec<Drawn> = self.drawn.iter().filter(new).copied().collect();
        let moved = runs(&self.inputs, Newest::Ahead);
        if let Some(ahead) = self.ahead.as_ref().filter(|_| !moved.is_empty()) {
            self.gpu.order(self.gpu.stream(), &self.filled)?;
            for range in moved {
                self.device_inputs.copy_range(range.start, ahead, range)?;
            }
            self.gpu.record(&self.emptied, self.gpu.stream())?;
        }
        let new = runs(&self.inputs, Newest::Host);
        for range in &new {
            let bytes = &self.host_inputs.as_slice()[range.clone()];
            // SAFETY: `input` waits for `direct` before it gives these bytes out, and `drop` waits for everything.
            unsafe { self.device_inputs.queue_upload(self.gpu.stream(), range.start, bytes)? };
        }
        if !new.is_empty() {
            self.gpu.record(&self.direct, self.gpu.stream())?;
        }
        for input in &mut self.inputs {
            if input.newest == Newest::Host {
                input.copying = Some(Copying::Direct);
            }
            input.newest = Newest::Program;
        }
        for Drawn { input, streams, size } in drawn {
            let (streams, input) = (Address(self.address(true, streams)), Address(self.address(true, input)));
            draw_normal(&GpuQueue::new(&self.gpu)?, streams, input, size)?;
        }
        for mirror in &mut self.mirrored_inputs {
            let (values, version) = arena(mirror.arena);
            if mirror.copied != Some(version) {
                let values = &values[mirror.elements.clone()];
                match mirror.dtype {
                    DType::Bf16 => {
                        let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                        mirror.memory.upload(0, bytemuck::cast_slice(&rounded))?;
                    }
                    DType::F16 => {
                        let rounded: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
                        mirror.memory.upload(0, bytemuck::cast_slice(&rounded))?;
                    }
                    _ => mirror.memory.upload(0, bytemuck::cast_slice(values))?,
                }
                mirror.copied = Some(version);
            }
        }
        Ok(())
    }

    /// Queues bringing the outputs to the host.
    pub(super) fn fetch(&mut self) -> Result<()> {
        if !self.outputs.is_empty() {
            // SAFETY: `output` waits for `done` before it gives these bytes out, and `drop` waits for everything.
            unsafe { self.device_outputs.queue_download(0, self.host_outputs.as_mut_slice())? };
        }
        self.gpu.record(&self.done, self.gpu.stream())
    }

    /// Brings the outputs to arenas of the host, and waits: `arena` writes to the elements from an offset on.
    pub(super) fn fetch_arenas(&self, mut arena: impl FnMut(usize, usize, &[f32])) -> Result<()> {
        for mirror in &self.mirrored_outputs {
            let mut values = vec![0.0_f32; mirror.elements.len()];
            mirror.memory.download(0, bytemuck::cast_slice_mut(&mut values))?;
            arena(mirror.arena, mirror.elements.start, &values);
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Copies of this block may be queued; a driver that is shutting down has none.
        drop(self.wait().and_then(|()| self.gpu.wait(&self.filled)));
        drop(self.gpu.wait(&self.direct));
    }
}

fn end_of(inputs: &[Input]) -> usize {
    inputs.last().map_or(0, |i| i.range.end)
}

/// The bytes of the inputs whose newest value is at `place`; neighbours go together.
fn runs(inputs: &[Input], place: Newest) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut neighbour = false;
    for input in inputs {
        match runs.last_mut().filter(|_| neighbour) {
            Some(run) if input.newest == place => run.end = input.range.end,
            _ if input.newest == place => runs.push(input.range.clone()),
            _ => {}
        }
        neighbour = input.newest == place;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_are_new_go_in_one_copy() {
        let input = |range, newest| Input { range, newest, copying: None };
        let inputs = [
            input(0..100, Newest::Host),
            input(256..260, Newest::Host),
            input(512..520, Newest::Program),
            input(768..800, Newest::Host),
            input(1024..1028, Newest::Ahead),
        ];
        assert_eq!(runs(&inputs, Newest::Host), [0..260, 768..800]);
        assert_eq!(runs(&inputs, Newest::Ahead), vec![1024..1028]);
        assert_eq!(runs(&[], Newest::Host), []);
    }

    #[test]
    fn ports_begin_where_the_drivers_allocations_would() {
        let spec = |name: &str, n: usize, dtype| TensorSpec { name: name.into(), dtype, shape: [n].into() };
        let mut plan = Plan::default();
        assert_eq!(plan.add(true, &spec("x", 3, DType::F32)), 0);
        assert_eq!(plan.add(true, &spec("y", 100, DType::I64)), 1);
        assert_eq!(plan.add(false, &spec("loss", 1, DType::F32)), 0);
        assert_eq!(plan.inputs, [0..12, 256..1056]);
        assert_eq!(plan.outputs, vec![0..4]);
    }
}
