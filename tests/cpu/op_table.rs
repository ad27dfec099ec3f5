//! The proof that every op has a row in the op table.

use std::collections::BTreeSet;

use graph_builder::Op;
use mudit_tests::op_rows::rows;
use mudit_tests::op_table::{Row, variant};

#[test]
fn every_op_has_a_row() {
    let rows: BTreeSet<&str> = rows().iter().map(|r| r.op).collect();
    let ops: BTreeSet<&str> = Op::NAMES.iter().copied().collect();
    assert_eq!(rows, ops, "rows without an op, or ops without a row");
}

#[test]
fn every_row_is_named_once_and_proves_its_op() {
    let mut names = BTreeSet::new();
    for row in rows() {
        assert!(names.insert(row.name()), "two rows are called {}", row.name());
        let graph = row.graph();
        let node = if row.op == "Part" { graph.node(graph.outputs()[0].1) } else { Row::node(&graph) };
        assert_eq!(variant(&node.op), row.op, "{}", row.name());
    }
}
