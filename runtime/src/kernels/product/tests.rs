use super::*;

/// Runs every task on the calling thread, the last one first: tasks must not depend on their order.
pub(crate) struct Alone;

impl Threads for Alone {
    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..count).rev().for_each(task);
    }
}

/// Several threads that take the tasks in turn.
pub(crate) struct Crowd;

impl Threads for Crowd {
    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for first in 0..3 {
                let set = isa::tests::current();
                scope.spawn(move || isa::tests::inherit(set, || (first..count).step_by(3).for_each(task)));
            }
        });
    }
}

/// Values between −1 and 1 without a pattern that a wrong index could hide in.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Rows, columns and terms that leave every kind of remainder, and both ways of going through the right operand.
const SHAPES: [(usize, usize, usize); 13] = [
    (1, 1, 1),
    (1, 7, 40),
    (3, 3, 40),
    (5, 200, 77),
    (8, 48, 16),
    (16, 7, 9),
    (17, 33, 29),
    (20, 96, 8),
    (64, 16, 1),
    (70, 100, 600),
    (130, 50, 2100),
    (40, 300, 520),
    (9, 1100, 3),
];

/// The sum in ascending order of terms, one rounding a term.
fn in_order(product: &Product<'_, Bare>, row: usize, column: usize) -> f32 {
    let (left, right) = (product.left, product.right);
    (0..product.terms).fold(product.bias.map_or(0.0, |b| b[column]), |sum, k| {
        left.data[row * left.line + k * left.term]
            .mul_add(right.data[column * right.line + k * right.term], sum)
    })
}

#[test]
fn every_sum_is_in_order_of_its_terms_to_the_last_bit_with_every_instruction_set() {
    for name in isa::tests::available().into_iter().filter(|name| *name != "plain") {
        isa::tests::with(name, sums_are_in_order);
    }
}

#[test]
fn without_fused_multiply_adds_the_sums_are_as_good() {
    let (rows, columns, terms) = (37, 50, 300);
    let (a, b) = (noise(rows * terms, 4), noise(columns * terms, 5));
    for right in [Operand::lines(&b, terms), Operand::columns(&b, columns)] {
        let product = Product {
            rows,
            columns,
            terms,
            left: Operand::lines(&a, terms),
            right,
            bias: None,
            epilogue: Bare,
        };
        let mut answer = vec![f32::NAN; rows * columns];
        let name = if isa::tests::available().contains(&"plain") { "plain" } else { isa::name() };
        isa::tests::with(name, || product.run(&Alone, &mut answer));
        for (i, answer) in answer.iter().enumerate() {
            assert!((answer - in_order(&product, i / columns, i % columns)).abs() < 1e-4);
        }
    }
}

fn sums_are_in_order() {
    for (rows, columns, terms) in SHAPES {
        let (a, b, bias) = (noise(rows * terms, 1), noise(columns * terms, 2), noise(columns, 3));
        for left in [Operand::lines(&a, terms), Operand::columns(&a, rows)] {
            for right in [Operand::lines(&b, terms), Operand::columns(&b, columns)] {
                for bias in [None, Some(&bias[..])] {
                    let product = Product { rows, columns, terms, left, right, bias, epilogue: Bare };
                    let (mut alone, mut crowd) =
                        (vec![f32::NAN; rows * columns], vec![f32::NAN; rows * columns]);
                    product.run(&Alone, &mut alone);
                    product.run(&Crowd, &mut crowd);
                    for (i, (alone, crowd)) in alone.iter().zip(&crowd).enumerate() {
                        let want = in_order(&product, i / columns, i % columns);
                        assert_eq!(
                            alone.to_bits(),
                            want.to_bits(),
                            "{rows}×{columns}×{terms}: {alone} {want}"
                        );
                        assert_eq!(alone.to_bits(), crowd.to_bits(), "{rows}×{columns}×{terms} on threads");
                    }
                }
            }
        }
    }
}

#[test]
fn an_activation_is_applied_on_the_way_into_either_operand() {
    let (rows, columns, terms) = (37, 50, 300);
    let (a, b) = (noise(rows * terms, 4), noise(columns * terms, 5));
    let (mut gelu_a, mut gelu_b) = (a.clone(), b.clone());
    crate::kernels::gelu::apply(&mut gelu_a);
    crate::kernels::gelu::apply(&mut gelu_b);
    let run = |left: Operand<'_>, right: Operand<'_>| {
        let mut answer = vec![0.0; rows * columns];
        Product { rows, columns, terms, left, right, bias: None, epilogue: Bare }.run(&Alone, &mut answer);
        answer
    };
    let (lines, across) = (Operand::lines(&b, terms), Operand::columns(&b, columns));
    for (operand, activated) in [
        (Operand::lines(&a, terms), Operand::lines(&gelu_a, terms)),
        (Operand::columns(&a, rows), Operand::columns(&gelu_a, rows)),
    ] {
        assert_eq!(run(operand.activated(Activation::Gelu), lines), run(activated, lines));
    }
    let left = Operand::lines(&a, terms);
    assert_eq!(run(left, lines.activated(Activation::Gelu)), run(left, Operand::lines(&gelu_b, terms)));
    assert_eq!(run(left, across.activated(Activation::Gelu)), run(left, Operand::columns(&gelu_b, columns)));
}

/// Multiplies each sum by its row and column numbers.
struct Numbered;

impl Epilogue for Numbered {
    const ACTIVE: bool = true;
    fn finish(&self, row: usize, column: usize, sums: &mut [f32]) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum *= ((row + 1) * (column + i + 1)) as f32;
        }
    }
}

#[test]
fn the_epilogue_sees_every_sum_once_with_its_place() {
    for (rows, columns, terms) in SHAPES {
        let (a, b) = (noise(rows * terms, 6), noise(columns * terms, 7));
        for right in [Operand::lines(&b, terms), Operand::columns(&b, columns)] {
            let left = Operand::lines(&a, terms);
            let (mut bare, mut numbered) = (vec![0.0; rows * columns], vec![0.0; rows * columns]);
            Product { rows, columns, terms, left, right, bias: None, epilogue: Bare }.run(&Alone, &mut bare);
            Product { rows, columns, terms, left, right, bias: None, epilogue: Numbered }
                .run(&Alone, &mut numbered);
            for (i, (bare, numbered)) in bare.iter().zip(&numbered).enumerate() {
                let factor = ((i / columns + 1) * (i % columns + 1)) as f32;
                assert_eq!(bare * factor, *numbered, "{rows}×{columns}×{terms}");
            }
        }
    }
}

#[test]
fn no_terms_leave_the_bias() {
    let bias = noise(5, 8);
    for rows in [2, 20] {
        let (left, right) = (Operand::lines(&[], 0), Operand::lines(&[], 0));
        let mut answer = vec![f32::NAN; rows * 5];
        let left = Operand { term: 1, ..left };
        Product { rows, columns: 5, terms: 0, left, right, bias: Some(&bias), epilogue: Bare }
            .run(&Alone, &mut answer);
        assert!(answer.chunks(5).all(|row| row == bias));
    }
}
