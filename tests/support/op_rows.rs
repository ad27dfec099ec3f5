//! The rows of the op table.

use graph_builder::{DType, Type, Window};

use crate::op_table::{Build, Operand, Range, Row, Slope, Traffic};
use crate::tolerance::{DERIVATIVE, LONG_OP, OP};

/// Added to the variance in layer norms.
pub const EPSILON: f64 = 1e-6;

/// A float operand of `low..high`.
pub fn real<const R: usize>(shape: [usize; R], low: f64, high: f64) -> Operand {
    Operand::new(DType::F32, shape, Range::Real(low, high))
}

/// A float operand of −1..1.
pub fn unit<const R: usize>(shape: [usize; R]) -> Operand {
    real(shape, -1.0, 1.0)
}

fn steps<const R: usize>(shape: [usize; R], shift: f64) -> Operand {
    Operand::new(DType::F32, shape, Range::Steps(shift))
}

fn quarters<const R: usize>(dtype: DType, shape: [usize; R]) -> Operand {
    Operand::new(dtype, shape, Range::Quarters)
}

/// Whole numbers below `n`.
fn whole<const R: usize>(shape: [usize; R], n: usize) -> Operand {
    Operand::new(DType::I64, shape, Range::Below(n))
}

fn truth<const R: usize>(shape: [usize; R]) -> Operand {
    Operand::new(DType::Bool, shape, Range::Below(2))
}

fn parameter(operand: Operand) -> Operand {
    Operand { parameter: true, ..operand }
}

/// A row of a smooth op that reads its operands and writes its answer.
pub fn row(op: &'static str, case: &'static str, operands: Vec<Operand>, flops: u64, build: Build) -> Row {
    let slope = Slope::Smooth(DERIVATIVE);
    Row { op, case, operands, build, slope, parity: OP, macs: 0, flops, traffic: Traffic::All }
}

impl Row {
    fn flat(self) -> Self {
        Self { slope: Slope::Flat, ..self }
    }

    /// A row whose op has no gradient.
    pub fn refused(self) -> Self {
        Self { slope: Slope::Refused, ..self }
    }

    /// A row whose answer cancels or sums many terms.
    pub fn long(self) -> Self {
        self.within(LONG_OP)
    }

    /// A row whose answer is `parity` apart in f32.
    pub fn within(self, parity: f64) -> Self {
        Self { parity, ..self }
    }

    /// A row that moves other bytes.
    pub fn moves(self, traffic: Traffic) -> Self {
        Self { traffic, ..self }
    }

    /// A row with multiply-adds.
    pub fn macs(self, macs: u64) -> Self {
        Self { macs, ..self }
    }
}

/// All rows. An elementwise op has a plain row of 2·3·4 = 24 elements; broadcasting ops have one more a pattern.
pub fn rows() -> Vec<Row> {
    let plain = [
        leaves(),
        unary(),
        binary(),
        choices(),
        reductions(),
        layout(),
        products(),
        convolutions(),
        pools(),
        normalisations(),
    ];
    plain.into_iter().flatten().chain(crate::fused_rows::rows()).collect()
}

fn leaves() -> Vec<Row> {
    vec![
        row("Input", "f32", vec![unit([2, 3])], 0, |_, a| a[0]).moves(Traffic::Nothing),
        row("Parameter", "f32", vec![parameter(unit([2, 3]))], 0, |_, a| a[0]).moves(Traffic::Nothing),
        row("Constant", "filled", vec![], 0, |b, _| b.constant(DType::F32, [2, 3], vec![0.75]))
            .moves(Traffic::Nothing),
        row("Constant", "scalar", vec![], 0, |b, _| b.scalar(-2.5)).moves(Traffic::Nothing),
        row("Constant", "values", vec![], 0, |b, _| b.constant(DType::F32, [3], vec![1.0, -2.0, 0.1]))
            .moves(Traffic::Nothing),
        row("Constant", "i64", vec![], 0, |b, _| b.constant(DType::I64, [2], vec![-7.0, 9.0]))
            .moves(Traffic::Nothing),
        row("Constant", "bool", vec![], 0, |b, _| b.constant(DType::Bool, [2], vec![0.0, 1.0]))
            .moves(Traffic::Nothing),
    ]
}

fn unary() -> Vec<Row> {
    let x = || vec![real([2, 3, 4], -2.0, 2.0)];
    let positive = || vec![real([2, 3, 4], 0.2, 3.0)];
    vec![
        row("Neg", "f32", x(), 24, |_, a| -a[0]),
        row("Exp", "f32", x(), 24, |_, a| a[0].exp()),
        row("Log", "f32", positive(), 24, |_, a| a[0].log()),
        row("Sqrt", "f32", positive(), 24, |_, a| a[0].sqrt()),
        row("Sin", "f32", x(), 24, |_, a| a[0].sin()),
        // The timestep embedding goes to 999 radians.
        row("Sin", "long way", vec![real([2, 3, 4], -999.0, 999.0)], 24, |_, a| a[0].sin()).long(),
        row("Cos", "f32", x(), 24, |_, a| a[0].cos()),
        row("Cos", "long way", vec![real([2, 3, 4], -999.0, 999.0)], 24, |_, a| a[0].cos()).long(),
        row("Tanh", "f32", x(), 24, |_, a| a[0].tanh()),
        row("Sigmoid", "f32", x(), 24, |_, a| a[0].sigmoid()),
        row("Gelu", "f32", x(), 8 * 24, |_, a| a[0].gelu()),
        row("Gelu", "scalar", vec![unit([])], 8, |_, a| a[0].gelu()),
        row("Relu", "f32", vec![steps([2, 3, 4], 0.05)], 24, |_, a| a[0].relu()),
        row("StopGradient", "f32", x(), 0, |_, a| a[0].stop_gradient()).flat(),
        row("Cast", "f32 to i64", vec![quarters(DType::F32, [3, 7])], 0, |_, a| a[0].cast(DType::I64)).flat(),
        row("Cast", "f32 to bool", vec![quarters(DType::F32, [3, 7])], 0, |_, a| a[0].cast(DType::Bool))
            .flat(),
        row("Cast", "f32 to f16", vec![quarters(DType::F32, [3, 7])], 0, |_, a| a[0].cast(DType::F16)),
        row("Cast", "f32 to bf16", vec![quarters(DType::F32, [3, 7])], 0, |_, a| a[0].cast(DType::Bf16)),
        row("Cast", "i64 to f32", vec![whole([3, 7], 1000)], 0, |_, a| a[0].cast(DType::F32)).flat(),
        row("Cast", "bool to f32", vec![truth([3, 7])], 0, |_, a| a[0].cast(DType::F32)).flat(),
    ]
}

fn binary() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut both = |op: &'static str, low: f64, build: Build| {
        let b = |dims: &[usize]| Operand { ty: Type::f32(dims), ..real([], low, low + 2.0) };
        let mut add = |case, a, b, flops| rows.push(row(op, case, vec![a, b], flops, build));
        add("equal shapes", unit([2, 3, 4]), b(&[2, 3, 4]), 24);
        add("a row", unit([2, 3, 4]), b(&[4]), 24);
        add("a scalar", unit([2, 3, 4]), b(&[]), 24);
        add("both grow", unit([2, 1, 4]), b(&[3, 1]), 24);
        add("conditioning", unit([2, 1, 4]), b(&[2, 3, 4]), 24);
    };
    both("Add", -1.0, |_, a| a[0] + a[1]);
    both("Sub", -1.0, |_, a| a[0] - a[1]);
    both("Mul", -1.0, |_, a| a[0] * a[1]);
    both("Div", 0.5, |_, a| a[0] / a[1]);
    rows.push(row("Mul", "a value with itself", vec![unit([2, 3])], 6, |_, a| a[0] * a[0]));
    rows
}

fn choices() -> Vec<Row> {
    let pair = || vec![steps([2, 3, 4], 0.0), steps([2, 3, 4], 0.05)];
    vec![
        row("Maximum", "equal shapes", pair(), 24, |_, a| a[0].maximum(a[1])),
        row("Maximum", "a row", vec![steps([2, 3, 4], 0.0), steps([4], 0.05)], 24, |_, a| a[0].maximum(a[1])),
        row("Maximum", "both grow", vec![steps([2, 1], 0.0), steps([3], 0.05)], 6, |_, a| a[0].maximum(a[1])),
        row("Less", "equal shapes", pair(), 24, |_, a| a[0].less(a[1])).flat(),
        row("Less", "a column", vec![steps([3, 4], 0.0), steps([3, 1], 0.05)], 12, |_, a| a[0].less(a[1]))
            .flat(),
        row("Less", "ties", vec![quarters(DType::F32, [50]), quarters(DType::F32, [50])], 50, |_, a| {
            a[0].less(a[1])
        })
        .flat(),
        row("Equal", "i64", vec![whole([5, 6], 3), whole([5, 6], 3)], 30, |_, a| a[0].equal(a[1])).flat(),
        row("Equal", "one-hot", vec![whole([7, 1], 7), whole([1, 4], 7)], 28, |_, a| a[0].equal(a[1])).flat(),
        row("Select", "equal shapes", vec![truth([2, 3]), unit([2, 3]), unit([2, 3])], 0, |_, a| {
            a[0].select(a[1], a[2])
        }),
        row("Select", "all grow", vec![truth([2, 1, 1]), unit([3, 1]), unit([4])], 0, |_, a| {
            a[0].select(a[1], a[2])
        }),
    ]
}

fn reductions() -> Vec<Row> {
    let x = || vec![unit([2, 3, 4])];
    vec![
        row("Sum", "first axis", x(), 24, |_, a| a[0].sum(&[0])),
        row("Sum", "last axes", x(), 24, |_, a| a[0].sum(&[1, 2])),
        row("Sum", "outer axes", x(), 24, |_, a| a[0].sum(&[0, 2])),
        row("Mean", "last axis", x(), 24, |_, a| a[0].mean(&[2])),
        row("Mean", "all axes", x(), 24, |_, a| a[0].mean(&[0, 1, 2])),
        row("Mean", "all but the first", vec![unit([2, 3, 4, 5])], 120, |_, a| a[0].mean(&[1, 2, 3])),
    ]
}

fn layout() -> Vec<Row> {
    let x = || vec![unit([2, 3, 4])];
    vec![
        row("Reshape", "splits and joins", x(), 0, |_, a| a[0].reshape([6, 2, 2])).moves(Traffic::Nothing),
        row("Reshape", "to a scalar", vec![unit([1, 1])], 0, |_, a| a[0].reshape([])).moves(Traffic::Nothing),
        row("Transpose", "last axes", x(), 0, |_, a| a[0].transpose(&[0, 2, 1])),
        row("Transpose", "a cycle", x(), 0, |_, a| a[0].transpose(&[2, 0, 1])),
        row("Transpose", "unpatchify", vec![unit([2, 2, 3, 2, 2, 5])], 0, |_, a| {
            a[0].transpose(&[0, 5, 1, 3, 2, 4])
        }),
        row("Broadcast", "inner axis", vec![unit([2, 1, 4])], 0, |_, a| a[0].broadcast([2, 3, 4])),
        row("Broadcast", "new leading axes", vec![unit([3, 1])], 0, |_, a| a[0].broadcast([2, 2, 3, 4])),
        row("Broadcast", "a scalar", vec![unit([])], 0, |_, a| a[0].broadcast([2, 3])),
        row("Slice", "middle", x(), 0, |_, a| a[0].slice(1, 1, 2)).moves(Traffic::Answer),
        row("Slice", "end", x(), 0, |_, a| a[0].slice(2, 2, 4)).moves(Traffic::Answer),
        row("Concat", "two", vec![unit([2, 3]), unit([2, 4])], 0, |_, a| a[0].concat(&a[1..], 1)),
        row("Concat", "three", vec![unit([1, 3]), unit([2, 3]), unit([4, 3])], 0, |_, a| {
            a[0].concat(&a[1..], 0)
        }),
        row("Concat", "i64", vec![whole([3], 9), whole([2], 9)], 0, |_, a| a[0].concat(&a[1..], 0)).flat(),
        row("Split", "middle axis", vec![unit([2, 6, 4])], 0, |_, a| a[0].split(1, 3)).moves(Traffic::Answer),
        row("Split", "last axis", vec![unit([3, 1, 10])], 0, |_, a| a[0].split(2, 5)).moves(Traffic::Answer),
        row("Split", "one piece", vec![unit([3, 4])], 0, |_, a| a[0].split(0, 1)).moves(Traffic::Answer),
        row("Part", "second of three", vec![unit([2, 6, 4])], 0, |_, a| a[0].chunk::<3>(1)[1])
            .moves(Traffic::Answer),
        row("Pad", "both sides", x(), 0, |_, a| a[0].pad(1, 2, 1)),
        row("Pad", "last axis", x(), 0, |_, a| a[0].pad(2, 0, 3)),
        row("Gather", "rows", vec![unit([5, 3]), whole([7], 5)], 0, |_, a| a[0].gather(a[1]))
            .moves(Traffic::Answer),
        row("Gather", "numbers", vec![unit([5]), whole([3], 5)], 0, |_, a| a[0].gather(a[1]))
            .moves(Traffic::Answer),
        row("Gather", "matrices", vec![unit([3, 2, 4]), whole([5], 3)], 0, |_, a| a[0].gather(a[1]))
            .moves(Traffic::Answer),
    ]
}

fn products() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |case, a, b, macs| {
        rows.push(row("MatMul", case, vec![a, b], 2 * macs, |_, a| a[0].matmul(a[1])).macs(macs).long());
    };
    add("matrices", unit([3, 4]), unit([4, 5]), 3 * 4 * 5);
    add("tokens and a weight", unit([2, 3, 4]), unit([4, 5]), 2 * 3 * 4 * 5);
    add("heads", unit([2, 3, 4, 5]), unit([2, 3, 5, 4]), 2 * 3 * 4 * 5 * 4);
    add("leading axes grow", unit([2, 1, 3, 4]), unit([3, 4, 2]), 2 * 3 * 3 * 4 * 2);
    add("a matrix and a batch", unit([3, 4]), unit([2, 4, 5]), 2 * 3 * 4 * 5);
    add("long rows", unit([2, 700]), unit([700, 3]), 2 * 700 * 3);
    rows
}

/// Strides that leave pixels over, unequal padding, a rectangular window with gaps.
const UNEVEN: Window = Window { strides: [2, 3], pads: [[1, 0], [2, 1]], dilations: [1, 2] };

fn convolutions() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |op, case, operands, macs, bias, build: Build| {
        rows.push(row(op, case, operands, 2 * macs + bias, build).macs(macs).long());
    };
    add("Conv", "1 by 1", vec![unit([2, 3, 4, 5]), unit([2, 3, 1, 1])], 2 * 2 * 20 * 3, 0, |_, a| {
        a[0].conv(a[1], None, Window::default())
    });
    let operands = || vec![unit([2, 3, 5, 4]), unit([4, 3, 3, 3]), unit([4])];
    add("Conv", "same size, bias", operands(), 2 * 4 * 20 * 27, 160, |_, a| {
        a[0].conv(a[1], Some(a[2]), Window::padded(1, 1))
    });
    add("Conv", "every second", operands(), 2 * 4 * 2 * 27, 16, |_, a| {
        a[0].conv(a[1], Some(a[2]), Window::strided(2))
    });
    add("Conv", "1 by 7", vec![unit([1, 2, 3, 5]), unit([3, 2, 1, 7])], 3 * 15 * 14, 0, |_, a| {
        a[0].conv(a[1], None, Window::padded(0, 3))
    });
    add("Conv", "uneven", vec![unit([2, 2, 6, 9]), unit([3, 2, 3, 4])], 2 * 3 * 3 * 2 * 24, 0, |_, a| {
        a[0].conv(a[1], None, UNEVEN)
    });
    add("Conv", "wider padding than window", vec![unit([1, 1, 1, 2]), unit([1, 1, 2, 1])], 24, 0, |_, a| {
        a[0].conv(a[1], None, Window { strides: [3, 1], ..Window::padded(3, 2) })
    });
    add(
        "ConvTranspose",
        "1 by 1",
        vec![unit([2, 2, 4, 5]), unit([2, 3, 1, 1])],
        2 * 2 * 20 * 3,
        0,
        |_, a| a[0].conv_transpose(a[1], [4, 5], Window::default()),
    );
    let operands = || vec![unit([2, 4, 2, 2]), unit([4, 3, 3, 3])];
    add("ConvTranspose", "every second", operands(), 2 * 4 * 4 * 27, 0, |_, a| {
        a[0].conv_transpose(a[1], [6, 5], Window::strided(2))
    });
    add(
        "ConvTranspose",
        "uneven",
        vec![unit([2, 3, 3, 2]), unit([3, 2, 3, 4])],
        2 * 3 * 6 * 24,
        0,
        |_, a| a[0].conv_transpose(a[1], [6, 9], UNEVEN),
    );
    rows
}

fn pools() -> Vec<Row> {
    // Values so far apart that no step of a numerical derivative changes which of them is the largest.
    let far = |shape: [usize; 4]| vec![real(shape, -100.0, 100.0)];
    let mut rows = vec![
        row("MaxPool", "halves", far([2, 3, 4, 6]), 36 * 4, |_, a| a[0].max_pool([2, 2], Window::strided(2))),
        row("MaxPool", "overlapping", far([2, 2, 7, 7]), 36 * 9, |_, a| {
            a[0].max_pool([3, 3], Window::strided(2))
        }),
        row("MaxPool", "same size", far([1, 2, 3, 4]), 24 * 9, |_, a| {
            a[0].max_pool([3, 3], Window::padded(1, 1))
        }),
        // Padding is no zero: it must not win over negative values.
        row("MaxPool", "below zero", vec![real([1, 1, 4, 4], -100.0, -50.0)], 16 * 9, |_, a| {
            a[0].max_pool([3, 3], Window::padded(1, 1))
        }),
        row("MaxPool", "one row", far([1, 1, 1, 5]), 5 * 9, |_, a| {
            a[0].max_pool([3, 3], Window::padded(1, 1))
        }),
        row("AveragePool", "all", vec![unit([2, 3, 4, 5])], 6 * 20, |_, a| {
            a[0].average_pool([4, 5], Window::default(), false)
        })
        .long(),
    ];
    rows.push(row("MaxPool", "uneven", far([2, 2, 7, 9]), 2 * 2 * 3 * 3 * 12, |_, a| {
        a[0].max_pool([3, 4], Window { dilations: [1, 1], ..UNEVEN })
    }));
    let same = || vec![unit([2, 2, 5, 4])];
    let cost = 2 * 2 * 20 * 9;
    rows.push(row("AveragePool", "without padding", same(), cost, |_, a| {
        a[0].average_pool([3, 3], Window::padded(1, 1), false)
    }));
    rows.push(row("AveragePool", "with padding", same(), cost, |_, a| {
        a[0].average_pool([3, 3], Window::padded(1, 1), true)
    }));
    for (case, build) in [
        (
            "uneven without",
            (|_, a| a[0].average_pool([3, 4], Window { dilations: [1, 1], ..UNEVEN }, false)) as Build,
        ),
        ("uneven with", |_, a| a[0].average_pool([3, 4], Window { dilations: [1, 1], ..UNEVEN }, true)),
    ] {
        rows.push(row("AveragePool", case, vec![unit([2, 2, 7, 9])], 2 * 2 * 3 * 3 * 12, build));
    }
    rows
}

fn normalisations() -> Vec<Row> {
    vec![
        row("Softmax", "one row", vec![unit([7])], 5 * 7, |_, a| a[0].softmax()),
        row("Softmax", "heads", vec![real([2, 2, 3, 5], -3.0, 3.0)], 5 * 60, |_, a| a[0].softmax()),
        row("Softmax", "far below the rest", vec![real([4, 40], -90.0, 90.0)], 5 * 160, |_, a| {
            a[0].softmax()
        })
        .long(),
        row("LayerNorm", "tokens", vec![unit([2, 3, 19])], 8 * 114, |_, a| a[0].layer_norm(EPSILON)),
        row("LayerNorm", "one row", vec![unit([8])], 8 * 8, |_, a| a[0].layer_norm(EPSILON)),
        row("LayerNorm", "large epsilon", vec![unit([2, 8])], 8 * 16, |_, a| a[0].layer_norm(0.5)),
    ]
}
