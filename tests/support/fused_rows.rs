//! The rows of the fused ops: small, with a row length that no vector width divides, and cut into several parts.

use graph_builder::{Activation, DType, PatchOrder};

use crate::op_rows::{EPSILON, real, row, unit};
use crate::op_table::{Build, Operand, Row, Traffic};
use crate::tolerance::FAR_OP;

const NONE: Activation = Activation::None;
const GELU: Activation = Activation::Gelu;
const FIRST: PatchOrder = PatchOrder::ChannelsFirst;
const LAST: PatchOrder = PatchOrder::ChannelsLast;

pub(crate) fn rows() -> Vec<Row> {
    [elementwise(), modulation(), linear(), attention(), patches(), order()].into_iter().flatten().collect()
}

fn elementwise() -> Vec<Row> {
    let mut rows = Vec::new();
    for (case, small) in [("tail", true), ("parts", false)] {
        let twins = |wide| if small { vec![unit([2, 3, 19]), unit([2, 3, 19])] } else { wide };
        let numel = |wide| if small { 114 } else { wide };
        let wide = || vec![real([3, 9001], -4.0, 4.0), unit([3, 9001])];
        let rows_of = || vec![real([35, 515], 0.0, 0.004), unit([35, 515])];
        rows.extend([
            row("GeluGrad", case, twins(wide()), 16 * numel(27003), |_, a| a[0].gelu_grad(a[1])).refused(),
            row("SoftmaxGrad", case, twins(rows_of()), 4 * numel(18025), |_, a| a[0].softmax_grad(a[1]))
                .refused(),
            row("LayerNormGrad", case, twins(rows_of()), 14 * numel(18025), |_, a| {
                a[0].layer_norm_grad(a[1], EPSILON)
            })
            .refused(),
        ]);
    }
    rows.extend([
        row("GeluGrad", "scalar", vec![unit([]), unit([])], 16, |_, a| a[0].gelu_grad(a[1])).refused(),
        row("GeluGrad", "saturated", vec![real([60], -30.0, 30.0), unit([60])], 16 * 60, |_, a| {
            a[0].gelu_grad(a[1])
        })
        .refused(),
        row(
            "LayerNormGrad",
            "far from zero",
            vec![real([4, 64], 99.0, 101.0), unit([4, 64])],
            14 * 256,
            |_, a| a[0].layer_norm_grad(a[1], EPSILON),
        )
        .refused()
        .within(FAR_OP),
    ]);
    rows
}

fn modulation() -> Vec<Row> {
    let mut rows = Vec::new();
    for (case, with_residual, [n, t, d]) in [
        ("tail", "tail, with a residual", [2, 3, 19]),
        ("parts", "parts, with a residual", [2, 70, 260]),
        ("one token", "one token, with a residual", [3, 1, 8]),
    ] {
        let (tokens, condition) = (|| unit([n, t, d]), || unit([n, 1, d]));
        let numel = (n * t * d) as u64;
        let modulated = vec![tokens(), condition(), condition()];
        let graded = vec![tokens(), condition(), tokens()];
        let summed = vec![tokens(), condition(), tokens(), tokens()];
        rows.extend([
            row("LayerNormModulate", case, modulated, 10 * numel, |_, a| {
                a[0].layer_norm_modulate(a[1], a[2], EPSILON)
            }),
            row("LayerNormModulateGrad", case, graded, 18 * numel, |_, a| {
                a[0].layer_norm_modulate_grad(a[1], a[2], None, EPSILON)
            })
            .refused()
            .long(),
            row("GateResidual", case, vec![tokens(), condition(), tokens()], 2 * numel, |_, a| {
                a[0].gate_residual(a[1], a[2])
            }),
            row("GateResidualGrad", case, vec![condition(), tokens(), tokens()], 3 * numel, |_, a| {
                a[0].gate_residual_grad(a[1], a[2])
            })
            .refused()
            .long(),
        ]);
        rows.push(
            row("LayerNormModulateGrad", with_residual, summed, 19 * numel, |_, a| {
                a[0].layer_norm_modulate_grad(a[1], a[2], Some(a[3]), EPSILON)
            })
            .refused()
            .long(),
        );
    }
    let far = || real([2, 4, 64], 99.0, 101.0);
    let condition = || unit([2, 1, 64]);
    rows.extend([
        row("LayerNormModulate", "far from zero", vec![far(), condition(), condition()], 10 * 512, |_, a| {
            a[0].layer_norm_modulate(a[1], a[2], EPSILON)
        })
        .within(FAR_OP),
        row(
            "LayerNormModulateGrad",
            "far from zero",
            vec![far(), condition(), unit([2, 4, 64])],
            18 * 512,
            |_, a| a[0].layer_norm_modulate_grad(a[1], a[2], None, EPSILON),
        )
        .refused()
        .within(FAR_OP),
    ]);
    rows
}

/// Two names of a layer, without activation and with it; samples, tokens, input and output features.
const LAYERS: [(&str, &str, [usize; 4]); 4] = [
    ("small", "small, gelu", [2, 3, 4, 5]),
    ("no width divides", "no width divides, gelu", [1, 37, 61, 43]),
    ("blocks of rows", "blocks of rows, gelu", [2, 130, 48, 100]),
    ("a long sum", "a long sum, gelu", [1, 7, 1030, 19]),
];

fn linear() -> Vec<Row> {
    let mut rows = Vec::new();
    for (case, with_gelu, [b, t, k, n]) in LAYERS {
        let (x, ct, weight, bias) = (|| unit([b, t, k]), || unit([b, t, n]), || unit([n, k]), || unit([n]));
        let (tokens, macs) = ((b * t) as u64, (b * t * k * n) as u64);
        let (wide, narrow) = (tokens * k as u64, tokens * n as u64);
        let layer = || vec![x(), weight(), bias()];
        let branch = || [vec![ct(), unit([b, 1, n])], layer()].concat();
        let mut add = |op, gelu: bool, operands: Vec<Operand>, flops, build: Build| {
            let case = if gelu { with_gelu } else { case };
            let row = row(op, case, operands, 2 * macs + flops, build).macs(macs).long();
            rows.push(if op.starts_with("LinearGrad") { row.refused() } else { row });
        };
        add("Linear", false, layer(), narrow, |_, a| a[0].linear(a[1], a[2]));
        add("Linear", true, layer(), narrow + 8 * wide, |_, a| a[0].activated_linear(GELU, a[1], a[2]));
        add("LinearGradInput", false, vec![ct(), weight()], 0, |_, a| a[0].linear_grad_input(a[1], None));
        add("LinearGradInput", true, vec![ct(), weight(), x()], 16 * wide, |_, a| {
            a[0].linear_grad_input(a[1], Some(a[2]))
        });
        add("LinearGradWeight", false, vec![ct(), x()], narrow, |_, a| a[0].linear_grad_weight(NONE, a[1]));
        add("LinearGradWeight", true, vec![ct(), x()], narrow, |_, a| a[0].linear_grad_weight(GELU, a[1]));
        add("LinearGateResidual", false, branch(), 3 * narrow, |_, a| {
            a[0].linear_gate_residual(a[1], NONE, [a[2], a[3], a[4]])
        });
        add("LinearGateResidual", true, branch(), 3 * narrow + 8 * wide, |_, a| {
            a[0].linear_gate_residual(a[1], GELU, [a[2], a[3], a[4]])
        });
    }
    let matrices = || vec![unit([6, 4]), unit([5, 4]), unit([5])];
    rows.extend([
        row("Linear", "a matrix", matrices(), 2 * 120 + 30, |_, a| a[0].linear(a[1], a[2])).macs(120).long(),
        row(
            "Linear",
            "images of rows",
            vec![unit([2, 2, 3, 4]), unit([5, 4]), unit([5])],
            2 * 240 + 60,
            |_, a| a[0].linear(a[1], a[2]),
        )
        .macs(240)
        .long(),
        row("LinearGradWeight", "a matrix", vec![unit([6, 5]), unit([6, 4])], 2 * 120 + 30, |_, a| {
            a[0].linear_grad_weight(NONE, a[1])
        })
        .macs(120)
        .long()
        .refused(),
    ]);
    rows
}

fn attention() -> Vec<Row> {
    let mut rows = Vec::new();
    for (case, [n, t, heads, k], size) in [
        ("small", [2, 3, 2, 4], 1.0),
        ("no width divides", [1, 37, 3, 9], 1.0),
        ("blocks of tokens", [1, 150, 2, 16], 1.0),
        ("far below the rest", [1, 20, 1, 8], 8.0),
        ("one token", [2, 1, 2, 4], 1.0),
    ] {
        let d = heads * k;
        let operands = || vec![real([n, t, 3 * d], -size, size)];
        let (macs, numel, weights) = ((n * t * t * d) as u64, (n * t * d) as u64, (n * heads * t * t) as u64);
        let build: [Build; 2] = match heads {
            1 => [|_, a| a[0].attention(1, 0.35), |_, a| a[0].attention_grad(a[1], 1, 0.35)],
            2 => [|_, a| a[0].attention(2, 0.5), |_, a| a[0].attention_grad(a[1], 2, 0.5)],
            _ => [|_, a| a[0].attention(3, 0.25), |_, a| a[0].attention_grad(a[1], 3, 0.25)],
        };
        let forward = row("Attention", case, operands(), 4 * macs + numel + 5 * weights, build[0]);
        let operands = [operands(), vec![unit([n, t, d])]].concat();
        let backward = row("AttentionGrad", case, operands, 8 * macs + numel + 4 * weights, build[1]);
        rows.extend([forward.macs(2 * macs).long(), backward.macs(4 * macs).long().refused()]);
    }
    rows
}

fn patches() -> Vec<Row> {
    let image = || vec![unit([2, 3, 4, 6])];
    let tokens = || vec![unit([2, 6, 12])];
    vec![
        row("Patchify", "channels first", image(), 0, |_, a| a[0].patchify(2, FIRST)),
        row("Patchify", "channels last", image(), 0, |_, a| a[0].patchify(2, LAST)),
        row("Patchify", "pixels", image(), 0, |_, a| a[0].patchify(1, FIRST)),
        row("Patchify", "one channel", vec![unit([1, 1, 8, 8])], 0, |_, a| a[0].patchify(4, FIRST)),
        row("Unpatchify", "channels first", tokens(), 0, |_, a| a[0].unpatchify(2, FIRST, 4, 6)),
        row("Unpatchify", "channels last", tokens(), 0, |_, a| a[0].unpatchify(2, LAST, 4, 6)),
        row("Unpatchify", "one patch", vec![unit([2, 1, 18])], 0, |_, a| a[0].unpatchify(3, LAST, 3, 3)),
    ]
}

fn order() -> Vec<Row> {
    let build: Build = |b, a| a[0].after(b.constant(DType::F32, [5], vec![0.5]));
    vec![row("After", "a token", vec![unit([2, 3])], 0, build).moves(Traffic::Nothing)]
}
