//! The work of every op: multiply-adds, operations and bytes as the rows state them.
use mudit_tests::op_rows::rows;
use mudit_tests::op_table::Traffic;

#[test]
fn every_op_states_its_work() {
    for row in rows() {
        let graph = row.graph();
        let cost = graph.cost();
        let answer = mudit_tests::op_table::Row::node(&graph).ty.bytes();
        let operands: usize = row.operands.iter().map(|o| o.ty.bytes()).sum();
        // A value that is both operands at once is read twice.
        let twice = mudit_tests::op_table::Row::node(&graph).args.len() > row.operands.len();
        let bytes = match row.traffic {
            Traffic::All if twice => 2 * operands + answer,
            Traffic::All => operands + answer,
            Traffic::Answer => 2 * answer,
            Traffic::Nothing => 0,
        };
        assert_eq!(
            (cost.macs, cost.flops, cost.bytes),
            (row.macs, row.flops, bytes as u64),
            "{}",
            row.name()
        );
    }
}

#[test]
fn costs_by_scope_add_up_to_the_cost_of_the_whole() {
    use graph_builder::Op;
    let graph = crate::tiny::graph("ddpm", models::ProgramKind::TrainStep);
    let by_block = graph.cost_by(|scope| scope.split('.').next().unwrap_or_default().to_owned());
    let sum = by_block.values().copied().fold(graph_builder::op::Cost::default(), |a, b| a + b);
    assert_eq!(sum, graph.cost());
    assert!(by_block.contains_key("blocks") && by_block.contains_key("t_embedder"), "{by_block:?}");
    assert!(graph.nodes().iter().any(|n| matches!(n.op, Op::LinearGradWeight(_)) && n.backward));
}
