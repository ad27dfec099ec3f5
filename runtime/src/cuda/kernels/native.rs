//! The `mudit` ops as launches of CUDA kernels.

use bytemuck::NoUninit;
use graph_builder::DType;

use super::queue::{Address, Arguments, Launch, Product, Queue};
use super::{ATTENTION, ATTENTION_PLAIN, ELEMENTS, ROWS, Source};
use crate::cuda::Gpu;
use crate::error::{Result, RuntimeError};
use crate::kernels::{Activation, AttributeSource, Attributes, Op};

/// Threads of a block of the row and element kernels.
const THREADS: usize = 256;
/// Warps of such a block, a row each.
const WARPS: usize = 8;
/// Rows of one sample whose sums over tokens one block forms.
const PART: usize = 32;
/// Rows of a block of `attention.cu`, and its threads.
const ATTENTION_ROWS: (usize, u32) = (64, 128);
/// Rows of a block of `attention_plain.cu`.
const PLAIN_ROWS: usize = 8;
/// Largest head of `attention_plain.cu`.
const PLAIN_SIZE: usize = 128;
/// Most blocks of a launch along its second and third axis.
const GRID: usize = 65_535;
/// More blocks than a GPU runs at once, of kernels that walk on by themselves.
const MANY_BLOCKS: usize = 1 << 16;

/// A `mudit` op of one element type, ready to be enqueued.
#[derive(Clone, Copy, Debug)]
pub struct NativeOp {
    op: Op,
    attributes: Attributes,
    dtype: DType,
}

/// An operand or an answer: its shape, and where it is.
#[derive(Clone, Debug)]
pub struct Place {
    /// Axis sizes.
    pub shape: Vec<i64>,
    /// The first element.
    pub at: Address,
}

/// `Heads` of the attention kernels.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Heads {
    tokens: u32,
    number: u32,
    size: u32,
    scale: f32,
}

/// `Patches` of `elements.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Patches {
    channels: u32,
    height: u32,
    width: u32,
    patch: u32,
    channels_last: u32,
}

impl NativeOp {
    /// The op of that name, with attributes read from a node.
    ///
    /// # Errors
    /// [`RuntimeError::InvalidValue`] for a name or type without kernels, and for missing attributes.
    pub fn new(name: &str, dtype: DType, attributes: &impl AttributeSource) -> Result<Self> {
        let wrong = |expected: &str, got: String| RuntimeError::InvalidValue {
            what: format!("the CUDA kernel `{name}`"),
            expected: expected.to_owned(),
            got,
        };
        let op = Op::ALL.into_iter().find(|op| op.name() == name);
        let op = op.ok_or_else(|| wrong("an op of the domain mudit", "unknown".to_owned()))?;
        if !matches!(dtype, DType::F32 | DType::Bf16 | DType::F16) {
            return Err(wrong("of type f32, bf16 or f16", format!("of type {dtype}")));
        }
        let attributes = Attributes::read(op, attributes).map_err(|e| wrong("a complete node", e))?;
        Ok(Self::of(op, dtype, attributes))
    }

    /// An op whose attributes were read, in f32, bf16 or f16.
    pub(crate) fn of(op: Op, dtype: DType, attributes: Attributes) -> Self {
        Self { op, attributes, dtype }
    }

    /// Compiles and loads the kernels that it will most likely launch; others follow when they are launched.
    pub(crate) fn prepare(&self, gpu: &Gpu) -> Result<()> {
        let loaded = gpu.loaded()?;
        let activation = self.attributes.activation != Activation::None;
        let sources: &[&'static Source] = match self.op {
            Op::Attention | Op::AttentionGrad if self.dtype == DType::F32 => &[&ATTENTION_PLAIN],
            Op::Attention | Op::AttentionGrad => &[&ATTENTION],
            Op::LinearGradWeight | Op::LinearGateResidual if activation => &[&ROWS, &ELEMENTS],
            Op::Linear | Op::LinearGradInput if activation => &[&ELEMENTS],
            Op::Linear | Op::LinearGradInput | Op::After => &[],
            Op::Patchify | Op::Unpatchify | Op::GeluGrad => &[&ELEMENTS],
            Op::LinearGradWeight
            | Op::LinearGateResidual
            | Op::LayerNormModulate
            | Op::LayerNormModulateGrad
            | Op::LayerNormGrad
            | Op::GateResidual
            | Op::GateResidualGrad
            | Op::SoftmaxGrad => &[&ROWS],
        };
        sources.iter().try_for_each(|source| loaded.prepare(gpu, source))
    }

    /// Shapes of the answers, or `None` when the operands do not fit.
    pub fn shapes(&self, inputs: &[&[i64]]) -> Option<Vec<Vec<i64>>> {
        if inputs.len() < self.op.inputs().0 {
            return None;
        }
        self.op.shapes(&self.attributes, inputs)
    }

    /// Why the kernels cannot take operands of these shapes; `None` when they can.
    pub fn refusal(&self, inputs: &[&[i64]]) -> Option<String> {
        if self.shapes(inputs).is_none() {
            return Some(format!("operands of shapes {inputs:?} are not as the op's contract says"));
        }
        let most = |what: &str, got: i64, most: usize| {
            (got > most as i64).then(|| format!("{got} {what}; at most {most} are taken"))
        };
        let heads = self.attributes.heads;
        match self.op {
            Op::Attention | Op::AttentionGrad => {
                let size = inputs[0][2] / 3 / heads as i64;
                most("features a head", size, PLAIN_SIZE)
                    .or_else(|| most("heads", heads as i64, GRID))
                    .or_else(|| most("samples", inputs[0][0], GRID))
            }
            Op::LayerNormModulateGrad => most("samples", inputs[0][0], GRID),
            Op::GateResidualGrad => most("samples", inputs[1][0], GRID),
            _ => None,
        }
    }

    /// Enqueues the op's kernels.
    ///
    /// # Errors
    /// [`RuntimeError::InvalidValue`] for operands that do not fit; the queue's.
    pub fn enqueue(&self, queue: &dyn Queue, inputs: &[Place], outputs: &[Address]) -> Result<()> {
        let shapes: Vec<&[i64]> = inputs.iter().map(|p| &*p.shape).collect();
        if let Some(reason) = self.refusal(&shapes) {
            return Err(self.unfit(&reason));
        }
        let answers = self.shapes(&shapes).filter(|a| a.len() == outputs.len());
        let answers = answers.ok_or_else(|| self.unfit(&format!("{} answers", outputs.len())))?;
        if answers.iter().flatten().any(|&d| d == 0) {
            return Ok(());
        }
        Call { op: *self, queue, inputs, answers: &answers, outputs }.run()
    }

    fn unfit(&self, got: &str) -> RuntimeError {
        RuntimeError::InvalidValue {
            what: format!("the CUDA kernel `{}`", self.op.name()),
            expected: "operands as the op's contract says".to_owned(),
            got: got.to_owned(),
        }
    }

    /// Elements of an access of 16 bytes.
    fn lanes(&self) -> usize {
        16 / self.dtype.bytes()
    }

    fn suffix(&self) -> &'static str {
        match self.dtype {
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            _ => "f32",
        }
    }
}

struct Call<'a> {
    op: NativeOp,
    queue: &'a dyn Queue,
    inputs: &'a [Place],
    answers: &'a [Vec<i64>],
    outputs: &'a [Address],
}

/// Elements of a shape.
fn numel(shape: &[i64]) -> usize {
    shape.iter().product::<i64>() as usize
}

/// A count for a kernel's 32-bit parameter; contracts keep axes far below.
fn word(n: usize) -> u32 {
    n as u32
}

impl Call<'_> {
    /// The address of an operand; none for one that is left out.
    fn x(&self, i: usize) -> Address {
        self.inputs.get(i).map_or(Address::NONE, |p| p.at)
    }

    fn dim(&self, i: usize, axis: usize) -> usize {
        self.inputs[i].shape[axis] as usize
    }

    fn last(&self, i: usize) -> usize {
        self.inputs[i].shape.last().map_or(1, |&d| d as usize)
    }

    fn launch(
        &self,
        source: &'static Source,
        kernel: &str,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: usize,
        arguments: Arguments,
    ) -> Result<()> {
        let kernel = &kernel.replace("{}", self.op.suffix());
        let (grid, shared_bytes) = (grid.map(word), word(shared_bytes));
        self.queue.launch(Launch { source, kernel, grid, threads, shared_bytes, arguments })
    }

    /// A kernel of `rows.cu` over all rows, or part and sample.
    fn rows(&self, kernel: &str, grid: [usize; 3], arguments: Arguments) -> Result<()> {
        self.launch(&ROWS, kernel, grid, THREADS as u32, 0, arguments)
    }

    /// A kernel of `elements.cu` over `count` elements; a thread takes `each` at a time.
    fn elements(&self, kernel: &str, count: usize, each: usize, arguments: Arguments) -> Result<()> {
        let blocks = count.div_ceil(THREADS * each).min(MANY_BLOCKS);
        self.launch(&ELEMENTS, kernel, [blocks, 1, 1], THREADS as u32, 0, arguments)
    }

    /// Adds `parts` shares of `kinds` rows of `width` up, for each group, into the answers.
    fn add_shares(
        &self,
        shares: Address,
        out: [Address; 2],
        [groups, parts, width]: [usize; 3],
    ) -> Result<()> {
        let arguments = Arguments::default().address(shares).address(out[0]).address(out[1]);
        let arguments = arguments.with(word(parts)).with(word(width));
        self.rows("add_shares_{}", [width.div_ceil(THREADS), groups, 1], arguments)
    }

    fn run(&self) -> Result<()> {
        let a = &self.op.attributes;
        match self.op.op {
            Op::Linear => {
                let (n, k) = (self.dim(1, 0), self.dim(1, 1));
                self.layer([self.x(0), self.x(1), self.x(2)], [numel(&self.answers[0]) / n, n, k])
            }
            Op::LinearGateResidual => {
                let (n, k) = (self.dim(3, 0), self.dim(3, 1));
                self.layer([self.x(2), self.x(3), self.x(4)], [numel(&self.answers[0]) / n, n, k])?;
                self.gate_residual([self.x(0), self.x(1), self.outputs[0]], &self.inputs[0].shape)
            }
            Op::LinearGradInput => self.grad_input(),
            Op::LinearGradWeight => self.grad_weight(),
            Op::Attention | Op::AttentionGrad => self.attention(),
            Op::LayerNormModulate => {
                let (tokens, width) = (self.dim(0, 1), self.dim(0, 2));
                let rows = self.dim(0, 0) * tokens;
                let arguments = Arguments::default().address(self.x(0)).address(self.x(1)).address(self.x(2));
                let arguments = arguments.address(self.outputs[0]).with(word(rows)).with(word(tokens));
                let arguments = arguments.with(word(width)).with(a.epsilon);
                self.rows("layer_norm_modulate_{}", [rows.div_ceil(WARPS), 1, 1], arguments)
            }
            Op::LayerNormModulateGrad => {
                let (samples, tokens, width) = (self.dim(0, 0), self.dim(0, 1), self.dim(0, 2));
                let parts = tokens.div_ceil(PART);
                let shares = self.queue.scratch(samples * parts * 2 * width * size_of::<f32>())?;
                let arguments = (0..4).fold(Arguments::default(), |all, i| all.address(self.x(i)));
                let arguments = arguments.address(self.outputs[0]).address(shares).with(word(tokens));
                let arguments = arguments.with(word(width)).with(a.epsilon);
                self.rows("layer_norm_modulate_grad_{}", [parts, samples, 1], arguments)?;
                self.add_shares(shares, [self.outputs[1], self.outputs[2]], [samples, parts, width])
            }
            Op::GateResidual => self.gate_residual([self.x(0), self.x(1), self.x(2)], &self.inputs[0].shape),
            Op::GateResidualGrad => {
                let (samples, tokens, width) = (self.dim(1, 0), self.dim(1, 1), self.dim(1, 2));
                let parts = tokens.div_ceil(PART);
                let shares = self.queue.scratch(samples * parts * width * size_of::<f32>())?;
                let arguments = (0..3).fold(Arguments::default(), |all, i| all.address(self.x(i)));
                let arguments = arguments.address(self.outputs[0]).address(shares);
                let arguments = arguments.with(word(tokens)).with(word(width));
                self.rows("gate_residual_grad_{}", [parts, samples, 1], arguments)?;
                self.add_shares(shares, [self.outputs[1], Address::NONE], [samples, parts, width])
            }
            Op::Patchify | Op::Unpatchify => {
                let image = if self.op.op == Op::Patchify { &self.inputs[0].shape } else { &self.answers[0] };
                let side = |axis: usize| image.get(axis).map_or(1, |&d| d as u32);
                let patches = Patches {
                    channels: side(1),
                    height: side(2),
                    width: side(3),
                    patch: word(a.patch),
                    channels_last: a.channels_last.into(),
                };
                let count = numel(&self.answers[0]);
                let arguments = Arguments::default().address(self.x(0)).address(self.outputs[0]);
                let kernel = if self.op.op == Op::Patchify { "patchify_{}" } else { "unpatchify_{}" };
                self.elements(kernel, count, 1, arguments.with(patches).with(count as u64))
            }
            Op::GeluGrad => self.gelu_grad([self.x(0), self.x(1), self.outputs[0]], numel(&self.answers[0])),
            Op::SoftmaxGrad | Op::LayerNormGrad => {
                let width = self.last(0);
                let rows = numel(&self.answers[0]) / width;
                let arguments = Arguments::default().address(self.x(0)).address(self.x(1));
                let arguments = arguments.address(self.outputs[0]).with(word(rows)).with(word(width));
                let grid = [rows.div_ceil(WARPS), 1, 1];
                if self.op.op == Op::SoftmaxGrad {
                    self.rows("softmax_grad_{}", grid, arguments)
                } else {
                    self.rows("layer_norm_grad_{}", grid, arguments.with(a.epsilon))
                }
            }
            Op::After => {
                let bytes = numel(&self.answers[0]) * self.op.dtype.bytes();
                self.queue.copy(self.x(0), self.outputs[0], bytes)
            }
        }
    }

    /// The values after the activation in front of a layer.
    fn activated(&self, x: Address, count: usize) -> Result<Address> {
        if self.op.attributes.activation == Activation::None {
            return Ok(x);
        }
        let to = self.queue.scratch(count * self.op.dtype.bytes())?;
        let arguments = Arguments::default().address(x).address(to).with(count as u64);
        self.elements("gelu_{}", count, self.op.lanes(), arguments)?;
        Ok(to)
    }

    /// The first answer = `act(x) Wᵀ + b`.
    fn layer(&self, [x, weight, bias]: [Address; 3], [m, n, k]: [usize; 3]) -> Result<()> {
        let (a, out, dtype) = (self.activated(x, m * k)?, self.outputs[0], self.op.dtype);
        self.queue.multiply(&Product { dtype, m, n, k, a: (a, false), b: (weight, true), bias, out })
    }

    /// The first answer = `(ct W) ⊙ act'(x)`.
    fn grad_input(&self) -> Result<()> {
        let (n, k) = (self.dim(1, 0), self.dim(1, 1));
        let (m, dtype, out) = (numel(&self.inputs[0].shape) / n, self.op.dtype, self.outputs[0]);
        let (a, b, bias) = ((self.x(0), false), (self.x(1), false), Address::NONE);
        self.queue.multiply(&Product { dtype, m, n: k, k: n, a, b, bias, out })?;
        if self.op.attributes.activation == Activation::None {
            return Ok(());
        }
        self.gelu_grad([self.x(2), out, out], m * k)
    }

    /// `ctᵀ act(x)`, and the sums of the columns of `ct`.
    fn grad_weight(&self) -> Result<()> {
        let (n, k) = (self.last(0), self.last(1));
        let (m, dtype, out) = (numel(&self.inputs[0].shape) / n, self.op.dtype, self.outputs[0]);
        let x = self.activated(self.x(1), m * k)?;
        let (a, b, bias) = ((self.x(0), true), (x, false), Address::NONE);
        self.queue.multiply(&Product { dtype, m: n, n: k, k: m, a, b, bias, out })?;
        // Parts as many as keep a GPU busy, and no more: their sums are read again.
        let part = m.div_ceil(128).max(PART);
        let parts = m.div_ceil(part);
        let shares = self.queue.scratch(parts * n * size_of::<f32>())?;
        let arguments = Arguments::default().address(self.x(0)).address(shares).with(m as u64);
        let grid = [n.div_ceil(THREADS), parts, 1];
        self.rows("column_sums_{}", grid, arguments.with(word(n)).with(word(part)))?;
        self.add_shares(shares, [self.outputs[1], Address::NONE], [1, parts, n])
    }

    /// The first answer = `x + gate ⊙ y`; `y` may be the answer itself.
    fn gate_residual(&self, [x, gate, y]: [Address; 3], shape: &[i64]) -> Result<()> {
        let &[samples, tokens, width] = shape else { return Err(self.op.unfit("rows of no sample")) };
        let rows = (samples * tokens) as usize;
        let arguments = Arguments::default().address(x).address(gate).address(y).address(self.outputs[0]);
        let arguments = arguments.with(word(rows)).with(tokens as u32).with(width as u32);
        self.rows("gate_residual_{}", [rows.div_ceil(WARPS), 1, 1], arguments)
    }

    fn gelu_grad(&self, [x, ct, out]: [Address; 3], count: usize) -> Result<()> {
        let arguments = Arguments::default().address(x).address(ct).address(out).with(count as u64);
        self.elements("gelu_grad_{}", count, self.op.lanes(), arguments)
    }

    fn attention(&self) -> Result<()> {
        let a = &self.op.attributes;
        let (samples, tokens, size) = (self.dim(0, 0), self.dim(0, 1), self.dim(0, 2) / 3 / a.heads);
        let heads = Heads { tokens: word(tokens), number: word(a.heads), size: word(size), scale: a.scale };
        // The padded head, where the matrix units are used: their copies are of 8 elements.
        let padded = [64, 80].into_iter().find(|&p| size <= p);
        let padded = padded.filter(|_| self.op.dtype != DType::F32 && size.is_multiple_of(8));
        let (source, rows, threads) = match padded {
            Some(_) => (&ATTENTION, ATTENTION_ROWS.0, ATTENTION_ROWS.1),
            None => (&ATTENTION_PLAIN, PLAIN_ROWS, THREADS as u32),
        };
        let name = |kernel: &str| match padded {
            Some(padded) => format!("attention{kernel}_{{}}_{padded}"),
            None => format!("attention_plain{kernel}_{{}}"),
        };
        let grid = [tokens.div_ceil(rows), a.heads, samples];
        let shared = |columns: usize| match padded {
            // Two stages of two tiles.
            Some(padded) => 4 * columns * (padded + 8) * self.op.dtype.bytes(),
            None => (2 * 32 * (size + 1) + rows * 2 * (size + 32)) * size_of::<f32>(),
        };
        let launch = |kernel: &str, columns: usize, arguments: Arguments| {
            self.launch(source, &name(kernel), grid, threads, shared(columns), arguments.with(heads))
        };
        if self.op.op == Op::Attention {
            return launch("", 64, Arguments::default().address(self.x(0)).address(self.outputs[0]));
        }
        // Two f32 for every row of every head.
        let sums = self.queue.scratch(samples * a.heads * tokens * 2 * size_of::<f32>())?;
        let arguments = Arguments::default().address(self.x(0)).address(self.x(1)).address(self.outputs[0]);
        let arguments = arguments.address(sums);
        launch("_grad_queries", 32, arguments.clone())?;
        launch("_grad_keys", 32, arguments)
    }
}
