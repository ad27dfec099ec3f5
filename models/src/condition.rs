//! What a model is conditioned on: nothing or a class. As graph inputs, and as named columns on the host.

use graph_builder::{Builder, DType, Type, Value};

use crate::error::ModelError;

/// What a network takes beside the image and the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conditioning {
    /// Nothing.
    None,
    /// A class.
    Class(Classes),
}

/// Classes by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Classes {
    /// How many there are, without the null class.
    pub count: usize,
    /// Whether there is a null class, whose number is [`Self::count`]: training puts it in the place of some labels, guidance
    /// asks for it.
    pub null: bool,
}

impl Classes {
    /// Rows of a table of classes.
    pub const fn rows(self) -> usize {
        self.count + if self.null { 1 } else { 0 }
    }

    /// Number of the null class.
    pub const fn null_class(self) -> Option<usize> {
        if self.null { Some(self.count) } else { None }
    }
}

/// An input of the condition: its name in programs, and one sample's type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Name of the input.
    pub name: &'static str,
    /// Element type, and the shape without the batch.
    pub sample: Type,
}

/// Name of the input that is a class.
pub const CLASS: &str = "y";

impl Conditioning {
    /// The inputs, in the order in which programs declare them.
    pub fn ports(&self) -> Vec<Port> {
        match self {
            Self::None => Vec::new(),
            Self::Class(_) => vec![Port { name: CLASS, sample: Type::new(DType::I64, []) }],
        }
    }

    /// The classes of a model that has some.
    pub const fn classes(&self) -> Option<Classes> {
        match self {
            Self::Class(classes) => Some(*classes),
            Self::None => None,
        }
    }

    /// How many classes there are, without the null class; 0 for a model without classes.
    pub fn class_count(&self) -> usize {
        self.classes().map_or(0, |classes| classes.count)
    }

    /// Number of the null class, of a model that has one.
    pub fn null_class(&self) -> Option<usize> {
        self.classes().and_then(Classes::null_class)
    }

    /// Whether there is a null condition, which guidance needs.
    pub const fn has_null(&self) -> bool {
        match self {
            Self::Class(classes) => classes.null,
            Self::None => false,
        }
    }

    /// Why a model without a null condition cannot be guided.
    pub(crate) fn no_null(&self) -> ModelError {
        let (key, expected, got) = match self {
            Self::None => ("guidance", "off: the model has no condition", "on"),
            Self::Class(_) => ("class_dropout_prob", "above 0 for guidance, which needs the null class", "0"),
        };
        ModelError::BadValue { key, expected: expected.into(), got: got.into() }
    }

    /// Declares the inputs for `n` samples.
    pub(crate) fn declare<'g>(&self, b: &'g Builder, n: usize) -> Condition<'g> {
        match self {
            Self::None => Condition::None,
            Self::Class(_) => Condition::Class(b.input(CLASS, Type::new(DType::I64, [n]))), // (N)
        }
    }

    /// The null condition of as many samples as `like` has; `None` where the model has none.
    pub(crate) fn null<'g>(&self, like: &Condition<'g>) -> Option<Condition<'g>> {
        match (self, like) {
            (Self::Class(classes), Condition::Class(y)) => {
                // No class has a larger number, so this is the null class in each row: a constant of N values would tie the
                // program to its batch size.
                let null = y.builder().constant(DType::I64, [0; 0], vec![classes.null_class()? as f64]);
                Some(Condition::Class(y.maximum(null))) // (N)
            }
            _ => None,
        }
    }
}

/// The condition of a batch, as values of a graph.
#[derive(Debug, Clone, Copy)]
pub enum Condition<'g> {
    /// Nothing.
    None,
    /// Classes (N) i64.
    Class(Value<'g>),
}

impl<'g> Condition<'g> {
    /// The class of each sample, for a family whose condition it is.
    ///
    /// # Panics
    /// Never: [`Conditioning::declare`] gave what the family asked for.
    pub(crate) fn class(&self) -> Value<'g> {
        match self {
            Self::Class(y) => *y,
            Self::None => unreachable!("a family reads the condition that it declares"),
        }
    }

    /// This batch's rows and then another's.
    pub(crate) fn concat(self, other: Self) -> Self {
        match (self, other) {
            (Self::Class(first), Self::Class(second)) => Self::Class(first.concat(&[second], 0)),
            _ => Self::None,
        }
    }
}
