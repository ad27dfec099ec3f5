//! A pickle machine for state dicts that executes nothing.
//!
//! It knows the opcodes that `torch.save` writes for a dictionary of tensors and a closed list of names. Whatever else a
//! pickle asks for, a class, a function, a module, is refused by its name. Objects lie in one flat list and refer to each
//! other by number, so neither depth nor cycles in the file can hurt; their number is bounded.

use std::collections::HashMap;
use std::io::{self, Read};

use super::heap::{Heap, Known, Object, Refused, Result, Value, refuse};
use super::tensor::{StorageRef, TensorRef};

/// Most objects that a pickle may make. A state dict needs about ten a tensor.
const MAX_OBJECTS: usize = 1 << 20;
/// Longest text, in bytes: names are short.
const MAX_TEXT: usize = 1 << 20;

/// Reads one pickle and leaves the stream behind it.
pub(crate) fn read(input: &mut impl Read) -> Result<Heap> {
    let mut machine =
        Machine { input, objects: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let root = machine.run()?;
    Ok(Heap { objects: machine.objects, root })
}

struct Machine<'a, R> {
    input: &'a mut R,
    objects: Vec<Object>,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
}

impl<R: Read> Machine<'_, R> {
    fn run(&mut self) -> Result<Value> {
        loop {
            let [opcode] = self.bytes()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let [protocol] = self.bytes()?;
                    if !(2..=5).contains(&protocol) {
                        return refuse(format!("pickle protocol {protocol} is not known"));
                    }
                }
                0x95 => {
                    let _: [u8; 8] = self.bytes()?; // a frame's length: the stream says where it ends
                }
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'J' => {
                    let number = i32::from_le_bytes(self.bytes()?);
                    self.push(Value::Int(number.into()))?;
                }
                b'K' => {
                    let [number] = self.bytes()?;
                    self.push(Value::Int(number.into()))?;
                }
                b'M' => {
                    let number = u16::from_le_bytes(self.bytes()?);
                    self.push(Value::Int(number.into()))?;
                }
                0x8a => self.long()?,
                b'G' => {
                    let _: [u8; 8] = self.bytes()?;
                    self.push(Value::Float)?;
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.bytes()?);
                    self.text(length as usize)?;
                }
                0x8c | b'U' => {
                    let [length] = self.bytes()?;
                    self.text(length.into())?;
                }
                b')' => self.make(Object::Tuple(Vec::new()))?,
                b']' => self.make(Object::List(Vec::new()))?,
                b'}' => self.make(Object::Dict(Vec::new()))?,
                0x85..=0x87 => {
                    let n = usize::from(opcode - 0x84);
                    let Some(start) = self.stack.len().checked_sub(n) else { return underflow() };
                    let items = self.stack.split_off(start);
                    self.make(Object::Tuple(items))?;
                }
                b'(' => {
                    self.marks.push(self.stack.len());
                    if self.marks.len() > MAX_OBJECTS {
                        return refuse("it nests too deeply");
                    }
                }
                b't' => {
                    let items = self.above_mark()?;
                    self.make(Object::Tuple(items))?;
                }
                b'l' => {
                    let items = self.above_mark()?;
                    self.make(Object::List(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' => {
                    let items = self.above_mark()?;
                    self.append(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.insert(&[key, value])?;
                }
                b'u' => {
                    let items = self.above_mark()?;
                    self.insert(&items)?;
                }
                b'q' => {
                    let [slot] = self.bytes()?;
                    self.remember(slot.into())?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.bytes()?);
                    self.remember(slot)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let [slot] = self.bytes()?;
                    self.recall(slot.into())?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.bytes()?);
                    self.recall(slot)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.make(Object::Known(Known::find(&module, &name)?))?;
                }
                0x93 => {
                    let (name, module) = (self.pop_text()?, self.pop_text()?);
                    self.make(Object::Known(Known::find(&module, &name)?))?;
                }
                b'Q' => self.persistent()?,
                b'R' => self.call()?,
                b'b' => {
                    // The state of an ordered dictionary is its `_metadata`, versions of modules: nothing of it is needed.
                    self.pop()?;
                    self.top()?;
                }
                b'0' => {
                    self.pop()?;
                }
                other => {
                    return refuse(format!(
                        "pickle opcode 0x{other:02x} has no place in a state dict; nothing was executed"
                    ));
                }
            }
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|e| unreadable(&e))?;
        Ok(bytes)
    }

    /// Text up to the end of the line.
    fn line(&mut self) -> Result<String> {
        const LONGEST: usize = 256;
        let mut line = Vec::new();
        loop {
            match self.bytes()? {
                [b'\n'] => break,
                [_] if line.len() == LONGEST => return refuse("it holds an endless name"),
                [byte] => line.push(byte),
            }
        }
        String::from_utf8(line).map_err(|_| Refused("it holds a name that is not UTF-8".into()))
    }

    fn text(&mut self, length: usize) -> Result<()> {
        if length > MAX_TEXT {
            return refuse(format!("it holds a text of {length} bytes, no name is that long"));
        }
        let mut bytes = Vec::new();
        let read = self.input.by_ref().take(length as u64).read_to_end(&mut bytes);
        if read.map_err(|e| unreadable(&e))? < length {
            return refuse("it ends in the middle");
        }
        let text =
            String::from_utf8(bytes).map_err(|_| Refused("it holds a text that is not UTF-8".into()))?;
        self.make(Object::Text(text))
    }

    /// A little-endian integer of up to eight bytes; longer ones (the magic number of the old format) become none.
    fn long(&mut self) -> Result<()> {
        let [length] = self.bytes()?;
        let mut bytes = [0; 255];
        let bytes = &mut bytes[..length.into()];
        self.input.read_exact(bytes).map_err(|e| unreadable(&e))?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        if bytes.len() > wide.len() {
            return self.push(Value::Float);
        }
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn push(&mut self, value: Value) -> Result<()> {
        if self.stack.len() >= MAX_OBJECTS {
            return refuse(format!("it makes more than {MAX_OBJECTS} objects"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn make(&mut self, object: Object) -> Result<()> {
        if self.objects.len() >= MAX_OBJECTS {
            return refuse(format!("it makes more than {MAX_OBJECTS} objects"));
        }
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }

    fn pop(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(value) if self.stack.len() >= floor => Ok(value),
            _ => underflow(),
        }
    }

    fn pop_text(&mut self) -> Result<String> {
        let value = self.pop()?;
        match self.object(value) {
            Some(Object::Text(text)) => Ok(text.clone()),
            _ => refuse("it names something by what is no text"),
        }
    }

    fn top(&self) -> Result<Value> {
        self.stack.last().copied().map_or_else(underflow, Ok)
    }

    fn above_mark(&mut self) -> Result<Vec<Value>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => underflow(),
        }
    }

    fn object(&self, value: Value) -> Option<&Object> {
        match value {
            Value::Object(i) => self.objects.get(i),
            _ => None,
        }
    }

    fn top_object(&mut self) -> Result<&mut Object> {
        match self.top()? {
            Value::Object(i) => self.objects.get_mut(i).map_or_else(underflow, Ok),
            _ => refuse("it fills what is no container"),
        }
    }

    fn append(&mut self, items: &[Value]) -> Result<()> {
        match self.top_object()? {
            Object::List(list) => list.extend(items),
            _ => return refuse("it appends to what is no list"),
        }
        Ok(())
    }

    fn insert(&mut self, items: &[Value]) -> Result<()> {
        let (pairs, []) = items.as_chunks::<2>() else {
            return refuse("it inserts a key without a value");
        };
        match self.top_object()? {
            Object::Dict(dict) => dict.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            _ => return refuse("it inserts into what is no dictionary"),
        }
        Ok(())
    }

    fn remember(&mut self, slot: u32) -> Result<()> {
        let value = self.top()?;
        self.memo.insert(slot, value);
        if self.memo.len() > MAX_OBJECTS {
            return refuse(format!("it remembers more than {MAX_OBJECTS} objects"));
        }
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<()> {
        let Some(value) = self.memo.get(&slot).copied() else {
            return refuse(format!("it recalls slot {slot}, which is empty"));
        };
        self.push(value)
    }

    /// `('storage', type, key, location, numel[, view])`: where the numbers of a tensor lie.
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let storage = match self.object(id) {
            Some(Object::Tuple(parts)) => self.storage(parts),
            _ => None,
        };
        match storage {
            Some(storage) => self.make(Object::Storage(storage)),
            None => refuse("it refers to something outside that is no whole storage of a tensor"),
        }
    }

    fn storage(&self, parts: &[Value]) -> Option<StorageRef> {
        let text = |value: &Value| match self.object(*value) {
            Some(Object::Text(text)) => Some(text.as_str()),
            _ => None,
        };
        let [tag, class, key, _location, numel, rest @ ..] = parts else { return None };
        let whole = matches!(rest, [] | [Value::None]);
        let (Some(Object::Known(Known::Storage(element))), Value::Int(numel)) = (self.object(*class), numel)
        else {
            return None;
        };
        let numel = u64::try_from(*numel).ok()?;
        (whole && text(tag) == Some("storage")).then_some(())?;
        Some(StorageRef { key: text(key)?.to_owned(), element: *element, numel })
    }

    fn call(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Some(Object::Tuple(arguments)), Some(Object::Known(known))) =
            (self.object(arguments), self.object(function))
        else {
            return refuse("it calls what is no function; nothing was executed");
        };
        let made = match (known, arguments.as_slice()) {
            (Known::OrderedDict, []) => Object::Dict(Vec::new()),
            (Known::Size, [Value::Object(_)]) => Object::Tuple(Vec::new()),
            (Known::RebuildTensor, [storage, offset, size, stride, ..]) => {
                match self.tensor(*storage, *offset, *size, *stride) {
                    Some(tensor) => Object::Tensor(tensor),
                    None => {
                        return refuse("it makes a tensor from what is no storage, offset, size and stride");
                    }
                }
            }
            (Known::RebuildParameter, [inner, ..]) => match self.object(*inner) {
                Some(Object::Tensor(tensor)) => Object::Tensor(tensor.clone()),
                _ => return refuse("it makes a parameter from what is no tensor"),
            },
            _ => return refuse("it calls a function with arguments that do not fit; nothing was executed"),
        };
        self.make(made)
    }

    fn tensor(&self, storage: Value, offset: Value, size: Value, stride: Value) -> Option<TensorRef> {
        let sizes = |value| match self.object(value) {
            Some(Object::Tuple(items)) => items
                .iter()
                .map(|v| match v {
                    Value::Int(n) => usize::try_from(*n).ok(),
                    _ => None,
                })
                .collect::<Option<Vec<usize>>>(),
            _ => None,
        };
        let (Some(Object::Storage(storage)), Value::Int(offset)) = (self.object(storage), offset) else {
            return None;
        };
        let (shape, strides) = (sizes(size)?, sizes(stride)?);
        let offset = usize::try_from(offset).ok()?;
        (shape.len() == strides.len() && shape.len() <= 16).then_some(())?;
        Some(TensorRef { storage: storage.clone(), offset, shape, strides })
    }
}

fn underflow<T>() -> Result<T> {
    refuse("it takes more than it has put")
}

fn unreadable(error: &io::Error) -> Refused {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Refused("it ends in the middle".into()),
        _ => Refused(error.to_string()),
    }
}
