//! The one error type of the crate.

use std::fmt;

/// Where the author of a model wrote the op that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Scope path such as `blocks.0.attn`; empty at the top.
    pub scope: String,
    /// Source file of the call.
    pub file: &'static str,
    /// Line in that file.
    pub line: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scope = if self.scope.is_empty() { "the top scope" } else { &self.scope };
        write!(f, "{scope} ({}:{})", self.file, self.line)
    }
}

/// What can go wrong while a graph is built, differentiated, rewritten, evaluated or emitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// An op refused its operands.
    #[error("{op} in {place}: expected {expected}, got {got}")]
    Op {
        /// Name of the op.
        op: &'static str,
        /// Scope and source line.
        place: Place,
        /// The constraint, with its label.
        expected: String,
        /// The operands' types.
        got: String,
    },
    /// A parameter was declared twice with different shape, init or training flag.
    #[error("parameter `{name}` in {place} was declared before as {before}, now as {now}")]
    Parameter {
        /// Full parameter name.
        name: String,
        /// Scope and source line of the second declaration.
        place: Place,
        /// The first declaration.
        before: String,
        /// The second declaration.
        now: String,
    },
    /// Two inputs or two outputs share a name.
    #[error("graph `{graph}` has two {kind}s named `{name}`")]
    DuplicateName {
        /// Graph name.
        graph: String,
        /// `input` or `output`.
        kind: &'static str,
        /// The repeated name.
        name: String,
    },
    /// A scope was named in which nothing is computed.
    #[error("graph `{graph}` computes nothing in scope `{scope}`")]
    NoScope {
        /// Graph name.
        graph: String,
        /// Scope path.
        scope: String,
    },
    /// A gradient was asked through an op that has none.
    #[error("{op} in {place} has no derivative with respect to operand {operand}")]
    NotDifferentiable {
        /// Name of the op.
        op: &'static str,
        /// Scope and source line.
        place: Place,
        /// Operand position.
        operand: usize,
    },
    /// The loss of a gradient is not a float scalar.
    #[error("a gradient needs a scalar float loss, got {got}")]
    Loss {
        /// Type of the value given.
        got: String,
    },
    /// A graph broke one of its invariants.
    #[error("after {stage}: node %{node} ({op}) in {place}: {what}\n{context}")]
    Malformed {
        /// `build`, or the name of a pass.
        stage: String,
        /// Node index.
        node: usize,
        /// Name of the op.
        op: &'static str,
        /// Scope and source line.
        place: Place,
        /// The broken invariant.
        what: String,
        /// The neighbouring nodes in text form.
        context: String,
    },
    /// The evaluator got no value, or one of the wrong shape, for an input or a parameter.
    #[error("evaluating `{graph}`: `{name}` expected {expected}, got {got}")]
    Feed {
        /// Graph name.
        graph: String,
        /// Input or parameter name.
        name: String,
        /// Expected type.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A parameter is missing from the weights file or does not fit it.
    #[error("weights for `{graph}`: parameter `{name}`: expected {expected}, got {got}")]
    Weights {
        /// Graph name.
        graph: String,
        /// Parameter name.
        name: String,
        /// Expected type.
        expected: String,
        /// What the file holds.
        got: String,
    },
    /// No precision has this name.
    #[error("unknown precision \"{name}\"; give f32, bf16 or f16")]
    UnknownPrecision {
        /// The name as written.
        name: String,
    },
    /// A graph that is to be brought to a precision is not f32 throughout.
    #[error("{pass}: {op} in {place} is {got} already; bring an f32 graph to a precision, and once")]
    NotF32 {
        /// Name of the pass.
        pass: &'static str,
        /// Name of the op.
        op: &'static str,
        /// Scope and source line.
        place: Place,
        /// Type of its answer.
        got: String,
    },
    /// The CUDA provider has no kernel for a node in its type.
    #[error(
        "program `{program}`: {op} of `{layer}`{within} has no CUDA kernel for {got}, only for {legal}; give the op the \
         policy f32 in its rules"
    )]
    IllegalType {
        /// Name of the program.
        program: String,
        /// The standard op.
        op: String,
        /// Name of the node, which begins with its scope path.
        layer: String,
        /// The fused op in whose function body the op stands, in words, or nothing.
        within: String,
        /// The element type.
        got: crate::shape::DType,
        /// The element types that it has a kernel for.
        legal: String,
    },
    /// A kernel of our own cannot take the shapes of a node.
    #[error(
        "program `{program}`: {op} of `{layer}` cannot run by mudit's CUDA kernel: {reason}; use provider `cpu`, or another \
         model"
    )]
    UnfitKernel {
        /// Name of the program.
        program: String,
        /// The fused op.
        op: String,
        /// Name of the node, which begins with its scope path.
        layer: String,
        /// What is not taken, and what is.
        reason: String,
    },
    /// A program depends on its batch size in a way that no program for all batch sizes can.
    #[error(
        "program `{program}` cannot leave its batch size open: `{node}`: {reason}; build a program for each batch size"
    )]
    OpenBatch {
        /// Name of the program.
        program: String,
        /// Name of the node, which begins with its scope path; or of an input, an output or a fused op.
        node: String,
        /// What differs between two batch sizes.
        reason: String,
    },
    /// The model message could not be written.
    #[error("emitting `{graph}`: {reason}")]
    Emit {
        /// Graph name.
        graph: String,
        /// The reason.
        reason: String,
    },
}

/// Result with [`GraphError`].
pub type Result<T> = std::result::Result<T, GraphError>;

/// A refusal by an op's shape rule, before the builder adds where it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(pub(crate) String);

/// Refuses with a labelled constraint.
pub(crate) fn refuse<T>(expected: impl Into<String>) -> std::result::Result<T, Refusal> {
    Err(Refusal(expected.into()))
}
