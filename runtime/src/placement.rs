//! Which provider runs which node of a session.
#![allow(unsafe_code, reason = "asks ONNX Runtime's C interface")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::fmt;
use std::ptr;

use ort::AsPointer;
use ort::sys::{OrtEpAssignedNode, OrtEpAssignedSubgraph, OrtStatusPtr};

use crate::error::{Result, RuntimeError};
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

impl fmt::Display for PlacedNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dot = if self.domain.is_empty() { "" } else { "." };
        write!(f, "{}{dot}{} `{}` on {}", self.domain, self.op, self.name, self.provider)
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
