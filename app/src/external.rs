//! Parameters that a program's file points to: where each tensor of a safetensors file lies.

use std::collections::BTreeMap;

use graph_builder::{DType, ExternalTensor, Type};
use runtime::ArenaLayout;
use runtime::safetensors_file::SafetensorsReader;

/// The places of all of a layout's entries in a file whose tensors have the types that `dtype` says.
///
/// # Errors
/// The file lacks an entry.
pub fn tensors(
    reader: &SafetensorsReader,
    layout: &ArenaLayout,
    dtype: impl Fn(&str) -> DType,
) -> anyhow::Result<BTreeMap<String, ExternalTensor>> {
    let entry = |(name, e): (&String, &runtime::ArenaEntry)| {
        let range = reader.byte_range(name)?;
        let ty = Type::new(dtype(name), e.shape.clone());
        Ok((name.clone(), ExternalTensor { ty, offset: range.start, length: range.end - range.start }))
    };
    layout.entries().iter().map(entry).collect()
}
