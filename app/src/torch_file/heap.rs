//! What a pickle may hold: values, composite objects, and the closed list of names.

use super::tensor::{ElementType, StorageRef, TensorRef};

/// Why a pickle is not read, in words.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused(pub(crate) String);

pub(super) type Result<T> = std::result::Result<T, Refused>;

pub(super) fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(Refused(reason.into()))
}

/// A number, or the number of an object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float,
    Object(usize),
}

/// The names that a state dict may refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(ElementType),
}

impl Known {
    pub(super) fn find(module: &str, name: &str) -> Result<Self> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch" | "torch.storage", storage) if ElementType::of_storage(storage).is_some() => {
                ElementType::of_storage(storage).map_or(Self::Size, Self::Storage)
            }
            ("__torch__", _) => return refuse("it is a TorchScript program, not a state dict"),
            (module, _) if module.starts_with("__torch__.") => {
                return refuse("it is a TorchScript program, not a state dict");
            }
            _ => {
                return refuse(format!(
                    "it refers to `{module}.{name}`, which no state dict needs; nothing was executed"
                ));
            }
        })
    }
}

/// A composite object.
#[derive(Clone, Debug)]
pub(crate) enum Object {
    Text(String),
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Known(Known),
    Storage(StorageRef),
    Tensor(TensorRef),
}

/// What a pickle said.
#[derive(Debug)]
pub(crate) struct Heap {
    pub(super) objects: Vec<Object>,
    /// The object as a whole.
    pub(crate) root: Value,
}

impl Heap {
    /// The object behind a value.
    pub(crate) fn object(&self, value: Value) -> Option<&Object> {
        match value {
            Value::Object(i) => self.objects.get(i),
            _ => None,
        }
    }

    /// All objects, in the order of their making.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.iter()
    }

    /// The text behind a value.
    pub(crate) fn text(&self, value: Value) -> Option<&str> {
        match self.object(value) {
            Some(Object::Text(text)) => Some(text),
            _ => None,
        }
    }
}
