//! The files that an ONNX model reads: itself, and those beside it that its tensors point into.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::Context;
use onnx_protobuf::tensor_proto::DataLocation;
use onnx_protobuf::{GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto};
use protobuf::{CodedInputStream, Message};
use runtime::file::{sha256_bytes, sha256_file};

/// SHA-256 of all that decides about a model: of its file, or of the hashes of its file and of those beside it.
///
/// # Errors
/// A file that cannot be read or is no model.
pub(super) fn sha256_of_model(path: &Path) -> anyhow::Result<String> {
    let beside = files_beside(path)?;
    let own = sha256_file(path)?;
    if beside.is_empty() {
        return Ok(own);
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    let mut all = own;
    for name in beside {
        let file = directory.join(&name);
        let hash = sha256_file(&file)
            .with_context(|| format!("{} has weights in `{name}` beside it", path.display()))?;
        // The name counts, as two files that are swapped are another network.
        all.extend(["\n", &hash, " ", &name]);
    }
    Ok(sha256_bytes(all.as_bytes()))
}

/// Names of the files that tensors of the model lie in, in order.
fn files_beside(path: &Path) -> anyhow::Result<BTreeSet<String>> {
    let unusable = || format!("{} is no usable ONNX model", path.display());
    let mut reader = BufReader::new(File::open(path).with_context(unusable)?);
    let model =
        ModelProto::parse_from(&mut CodedInputStream::from_buf_read(&mut reader)).with_context(unusable)?;
    let mut found = Found::default();
    if let Some(graph) = model.graph.as_ref() {
        found.graph(graph);
    }
    model.functions.iter().flat_map(|f| &f.node).for_each(|n| found.node(n));
    Ok(found.names)
}

#[derive(Default)]
struct Found {
    names: BTreeSet<String>,
}

impl Found {
    fn graph(&mut self, graph: &GraphProto) {
        graph.initializer.iter().for_each(|t| self.tensor(t));
        graph.sparse_initializer.iter().for_each(|t| self.sparse(t));
        graph.node.iter().for_each(|n| self.node(n));
    }

    fn node(&mut self, node: &NodeProto) {
        for attribute in &node.attribute {
            attribute.t.iter().chain(&attribute.tensors).for_each(|t| self.tensor(t));
            attribute.sparse_tensor.iter().chain(&attribute.sparse_tensors).for_each(|t| self.sparse(t));
            attribute.g.iter().chain(&attribute.graphs).for_each(|g| self.graph(g));
        }
    }

    fn sparse(&mut self, tensor: &SparseTensorProto) {
        tensor.values.iter().chain(&tensor.indices).for_each(|t| self.tensor(t));
    }

    fn tensor(&mut self, tensor: &TensorProto) {
        if tensor.data_location.enum_value() == Ok(DataLocation::EXTERNAL) {
            let place = tensor.external_data.iter().find(|entry| entry.key == "location");
            self.names.extend(place.map(|entry| entry.value.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use onnx_protobuf::{AttributeProto, FunctionProto, StringStringEntryProto};
    use protobuf::MessageField;

    use super::*;

    fn external(file: &str) -> TensorProto {
        let place = StringStringEntryProto {
            key: "location".into(),
            value: file.into(),
            ..StringStringEntryProto::new()
        };
        TensorProto {
            data_location: DataLocation::EXTERNAL.into(),
            external_data: vec![place],
            ..TensorProto::new()
        }
    }

    fn node(attribute: AttributeProto) -> NodeProto {
        NodeProto { attribute: vec![attribute], ..NodeProto::new() }
    }

    #[test]
    fn every_file_that_a_model_reads_decides_about_its_hash() {
        let inner = GraphProto { initializer: vec![external("branch.bin")], ..GraphProto::new() };
        let constant =
            AttributeProto { t: MessageField::some(external("constant.bin")), ..Default::default() };
        let branch = AttributeProto { g: MessageField::some(inner), ..Default::default() };
        let body = AttributeProto { tensors: vec![external("body.bin")], ..Default::default() };
        let sparse = SparseTensorProto {
            values: MessageField::some(external("values.bin")),
            indices: MessageField::some(external("shard-1.bin")),
            ..SparseTensorProto::new()
        };
        let graph = GraphProto {
            initializer: vec![external("shard-1.bin"), external("shard-2.bin"), TensorProto::new()],
            sparse_initializer: vec![sparse],
            node: vec![node(constant), node(branch)],
            ..GraphProto::new()
        };
        let function = FunctionProto { node: vec![node(body)], ..FunctionProto::new() };
        let model =
            ModelProto { graph: MessageField::some(graph), functions: vec![function], ..ModelProto::new() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net.onnx");
        std::fs::write(&path, model.write_to_bytes().unwrap()).unwrap();
        let names = ["body.bin", "branch.bin", "constant.bin", "shard-1.bin", "shard-2.bin", "values.bin"];
        assert!(files_beside(&path).unwrap().iter().eq(names));
        let error = format!("{:#}", sha256_of_model(&path).unwrap_err());
        assert!(error.contains("body.bin"), "{error}");
        for name in names {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let mut hashes = BTreeSet::from([sha256_of_model(&path).unwrap()]);
        for name in names {
            std::fs::write(dir.path().join(name), "other").unwrap();
            assert!(hashes.insert(sha256_of_model(&path).unwrap()), "{name}");
        }
        // A model that is all in one file has that file's hash, as ever.
        std::fs::write(&path, ModelProto::new().write_to_bytes().unwrap()).unwrap();
        assert_eq!(sha256_of_model(&path).unwrap(), sha256_file(&path).unwrap());
    }
}
