//! The parameter update as launches: tables of what is where, and three kernels in a row.

use bytemuck::{NoUninit, Zeroable};
use graph_builder::DType;

use super::UPDATE;
use super::queue::{Address, Arguments, Launch, Queue};
use crate::arena::ArenaLayout;
use crate::error::{Result, RuntimeError};
use crate::update::UpdateStep;

/// Elements of one block's work.
const PIECE: usize = 16 * 1024;
const THREADS: u32 = 256;

/// `Segment` of `update.cu`.
#[derive(Clone, Copy, Debug, Zeroable, NoUninit)]
#[repr(C)]
pub struct Segment {
    parameter: u64,
    gradient: u64,
    length: u64,
    decay: f32,
    step: f32,
    epsilon: f32,
    unused: f32,
}

/// `Piece` of `update.cu`.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct Piece {
    start: u64,
    segment: u32,
    count: u32,
}

/// `Constants` of `update.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Constants {
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    correction2: f32,
    keep: f32,
    take: f32,
}

/// What the update decided, as it lies in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::AnyBitPattern, NoUninit)]
#[repr(C)]
pub struct Control {
    /// Norm of all gradients together, unscaled, before the clip.
    pub grad_norm: f64,
    /// What the gradients were multiplied by: unscaling and clip.
    pub scale: f32,
    /// 0 when the norm is not finite: nothing was updated.
    pub finite: u32,
}

/// Where everything is.
#[derive(Clone, Copy, Debug)]
pub struct UpdatePlaces {
    /// The tables of [`UpdatePlan::segments`] and [`UpdatePlan::pieces`].
    pub tables: (Address, Address),
    /// Parameters, f32.
    pub parameters: Address,
    /// Gradients, and their type.
    pub gradients: (Address, DType),
    /// First and second moments, f32, laid out as the gradients.
    pub moments: (Address, Address),
    /// Moving average of the parameters, f32, with its decay.
    pub average: Option<(Address, f64)>,
    /// Copy of the parameters in the compute type, bf16 or f16.
    pub copy: Option<(Address, DType)>,
    /// A [`Control`].
    pub control: Address,
}

/// The update of a layout of parameters by a layout of gradients, on a device.
///
/// The maths, the order of operations and the rounding of the scalars are those of [`AdamW`](crate::AdamW).
#[derive(Debug)]
pub struct UpdatePlan {
    betas: (f64, f64),
    epsilons: Vec<f64>,
    segments: Vec<Segment>,
    pieces: Vec<Piece>,
}

impl UpdatePlan {
    /// The plan for updates with `betas` and an ε of each gradient entry.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`] for a gradient of no parameter, [`RuntimeError::WrongLength`].
    pub fn new(
        parameters: &ArenaLayout,
        gradients: &ArenaLayout,
        betas: (f64, f64),
        epsilons: Vec<f64>,
    ) -> Result<Self> {
        let (expected, got) = (gradients.entries().len(), epsilons.len());
        if got != expected {
            return Err(RuntimeError::WrongLength { what: "epsilon".to_owned(), expected, got });
        }
        let (mut segments, mut pieces) = (Vec::new(), Vec::new());
        for (name, gradient) in gradients.entries() {
            let (at, length) = (parameters.entry(name)?.range().start, gradient.range().len());
            for start in (0..length).step_by(PIECE) {
                let count = PIECE.min(length - start) as u32;
                pieces.push(Piece { start: start as u64, segment: segments.len() as u32, count });
            }
            segments.push(Segment {
                parameter: at as u64,
                gradient: gradient.range().start as u64,
                length: length as u64,
                ..Segment::zeroed()
            });
        }
        Ok(Self { betas, epsilons, segments, pieces })
    }

    /// The table of pieces, the same at every step.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The table of segments, with the rates of one step.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`]: one rate and decay for each gradient entry.
    pub fn segments(&self, step: &UpdateStep<'_>) -> Result<Vec<Segment>> {
        let expected = self.segments.len();
        for (what, got) in [("lr", step.lr.len()), ("weight_decay", step.weight_decay.len())] {
            if got != expected {
                return Err(RuntimeError::WrongLength { what: what.to_owned(), expected, got });
            }
        }
        let correction1 = 1.0 - self.betas.0.powf(step.step as f64);
        let rated = self.segments.iter().enumerate().map(|(i, segment)| Segment {
            decay: (1.0 - step.lr[i] * step.weight_decay[i]) as f32,
            step: (step.lr[i] / correction1) as f32,
            epsilon: self.epsilons[i] as f32,
            ..*segment
        });
        Ok(rated.collect())
    }

    /// Enqueues one update. Nothing waits for the host: gradients that are not finite leave everything as it was.
    ///
    /// # Errors
    /// [`RuntimeError::InvalidValue`] for types without kernels; the queue's.
    pub fn enqueue(&self, queue: &dyn Queue, places: &UpdatePlaces, step: &UpdateStep<'_>) -> Result<()> {
        Self::enqueue_together(&[(self, *places)], queue, step)
    }

    /// Enqueues one update of several groups of gradients, as of several types, whose norm is taken together. The
    /// decision is that of the first group's [`UpdatePlaces::control`].
    ///
    /// # Errors
    /// As [`UpdatePlan::enqueue`].
    pub fn enqueue_together(
        groups: &[(&Self, UpdatePlaces)],
        queue: &dyn Queue,
        step: &UpdateStep<'_>,
    ) -> Result<()> {
        let launch = |kernel: &str, blocks: usize, arguments: Arguments| {
            let grid = [blocks as u32, 1, 1];
            queue.launch(Launch {
                source: &UPDATE,
                kernel,
                grid,
                threads: THREADS,
                shared_bytes: 0,
                arguments,
            })
        };
        let names = groups.iter().map(|(_, places)| kernel_names(places)).collect::<Result<Vec<_>>>()?;
        let count: usize = groups.iter().map(|(plan, _)| plan.pieces.len()).sum();
        let Some(control) = groups.first().map(|(_, places)| places.control).filter(|_| count > 0) else {
            return Ok(());
        };
        let sums = queue.scratch(count * size_of::<f64>())?;
        let filled = || groups.iter().zip(&names).filter(|((plan, _), _)| !plan.pieces.is_empty());
        let mut done = 0;
        for ((plan, places), (squares, _)) in filled() {
            let arguments = tables(places).address(places.gradients.0);
            let sums = sums.offset(done * size_of::<f64>());
            launch(squares, plan.pieces.len(), arguments.address(sums))?;
            done += plan.pieces.len();
        }
        let decide = Arguments::default().address(sums).with(count as u32).with(step.clip.unwrap_or(0.0));
        launch("update_decide", 1, decide.with(step.gradient_scale).address(control))?;
        for ((plan, places), (_, update)) in filled() {
            let (average, decay) = places.average.unwrap_or((Address::NONE, 0.0));
            let arguments = tables(places).address(control).with(plan.constants(step, decay));
            let arguments = arguments.address(places.parameters).address(places.gradients.0);
            let arguments = arguments.address(places.moments.0).address(places.moments.1);
            let copy = places.copy.map_or(Address::NONE, |(at, _)| at);
            launch(update, plan.pieces.len(), arguments.address(average).address(copy))?;
        }
        Ok(())
    }

    fn constants(&self, step: &UpdateStep<'_>, decay: f64) -> Constants {
        let (beta1, beta2) = self.betas;
        Constants {
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            correction2: (1.0 - beta2.powf(step.step as f64)).sqrt() as f32,
            keep: decay as f32,
            take: (1.0 - decay) as f32,
        }
    }
}

fn tables(places: &UpdatePlaces) -> Arguments {
    Arguments::default().address(places.tables.0).address(places.tables.1)
}

/// The kernels of the norm and of the update for a group's types.
fn kernel_names(places: &UpdatePlaces) -> Result<(String, String)> {
    let (dtype, copy) = (places.gradients.1, places.copy.map_or(DType::Bf16, |(_, dtype)| dtype));
    let float = matches!(dtype, DType::F32 | DType::Bf16 | DType::F16);
    if float && matches!(copy, DType::Bf16 | DType::F16) {
        return Ok((format!("update_squares_{dtype}"), format!("update_{dtype}_{copy}")));
    }
    Err(RuntimeError::InvalidValue {
        what: "the update's types".to_owned(),
        expected: "gradients of f32, bf16 or f16 and a copy of bf16 or f16".to_owned(),
        got: format!("{dtype} and {copy}"),
    })
}
