//! Which provider runs which node of a session.
#![allow(unsafe_code, reason = "asks ONNX Runtime's C interface")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::fmt;
use std::ptr;

use ort::AsPointer;
use ort::sys::{OrtEpAssignedNode, OrtEpAssignedSubgraph, OrtStatusPtr};
use serde::{Deserialize, Serialize};

use crate::error::{Result, RuntimeError};
use crate::library::Runtime;
use crate::provider::Provider;
use crate::session::Session;

/// One node of the graph as ONNX Runtime runs it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlacedNode {
    /// ONNX Runtime's name of the provider: `CPUExecutionProvider`, `CUDAExecutionProvider` …
    pub provider: String,
    /// The node's name; may be empty.
    pub name: String,
    /// Domain of its op; empty for ONNX's own.
    pub domain: String,
    /// Its op.
    pub op: String,
}

/// Where every node of a session is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// The nodes, in ONNX Runtime's order.
    pub nodes: Vec<PlacedNode>,
}

impl Placement {
    /// Number of nodes of each provider.
    pub fn by_provider(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for node in &self.nodes {
            *counts.entry(node.provider.as_str()).or_insert(0) += 1;
        }
        counts
    }

    /// The nodes that another provider than `provider` runs.
    pub fn elsewhere<'a>(&'a self, provider: &'a str) -> impl Iterator<Item = &'a PlacedNode> {
        self.nodes.iter().filter(move |n| n.provider != provider)
    }
}

/// Who runs a model, in short.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementSummary {
    /// Number of nodes by provider and op.
    pub nodes: BTreeMap<String, BTreeMap<String, usize>>,
    /// The nodes that another provider than the wanted one runs, in ONNX Runtime's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<String>,
}

impl Placement {
    /// In short; `wanted` is ONNX Runtime's name of the provider that should run all nodes.
    pub fn summary(&self, wanted: &str) -> PlacementSummary {
        let mut nodes: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
        for node in &self.nodes {
            *nodes.entry(node.provider.clone()).or_default().entry(node.qualified_op()).or_default() += 1;
        }
        PlacementSummary { nodes, elsewhere: self.elsewhere(wanted).map(ToString::to_string).collect() }
    }
}

impl fmt::Display for PlacementSummary {
    /// A line for each provider, most frequent ops first, and one for each node that is elsewhere.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (provider, ops)) in self.nodes.iter().enumerate() {
            let mut sorted: Vec<(&String, &usize)> = ops.iter().collect();
            sorted.sort_by_key(|(op, count)| (usize::MAX - **count, op.as_str()));
            let ops: Vec<String> = sorted.iter().map(|(op, count)| format!("{count} {op}")).collect();
            let total: usize = sorted.iter().map(|(_, count)| **count).sum();
            let line = if i == 0 { "" } else { "\n" };
            write!(f, "{line}{total} nodes on {provider}: {}", ops.join(", "))?;
        }
        self.elsewhere.iter().try_for_each(|node| write!(f, "\n  elsewhere: {node}"))
    }
}

impl PlacedNode {
    /// The op, with its domain if that is not ONNX's.
    fn qualified_op(&self) -> String {
        if self.domain.is_empty() { self.op.clone() } else { format!("{}.{}", self.domain, self.op) }
    }
}

impl fmt::Display for PlacedNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}` on {}", self.qualified_op(), self.name, self.provider)
    }
}

impl Session {
    /// Which provider runs which node; the session must have been loaded with
    /// [`record_placement`](crate::SessionOptions::record_placement).
    ///
    /// # Errors
    /// [`RuntimeError::Ort`].
    pub fn placement(&self) -> Result<Placement> {
        let session = self.lock();
        read(session.ptr()).map_err(|e| RuntimeError::ort("tell where the nodes are", &e))
    }
}

/// Refuses a session on TensorRT of which it has taken nothing: all of it would run on the CUDA provider.
///
/// # Errors
/// [`RuntimeError::Load`].
pub(crate) fn refuse_none(
    program: &str,
    provider: &Provider,
    session: &ort::session::Session,
    runtime: &Runtime,
) -> Result<()> {
    if !matches!(provider, Provider::TensorRt(_)) {
        return Ok(());
    }
    let placement = read(session.ptr()).map_err(|e| RuntimeError::ort("tell where the nodes are", &e))?;
    let wanted = provider.onnx_runtime_name();
    if placement.nodes.is_empty() || placement.nodes.iter().any(|n| n.provider == wanted) {
        return Ok(());
    }
    let said = runtime.said_by_tensorrt();
    let reason =
        format!("TensorRT took none of its nodes{said}: use provider `cuda`, which runs all of them");
    Err(RuntimeError::Load { program: program.to_owned(), reason })
}

fn read(session: *const ort::sys::OrtSession) -> ort::Result<Placement> {
    let api = ort::api();
    let (mut graphs, mut count) = (ptr::null(), 0);
    // SAFETY: the session is alive and locked; the answers are arrays that it owns.
    unsafe { check((api.Session_GetEpGraphAssignmentInfo)(session, &raw mut graphs, &raw mut count)) }?;
    let mut placement = Placement::default();
    for i in 0..count {
        // SAFETY: `count` pointers lie at `graphs`.
        let graph: *const OrtEpAssignedSubgraph = unsafe { *graphs.add(i) };
        // SAFETY: a graph of the list.
        let provider = text(|out| unsafe { (api.EpAssignedSubgraph_GetEpName)(graph, out) })?;
        let (mut nodes, mut count) = (ptr::null(), 0);
        // SAFETY: as above.
        unsafe { check((api.EpAssignedSubgraph_GetNodes)(graph, &raw mut nodes, &raw mut count)) }?;
        for j in 0..count {
            // SAFETY: `count` pointers lie at `nodes`.
            let node: *const OrtEpAssignedNode = unsafe { *nodes.add(j) };
            // SAFETY: a node of the list, in all three.
            let (name, domain, op) = unsafe {
                (
                    text(|out| (api.EpAssignedNode_GetName)(node, out))?,
                    text(|out| (api.EpAssignedNode_GetDomain)(node, out))?,
                    text(|out| (api.EpAssignedNode_GetOperatorType)(node, out))?,
                )
            };
            placement.nodes.push(PlacedNode { provider: provider.clone(), name, domain, op });
        }
    }
    Ok(placement)
}

fn text(ask: impl Fn(*mut *const c_char) -> OrtStatusPtr) -> ort::Result<String> {
    let mut text = ptr::null();
    // SAFETY: the status is that of a call just made.
    unsafe { check(ask(&raw mut text)) }?;
    if text.is_null() {
        return Ok(String::new());
    }
    // SAFETY: a C string that the session owns.
    Ok(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// # Safety
/// `status` comes straight from a call of the C interface.
unsafe fn check(status: OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: the caller's promise.
    unsafe { ort::Error::result_from_status(status) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_by_op_and_names_what_is_elsewhere() {
        let node = |provider: &str, name: &str, domain: &str, op: &str| PlacedNode {
            provider: provider.to_owned(),
            name: name.to_owned(),
            domain: domain.to_owned(),
            op: op.to_owned(),
        };
        let nodes = vec![
            node("B", "blocks.0/a", "", "MatMul"),
            node("A", "final/cast", "", "Cast"),
            node("B", "blocks.0/b", "mudit", "Attention"),
            node("B", "blocks.1/a", "", "MatMul"),
        ];
        let placement = Placement { nodes };
        let text = placement.summary("B").to_string();
        let lines = ["1 nodes on A: 1 Cast", "3 nodes on B: 2 MatMul, 1 mudit.Attention"];
        assert_eq!(text, format!("{}\n{}\n  elsewhere: Cast `final/cast` on A", lines[0], lines[1]));
        assert_eq!(placement.summary("A").elsewhere.len(), 3);
    }
}
