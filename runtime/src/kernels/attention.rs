//! Multi-head self-attention over packed `qkv`, forward and backward.
//!
//! A task takes one head of one sample and a few registers of queries at a time. Scores are kept transposed (keys
//! down, queries across), so that softmax runs down the columns and the weights are already laid out for the next
//! product. Nothing of size T×T is stored; the backward pass computes the weights anew.

use super::product::isa::{Isa, MAX_LANES, MAX_VECTORS, Vectorised, vectorised};
use super::product::tile::{self, Scalars, Start, Vectors};
use super::product::{Operand, Panels, Scratch, Shared, Threads};
use super::simd::exp;

/// Sizes of the op.
#[derive(Clone, Copy)]
pub(crate) struct Attention {
    pub(crate) samples: usize,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    /// Features of a head.
    pub(crate) size: usize,
    /// Factor of the scores.
    pub(crate) scale: f32,
}

impl Attention {
    fn width(self) -> usize {
        self.heads * self.size
    }

    /// `out (N, T, D)` from `qkv` (N, T, 3D).
    pub(crate) fn forward(self, threads: &dyn Threads, qkv: &[f32], out: &mut [f32]) {
        let out = Shared::new(out);
        threads.each(self.samples * self.heads, &|task| vectorised(Forward { op: self, qkv, out, task }));
    }

    /// `dqkv (N, T, 3D)` from `qkv` and the cotangent `ct` (N, T, D).
    pub(crate) fn backward(self, threads: &dyn Threads, qkv: &[f32], ct: &[f32], dqkv: &mut [f32]) {
        let dqkv = Shared::new(dqkv);
        threads
            .each(self.samples * self.heads, &|task| vectorised(Backward { op: self, qkv, ct, dqkv, task }));
    }

    /// Rows of one head: part 0, 1 or 2 of `qkv` (query, key, value), as an operand whose lines are tokens.
    #[inline(always)]
    fn rows(self, qkv: &[f32], task: usize, part: usize) -> &[f32] {
        let (sample, head) = (task / self.heads, task % self.heads);
        let first = sample * self.tokens * 3 * self.width() + part * self.width() + head * self.size;
        &qkv[first..]
    }
}

/// The columns of a matrix in panels of registers, each panel row after row.
struct Wide {
    data: Scratch,
    panels: Panels,
    rows: usize,
}

impl Wide {
    /// Packs `columns` of `from`.
    #[inline(always)]
    fn pack<I: Isa>(from: Operand<'_>, rows: usize, columns: usize) -> Self {
        let panels = Panels::of(columns, I::LANES);
        let mut data = Scratch::new(panels.registers * I::LANES * rows);
        for p in 0..panels.count {
            let (start, width) = (panels.start(p) * I::LANES, panels.width(p) * I::LANES);
            let lines = start..(start + width).min(columns);
            from.pack::<I>(lines, 0..rows, width, &mut data[start * rows..]);
        }
        Self { data, panels, rows }
    }

    /// Panel `p` from row `first` on.
    #[inline(always)]
    fn panel<I: Isa>(&self, p: usize, first: usize) -> Vectors {
        let width = self.panels.width(p) * I::LANES;
        let at = self.panels.start(p) * I::LANES * self.rows + first * width;
        Vectors { at: self.data[at..].as_ptr(), term: width }
    }
}

/// Bands of `ROWS` lines, each term after term.
struct Bands {
    data: Scratch,
    terms: usize,
}

impl Bands {
    #[inline(always)]
    fn pack<I: Isa>(from: Operand<'_>, lines: usize, terms: usize) -> Self {
        let mut data = Scratch::new(lines.next_multiple_of(I::ROWS) * terms);
        from.pack_bands::<I>(0..lines, 0..terms, I::ROWS, &mut data);
        Self { data, terms }
    }

    /// `to[line][column] = Σ_terms lines ⊙ vectors` for all lines, the last band padded.
    ///
    /// # Safety
    /// `to` has room for all lines, up to a whole band, of `registers` registers.
    #[inline(always)]
    unsafe fn times<I: Isa>(&self, registers: usize, vectors: Vectors, to: &mut [f32]) {
        let width = registers * I::LANES;
        for (band, scalars) in self.data.chunks_exact(I::ROWS * self.terms).enumerate() {
            let scalars = Scalars { at: scalars.as_ptr(), row: 1, term: I::ROWS };
            let to = &mut to[band * I::ROWS * width..][..I::ROWS * width];
            // SAFETY: a band and a panel of `terms` terms each; the slice is one tile.
            unsafe {
                tile::full::<I, true>(
                    registers,
                    self.terms,
                    scalars,
                    vectors,
                    Start::Zero,
                    to.as_mut_ptr(),
                    width,
                );
            }
        }
    }
}

/// A value for each column of the widest panel.
type Columns = [f32; MAX_VECTORS * MAX_LANES];

/// Softmax down the columns of `scores` (keys, width), unnormalised: `e^(s − max)`; returns one over the sums.
#[inline(always)]
fn softmax_down(scores: &mut [f32], width: usize) -> Columns {
    match width {
        48 => softmax_columns::<48>(scores),
        32 => softmax_columns::<32>(scores),
        24 => softmax_columns::<24>(scores),
        16 => softmax_columns::<16>(scores),
        12 => softmax_columns::<12>(scores),
        8 => softmax_columns::<8>(scores),
        _ => softmax_columns::<4>(scores),
    }
}

#[inline(always)]
fn softmax_columns<const W: usize>(scores: &mut [f32]) -> Columns {
    let (rows, _) = scores.as_chunks_mut::<W>();
    let mut max = [f32::NEG_INFINITY; W];
    for row in &*rows {
        for (max, score) in max.iter_mut().zip(row) {
            *max = if *score > *max { *score } else { *max };
        }
    }
    let mut sum = [0.0_f32; W];
    for row in rows {
        for ((score, max), sum) in row.iter_mut().zip(&max).zip(&mut sum) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    let mut inverse = [0.0; MAX_VECTORS * MAX_LANES];
    for (inverse, sum) in inverse.iter_mut().zip(sum) {
        *inverse = 1.0 / sum;
    }
    inverse
}

struct Forward<'a> {
    op: Attention,
    qkv: &'a [f32],
    out: Shared<f32>,
    task: usize,
}

impl Vectorised for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { op, qkv, out, task } = self;
        let Attention { tokens, size, .. } = op;
        let (d, stride) = (op.width(), 3 * op.width());
        let keys = Bands::pack::<I>(Operand::lines(op.rows(qkv, task, 1), stride), tokens, size);
        let values = Wide::pack::<I>(Operand::columns(op.rows(qkv, task, 2), stride), tokens, size);
        let queries = Operand::lines(op.rows(qkv, task, 0), stride);
        let blocks = Panels::of(tokens, I::LANES);
        let room = tokens.next_multiple_of(I::ROWS) * MAX_VECTORS * I::LANES;
        let (mut scores, mut query) = (Scratch::new(room), Scratch::new(size * MAX_VECTORS * I::LANES));
        let first_out = task / op.heads * tokens * d + task % op.heads * size;
        for block in 0..blocks.count {
            let (registers, first) = (blocks.width(block), blocks.start(block) * I::LANES);
            let width = registers * I::LANES;
            let present = width.min(tokens - first);
            queries.pack::<I>(first..first + present, 0..size, width, &mut query);
            for x in &mut query[..size * width] {
                *x *= op.scale;
            }
            // SAFETY: the scratches are as large as the shapes say; a head's part of `out` belongs to this task.
            unsafe {
                keys.times::<I>(registers, Vectors { at: query.as_ptr(), term: width }, &mut scores);
                let inverse = softmax_down(&mut scores[..tokens * width], width);
                for row in (0..present).step_by(I::ROWS) {
                    let height = (present - row).min(I::ROWS);
                    let scalars = Scalars { at: scores.as_ptr().add(row), row: 1, term: width };
                    for p in 0..values.panels.count {
                        let column = values.panels.start(p) * I::LANES;
                        let shape = (height, (values.panels.width(p) * I::LANES).min(size - column));
                        let at = out.at().add(first_out + (first + row) * d + column);
                        tile::any::<I, true>(
                            shape,
                            values.panels.width(p),
                            tokens,
                            scalars,
                            values.panel::<I>(p, 0),
                            Start::Zero,
                            at,
                            d,
                        );
                        for i in 0..height {
                            let sums = std::slice::from_raw_parts_mut(at.add(i * d), shape.1);
                            for sum in sums {
                                *sum *= inverse[row + i];
                            }
                        }
                    }
                }
            }
        }
    }
}

struct Backward<'a> {
    op: Attention,
    qkv: &'a [f32],
    ct: &'a [f32],
    dqkv: Shared<f32>,
    task: usize,
}

impl Vectorised for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { op, qkv, ct, dqkv, task } = self;
        let Attention { tokens, size, scale, .. } = op;
        let (d, stride) = (op.width(), 3 * op.width());
        let first_out = task / op.heads * tokens * d + task % op.heads * size;
        let first_in = task / op.heads * tokens * stride + task % op.heads * size;
        let ct = &ct[first_out..];
        let [q, k, v] = [0, 1, 2].map(|part| op.rows(qkv, task, part));

        let keys = Bands::pack::<I>(Operand::lines(k, stride), tokens, size);
        let values = Bands::pack::<I>(Operand::lines(v, stride), tokens, size);
        let wide_keys = Wide::pack::<I>(Operand::columns(k, stride), tokens, size);
        let wide_queries = Wide::pack::<I>(Operand::columns(q, stride), tokens, size);
        let wide_ct = Wide::pack::<I>(Operand::columns(ct, d), tokens, size);
        let blocks = Panels::of(tokens, I::LANES);
        let padded = tokens.next_multiple_of(I::ROWS);
        let features = Panels::of(size, I::LANES);
        let row = features.registers * I::LANES;
        let widest = MAX_VECTORS * I::LANES;
        let (mut weights, mut dweights) = (Scratch::new(padded * widest), Scratch::new(padded * widest));
        let (mut query, mut ct_across) = (Scratch::new(size * widest), Scratch::new(size * widest));
        let (mut dkeys, mut dvalues) = (Scratch::new(padded * row), Scratch::new(padded * row));

        for block in 0..blocks.count {
            let (registers, first) = (blocks.width(block), blocks.start(block) * I::LANES);
            let width = registers * I::LANES;
            let present = width.min(tokens - first);
            let lines = first..first + present;
            Operand::lines(q, stride).pack::<I>(lines.clone(), 0..size, width, &mut query);
            Operand::lines(ct, d).pack::<I>(lines, 0..size, width, &mut ct_across);
            for x in &mut query[..size * width] {
                *x *= scale;
            }
            // SAFETY: the scratches are as large as the shapes say; a head's part of `dqkv` belongs to this task.
            unsafe {
                keys.times::<I>(registers, Vectors { at: query.as_ptr(), term: width }, &mut weights);
                values.times::<I>(registers, Vectors { at: ct_across.as_ptr(), term: width }, &mut dweights);
                let inverse = softmax_down(&mut weights[..tokens * width], width);
                softmax_grad_down(&mut weights, &mut dweights, &inverse, tokens, width);

                let start = if block == 0 { Start::Zero } else { Start::Resume };
                for (scalars, wide, sums) in
                    [(&weights, &wide_ct, &mut dvalues), (&dweights, &wide_queries, &mut dkeys)]
                {
                    for key in (0..padded).step_by(I::ROWS) {
                        let scalars = Scalars { at: scalars.as_ptr().add(key * width), row: width, term: 1 };
                        for p in 0..features.count {
                            let at = sums.as_mut_ptr().add(key * row + features.start(p) * I::LANES);
                            let vectors = wide.panel::<I>(p, first);
                            tile::full::<I, false>(
                                features.width(p),
                                present,
                                scalars,
                                vectors,
                                start,
                                at,
                                row,
                            );
                        }
                    }
                }
                for query in (0..present).step_by(I::ROWS) {
                    let height = (present - query).min(I::ROWS);
                    let scalars = Scalars { at: dweights.as_ptr().add(query), row: 1, term: width };
                    for p in 0..features.count {
                        let column = features.start(p) * I::LANES;
                        let shape = (height, (features.width(p) * I::LANES).min(size - column));
                        let at = dqkv.at().add(first_in + (first + query) * stride + column);
                        let vectors = wide_keys.panel::<I>(p, 0);
                        tile::any::<I, true>(
                            shape,
                            features.width(p),
                            tokens,
                            scalars,
                            vectors,
                            Start::Zero,
                            at,
                            stride,
                        );
                        for i in 0..height {
                            let sums = std::slice::from_raw_parts_mut(at.add(i * stride), shape.1);
                            for sum in sums {
                                *sum *= scale;
                            }
                        }
                    }
                }
            }
        }
        for (part, sums, factor) in [(1, &dkeys, scale), (2, &dvalues, 1.0)] {
            for token in 0..tokens {
                let from = &sums[token * row..][..size];
                // SAFETY: a head's part of `dqkv` belongs to this task.
                let to = unsafe {
                    let at = dqkv.at().add(first_in + token * stride + part * d);
                    std::slice::from_raw_parts_mut(at, size)
                };
                for (to, from) in to.iter_mut().zip(from) {
                    *to = factor * from;
                }
            }
        }
    }
}

/// Normalises `weights` and turns `dweights` into the cotangent of the scores: `w ⊙ (dw − Σ w ⊙ dw)` down columns.
#[inline(always)]
fn softmax_grad_down(
    weights: &mut [f32],
    dweights: &mut [f32],
    inverse: &Columns,
    tokens: usize,
    width: usize,
) {
    match width {
        48 => softmax_grad_columns::<48>(weights, dweights, inverse, tokens),
        32 => softmax_grad_columns::<32>(weights, dweights, inverse, tokens),
        24 => softmax_grad_columns::<24>(weights, dweights, inverse, tokens),
        16 => softmax_grad_columns::<16>(weights, dweights, inverse, tokens),
        12 => softmax_grad_columns::<12>(weights, dweights, inverse, tokens),
        8 => softmax_grad_columns::<8>(weights, dweights, inverse, tokens),
        _ => softmax_grad_columns::<4>(weights, dweights, inverse, tokens),
    }
}

#[inline(always)]
fn softmax_grad_columns<const W: usize>(
    weights: &mut [f32],
    dweights: &mut [f32],
    inverse: &Columns,
    tokens: usize,
) {
    let (weights, _) = weights[..tokens * W].as_chunks_mut::<W>();
    let (dweights, _) = dweights[..tokens * W].as_chunks_mut::<W>();
    let mut dot = [0.0_f32; W];
    for (w, dw) in weights.iter_mut().zip(&*dweights) {
        for (((w, dw), inverse), dot) in w.iter_mut().zip(dw).zip(inverse).zip(&mut dot) {
            *w *= inverse;
            *dot += *w * dw;
        }
    }
    for (w, dw) in weights.iter().zip(dweights) {
        for ((w, dw), dot) in w.iter().zip(dw).zip(&dot) {
            *dw = w * (*dw - dot);
        }
    }
}

#[cfg(test)]
mod tests;
