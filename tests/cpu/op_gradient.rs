//! Every gradient rule against the numerical derivative in f64.

use graph_builder::{Builder, DType, Graph, GraphError, Value};
use mudit_tests::difference::{along, dot, relative};
use mudit_tests::draws::Draws;
use mudit_tests::op_rows::rows;
use mudit_tests::op_table::{Row, Slope};

/// `Σ weights · op(operands)`, a scalar that depends on every element of the answer.
fn loss<'g>(row: &Row, b: &'g Builder, operands: &[Value<'g>]) -> Value<'g> {
    let terms = (row.build)(b, operands).results().into_iter().enumerate().map(|(i, result)| {
        let (result, shape) = (result.cast(DType::F32), result.shape());
        let weights = Draws::named(&format!("weights {i}")).uniform(shape.dims(), 0.5, 1.5);
        let weights = b.constant(DType::F32, shape.clone(), weights.iter().copied().collect::<Vec<_>>());
        (result * weights).sum(&(0..shape.rank()).collect::<Vec<_>>()).reshape([])
    });
    terms.reduce(|sum, term| sum + term).unwrap()
}

/// The graph of the loss and of its gradients with respect to every operand.
fn graph(row: &Row) -> Result<Graph, GraphError> {
    let b = Builder::new(row.name());
    let operands = row.declare(&b);
    let loss = loss(row, &b, &operands);
    b.output("loss", loss);
    for (i, gradient) in b.gradients(loss, &operands)?.into_iter().enumerate() {
        b.output(&format!("grad.{i}"), gradient);
    }
    b.finish()
}

#[test]
fn gradients_are_the_numerical_derivatives() {
    let mut worst = (0.0, String::new());
    for row in rows().iter().filter(|r| r.slope != Slope::Refused) {
        let graph = graph(row).unwrap_or_else(|e| panic!("{}: {e}", row.name()));
        let feeds = row.feeds();
        let values = graph.eval(&feeds).unwrap();
        for (i, operand) in row.operands.iter().enumerate() {
            let gradient = &values[1 + i];
            assert_eq!(gradient.shape(), operand.ty.shape.dims(), "{}: operand {i}", row.name());
            let tolerance = match row.slope {
                Slope::Smooth(tolerance) if operand.ty.dtype.is_float() => tolerance,
                _ => {
                    assert!(gradient.iter().all(|&g| g == 0.0), "{}: operand {i} is flat", row.name());
                    continue;
                }
            };
            let direction = Draws::named("direction").uniform(gradient.shape(), -1.0, 1.0);
            let want = along(&graph, &feeds, &Row::operand_name(i), &direction);
            let error = relative(dot(gradient, &direction), want);
            assert!(error <= tolerance, "{}: operand {i}: relative error {error:e}", row.name());
            if error > worst.0 {
                worst = (error, row.name());
            }
        }
    }
    println!("worst derivative: {:.1e}, {}", worst.0, worst.1);
}

#[test]
fn an_op_without_a_derivative_says_so() {
    for row in rows().iter().filter(|r| r.slope == Slope::Refused) {
        for i in 0..row.operands.len() {
            let b = Builder::new(row.name());
            let operands = row.declare(&b);
            let loss = loss(row, &b, &operands);
            match b.gradients(loss, &operands[i..=i]) {
                Err(GraphError::NotDifferentiable { op, operand, place }) => {
                    assert_eq!((op, operand), (row.op, i), "{}", row.name());
                    assert!(place.file.ends_with("_rows.rs"), "{}: {place}", row.name());
                }
                other => panic!("{}: operand {i}: {other:?}", row.name()),
            }
        }
    }
}

#[test]
fn where_two_operands_are_equal_the_cotangent_of_their_maximum_goes_to_the_first() {
    let b = Builder::new("tie");
    let (x, y) = (b.scalar(0.5), b.scalar(0.5));
    let gradients = b.gradients(x.maximum(y), &[x, y]).unwrap();
    b.output("x", gradients[0]);
    b.output("y", gradients[1]);
    let values = b.finish().unwrap().eval(&std::collections::BTreeMap::new()).unwrap();
    assert_eq!((values[0].sum(), values[1].sum()), (1.0, 0.0));
}

#[test]
fn a_value_that_does_not_reach_the_loss_gets_zeros_and_no_loss_but_a_scalar_is_taken() {
    use graph_builder::Type;
    let b = Builder::new("unreached");
    let (x, y) = (b.input("x", Type::f32([2])), b.input("y", Type::f32([3])));
    let refused = b.gradients(x, &[x]);
    assert!(matches!(refused, Err(GraphError::Loss { ref got }) if got == "f32(2)"), "{refused:?}");
    let loss = x.sum(&[0]).reshape([]);
    b.output("y", b.gradients(loss, &[y]).unwrap()[0]);
    let graph = b.finish().unwrap();
    let feeds = [
        ("x".to_owned(), ndarray::arr1(&[1.0, 2.0]).into_dyn()),
        ("y".to_owned(), ndarray::arr1(&[0.0; 3]).into_dyn()),
    ];
    assert_eq!(graph.eval(&feeds.into()).unwrap()[0], ndarray::arr1(&[0.0; 3]).into_dyn());
}
