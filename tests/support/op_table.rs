//! What a row of the op table is. The rows drive the proofs of gradients, emission, kernels and costs.

use graph_builder::graph::Node;
use graph_builder::{Builder, DType, Dim, Graph, Init, Op, Shape, Type, Value};

use crate::draws::Draws;
use crate::{Array, Feeds};

/// Applies the op to its operands.
pub type Build = for<'g> fn(&'g Builder, &[Value<'g>]) -> Value<'g>;

/// The values that an operand takes.
#[derive(Clone, Copy, Debug)]
pub enum Range {
    /// Real numbers of `low..high`.
    Real(f64, f64),
    /// Multiples of 0.1 from −1 to 1, shifted: two operands of different shift are never equal, so none sits on a kink.
    Steps(f64),
    /// Multiples of ¼ from −4 to 4, which every float type holds exactly.
    Quarters,
    /// Whole numbers of `0..n`.
    Below(usize),
}

/// One operand of a row.
#[derive(Clone, Debug)]
pub struct Operand {
    /// Element type and shape.
    pub ty: Type,
    /// What its values are.
    pub range: Range,
    /// Whether it is declared as a parameter rather than as an input.
    pub parameter: bool,
}

impl Operand {
    /// An operand that is declared as an input.
    pub fn new(dtype: DType, shape: impl Into<Shape>, range: Range) -> Self {
        Self { ty: Type::new(dtype, shape), range, parameter: false }
    }

    fn draw(&self, draws: &mut Draws) -> Array {
        let range = self.range;
        draws.array(self.ty.shape.dims(), |d| match range {
            Range::Real(low, high) => d.between(low, high),
            Range::Steps(shift) => f64::from((d.below(21) as f64 * 0.1 - 1.0 + shift) as f32),
            Range::Quarters => d.below(33) as f64 * 0.25 - 4.0,
            Range::Below(n) => d.below(n) as f64,
        })
    }
}

/// What the op's gradient is, for its float operands; the others are flat.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slope {
    /// The derivative, within this relative error of the numerical one.
    Smooth(f64),
    /// Zero.
    Flat,
    /// Not to be had: asking is an error.
    Refused,
}

/// Which bytes the op moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Traffic {
    /// Every operand and the answer once.
    All,
    /// As much as it answers, in and out.
    Answer,
    /// Nothing: the op is a view or a leaf.
    Nothing,
}

/// One row: an op on operands.
#[must_use]
pub struct Row {
    /// Name of the variant of [`Op`].
    pub op: &'static str,
    /// What tells the row from the op's others.
    pub case: &'static str,
    /// What it is applied to.
    pub operands: Vec<Operand>,
    /// How it is applied.
    pub build: Build,
    /// What its gradient is.
    pub slope: Slope,
    /// Relative error (L2) that ONNX Runtime's f32 may have.
    pub parity: f64,
    /// Multiply-adds of matrix products.
    pub macs: u64,
    /// Operations.
    pub flops: u64,
    /// Bytes that it moves.
    pub traffic: Traffic,
}

impl Row {
    /// Its op and case.
    pub fn name(&self) -> String {
        format!("{} ({})", self.op, self.case)
    }

    /// Name of operand `i` as an input or a parameter.
    pub fn operand_name(i: usize) -> String {
        format!("a{i}")
    }

    /// Declares the operands.
    pub fn declare<'g>(&self, b: &'g Builder) -> Vec<Value<'g>> {
        let declare = |(i, operand): (usize, &Operand)| {
            let name = Self::operand_name(i);
            if operand.parameter {
                let dims: Vec<Dim> = operand.ty.shape.dims().iter().map(|&d| Dim::Fixed(d)).collect();
                b.root().param(&name, &dims, Init::Zeros)
            } else {
                b.input(&name, operand.ty.clone())
            }
        };
        self.operands.iter().enumerate().map(declare).collect()
    }

    /// The graph of the op alone, with an output a result.
    pub fn graph(&self) -> Graph {
        self.graph_of(|answer| answer)
    }

    /// The graph of the op with `finish` applied to its results.
    pub fn graph_of(&self, finish: impl for<'g> Fn(Value<'g>) -> Value<'g>) -> Graph {
        let b = Builder::new(self.name());
        let operands = self.declare(&b);
        for (i, result) in (self.build)(&b, &operands).results().into_iter().enumerate() {
            b.output(&format!("out.{i}"), finish(result));
        }
        b.finish().unwrap_or_else(|e| panic!("{}: {e}", self.name()))
    }

    /// The node of the op in [`Row::graph`]; that of a part is the op it is a part of.
    pub fn node(graph: &Graph) -> &Node {
        let node = graph.node(graph.outputs()[0].1);
        if matches!(node.op, Op::Part(_)) { graph.node(node.args[0]) } else { node }
    }

    /// Values of the operands, the same at every call.
    pub fn feeds(&self) -> Feeds {
        let mut draws = Draws::named(&self.name());
        let drawn =
            self.operands.iter().enumerate().map(|(i, o)| (Self::operand_name(i), o.draw(&mut draws)));
        drawn.collect()
    }
}

/// Name of the variant of an op.
pub fn variant(op: &Op) -> String {
    let text = format!("{op:?}");
    let name = text.split(|c: char| !c.is_alphanumeric()).next().unwrap();
    name.strip_suffix("Ref").unwrap_or(name).to_owned()
}
