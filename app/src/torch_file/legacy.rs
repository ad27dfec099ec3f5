//! The format before PyTorch 1.6: five pickles, then the storages one after the other.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use indexmap::IndexMap;

use super::heap::{Heap, Object, Refused, Value};
use super::pickle;
use super::{Container, MAX_PICKLE};

/// What the first pickle holds: 0x1950a86a20f9469cfc6c, as the bytes of `LONG1`.
const MAGIC: [u8; 14] = [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Version of the format.
const VERSION: i64 = 1001;

/// Reads the pickles and finds out where each storage begins.
pub(super) fn open(mut file: BufReader<File>, length: u64) -> Result<(Container, Heap), Refused> {
    let mut magic = [0; MAGIC.len() + 1];
    let short = |e: std::io::Error| Refused(format!("it is cut short: {e}"));
    file.read_exact(&mut magic).map_err(short)?;
    if magic[..MAGIC.len()] != MAGIC {
        return Err(Refused("it is a pickle that `torch.save` did not write".into()));
    }
    let mut pickles = file.take(MAX_PICKLE);
    let version = pickle::read(&mut pickles)?.root;
    if version != Value::Int(VERSION) {
        return Err(Refused(format!("its format has version {version:?}, expected {VERSION}")));
    }
    let system = pickle::read(&mut pickles)?;
    let Some(Object::Dict(facts)) = system.object(system.root) else {
        return Err(Refused("it does not say on what machine it was written".into()));
    };
    let little = facts.iter().find(|(key, _)| system.text(*key) == Some("little_endian"));
    if !matches!(little, Some((_, Value::Bool(true)))) {
        return Err(Refused("its numbers are not little endian".into()));
    }
    let heap = pickle::read(&mut pickles)?;
    let order = pickle::read(&mut pickles)?;
    let Some(Object::List(keys)) = order.object(order.root) else {
        return Err(Refused("it does not list its storages".into()));
    };
    let mut file = pickles.into_inner();
    let sizes = storages(&heap);
    let mut first_byte = IndexMap::with_capacity(keys.len());
    for key in keys {
        let Some(key) = order.text(*key) else {
            return Err(Refused("it names a storage by what is no text".into()));
        };
        let mut numel = [0; 8];
        file.read_exact(&mut numel).map_err(short)?;
        let numel = u64::from_le_bytes(numel);
        let at = file.stream_position().map_err(short)?;
        let Some((element, expected)) = sizes.get(key) else {
            return Err(Refused(format!("no tensor uses its storage `{key}`")));
        };
        if numel != *expected {
            return Err(Refused(format!("its storage `{key}` has {numel} elements, expected {expected}")));
        }
        let end =
            numel.checked_mul(*element).and_then(|bytes| at.checked_add(bytes)).filter(|end| *end <= length);
        let Some(end) = end else { return Err(Refused(format!("it ends before its storage `{key}`"))) };
        file.seek(SeekFrom::Start(end)).map_err(short)?;
        first_byte.insert(key.to_owned(), at);
    }
    Ok((Container::Legacy { file, first_byte }, heap))
}

/// Bytes of an element and number of elements of every storage that a pickle refers to.
fn storages(heap: &Heap) -> IndexMap<&str, (u64, u64)> {
    let found = heap.objects().filter_map(|object| match object {
        Object::Storage(s) => Some((s.key.as_str(), (s.element.bytes() as u64, s.numel))),
        _ => None,
    });
    found.collect()
}
