//! The way back: which node of the graph does a node of a rewritten model stem from?

use std::collections::BTreeMap;

use onnx_protobuf::ModelProto;
use protobuf::Message;

use crate::error::{GraphError, Result};
use crate::graph::{Graph, ValueId};

/// What a backward node's name begins with.
pub(super) const BACKWARD: &str = "grad/";

/// Name of an ONNX node that `node` of the graph is emitted as.
pub(super) fn node_name(graph: &Graph, node: usize, op_type: &str) -> String {
    let (n, mark) = (&graph.nodes[node], BACKWARD);
    format!("{}{}/{op_type}.{node}", if n.backward { mark } else { "" }, n.place.scope)
}

impl Graph {
    /// The graph node that each named node of `model` stems from, where `model` is this graph's emitted program as an
    /// ONNX runtime rewrote it.
    ///
    /// By the name, which rewriting keeps or extends; else by the value that is computed; else by the next node that
    /// uses the answer; else by the one that made the operand. Nodes that none of this finds are left out.
    ///
    /// # Errors
    /// [`GraphError::Emit`] when the bytes are no model.
    pub fn origins(&self, model: &[u8]) -> Result<BTreeMap<String, ValueId>> {
        let model = ModelProto::parse_from_bytes(model)
            .map_err(|e| GraphError::Emit { graph: self.name.clone(), reason: e.to_string() })?;
        let nodes = &model.graph.node;
        let outputs: BTreeMap<&str, usize> =
            self.outputs.iter().map(|(name, id)| (name.as_str(), id.index())).collect();
        let by_value = |name: &String| {
            let number = name.strip_prefix('v').and_then(|n| n.parse::<usize>().ok());
            number.filter(|n| *n < self.nodes.len()).or_else(|| outputs.get(name.as_str()).copied())
        };
        let mut found: Vec<Option<usize>> = nodes
            .iter()
            .map(|n| {
                self.origin_of(&n.name).map(ValueId::index).or_else(|| n.output.iter().find_map(by_value))
            })
            .collect();
        // Nodes that a rewrite put in stand beside the one they serve: first look down the graph, then up.
        let mut users: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        let mut makers: BTreeMap<&str, usize> = BTreeMap::new();
        for (i, n) in nodes.iter().enumerate() {
            n.input.iter().for_each(|v| users.entry(v).or_default().push(i));
            makers.extend(n.output.iter().map(|v| (v.as_str(), i)));
        }
        for i in (0..nodes.len()).rev() {
            if found[i].is_none() {
                let mut below =
                    nodes[i].output.iter().flat_map(|v| users.get(v.as_str()).into_iter().flatten());
                found[i] = below.find_map(|&u| found[u]);
            }
        }
        for i in 0..nodes.len() {
            if found[i].is_none() {
                let mut above = nodes[i].input.iter().filter_map(|v| makers.get(v.as_str()));
                found[i] = above.find_map(|&m| found[m]);
            }
        }
        let named = nodes.iter().zip(found).filter(|(n, _)| !n.name.is_empty());
        Ok(named.filter_map(|(n, i)| Some((n.name.clone(), ValueId(i? as u32)))).collect())
    }

    /// The graph node that an emitted node's name tells, also where a rewrite has extended the name.
    pub fn origin_of(&self, name: &str) -> Option<ValueId> {
        name.match_indices('/').find_map(|(slash, _)| {
            let (scope, rest) = (&name[..slash], &name[slash + 1..]);
            let scope = scope.strip_prefix(BACKWARD).unwrap_or(scope);
            let (op, number) = rest.split_once('.')?;
            let digits = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
            let index = number[..digits].parse::<usize>().ok()?;
            let node = self.nodes.get(index)?;
            let plain = op.chars().all(char::is_alphanumeric);
            let own = node.place.scope.as_str();
            let fits = scope == own || !own.is_empty() && scope.ends_with(own);
            (plain && fits).then_some(ValueId(index as u32))
        })
    }
}

#[cfg(test)]
mod tests {
    use onnx_protobuf::NodeProto;

    use super::*;
    use crate::{Builder, Dim, Init, Type, Weights};

    fn graph() -> Graph {
        let b = Builder::new("test");
        let x = b.input("x", Type::f32([4, 3]));
        let w = b.root().at("blocks.0.fc").param("weight", &[Dim::Width(5), Dim::Fixed(3)], Init::Zeros);
        let loss = x.matmul(w.transpose(&[1, 0])).gelu().mean(&[0, 1]).reshape([]);
        let grads = b.gradients(loss, &[w]).unwrap();
        b.output("loss", loss);
        b.output("grad", grads[0]);
        b.finish().unwrap().optimised().unwrap()
    }

    #[test]
    fn emitted_nodes_know_where_they_come_from() {
        let graph = graph();
        let program = graph.emit(Weights::Inputs).unwrap();
        let model = ModelProto::parse_from_bytes(&program.bytes).unwrap();
        let origins = graph.origins(&program.bytes).unwrap();
        assert_eq!(origins.len(), model.graph.node.len());
        for (name, id) in &origins {
            let node = graph.node(*id);
            assert_eq!(name.starts_with(BACKWARD), node.backward, "{name}");
            assert!(name.contains(node.place.scope.as_str()), "{name} {}", node.place.scope);
        }
        assert!(origins.values().any(|id| graph.node(*id).backward));
    }

    #[test]
    fn rewritten_nodes_are_found_again() {
        let graph = graph();
        let mut model = ModelProto::parse_from_bytes(&graph.emit(Weights::Inputs).unwrap().bytes).unwrap();
        let product = model.graph.node.iter().position(|n| n.op_type == "MatMul").unwrap();
        let (name, origin) = {
            let node = &mut model.graph.mut_or_insert_default().node[product];
            let origin = graph.origin_of(&node.name).unwrap();
            node.name += "/MatMulAddFusion/GemmTransposeFusion/";
            node.input[0] = "made up".into();
            (node.name.clone(), origin)
        };
        let put_in = |name: &str, input: &str, output: &str| NodeProto {
            name: name.into(),
            op_type: "Reshape".into(),
            input: vec![input.into()],
            output: vec![output.into()],
            ..NodeProto::default()
        };
        let value = model.graph.node[product].output[0].clone();
        let nodes = &mut model.graph.mut_or_insert_default().node;
        nodes.insert(product, put_in("gemm_input_reshape_token_3", "x", "made up"));
        nodes.push(put_in("left over", &value, "nobody's"));
        nodes.push(put_in("stranger", "from nowhere", "to nowhere"));
        let origins = graph.origins(&model.write_to_bytes().unwrap()).unwrap();
        assert_eq!(origins[&name], origin, "by the beginning of its name");
        assert_eq!(origins["gemm_input_reshape_token_3"], origin, "by its user");
        assert_eq!(origins["left over"], origin, "by its maker");
        assert!(!origins.contains_key("stranger"));
        assert!(graph.origins(b"no model").is_err());
    }

    #[test]
    fn a_name_must_fit_its_node() {
        let graph = graph();
        let id = graph.nodes().iter().position(|n| n.op.name() == "MatMul").unwrap();
        let scope = &graph.nodes()[id].place.scope;
        assert_eq!(graph.origin_of(&format!("{scope}/MatMul.{id}")).map(ValueId::index), Some(id));
        assert_eq!(graph.origin_of(&format!("grad/{scope}/MatMul.{id}/Fused")).map(ValueId::index), Some(id));
        for wrong in [format!("{scope}x/MatMul.{id}"), format!("{scope}/MatMul.9999"), format!("MatMul_{id}")]
        {
            assert_eq!(graph.origin_of(&wrong), None, "{wrong}");
        }
    }
}
