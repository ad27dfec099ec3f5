//! Operands laid out as the innermost loop reads them: panels of a few lines, term after term.

use std::ops::Range;

use super::isa::Isa;
use super::prefetch;
use crate::kernels::gelu;

/// What is done to an operand's elements on their way into a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Nothing.
    None,
    /// The tanh form of GELU.
    Gelu,
}

/// One operand of a product: element (line i, term k) is `data[i · line + k · term]`, and one of the strides is 1.
/// A line is a row of the left or a column of the right operand; the terms are what is summed over.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) line: usize,
    pub(crate) term: usize,
    pub(crate) activation: Activation,
}

/// Terms ahead that are asked for while lines are copied: rows of a matrix lie on pages of their own, so the processor
/// does not guess the next one.
const AHEAD: usize = 8;

impl<'a> Operand<'a> {
    /// Terms side by side: the rows of a row-major matrix are lines.
    pub(crate) fn lines(data: &'a [f32], stride: usize) -> Self {
        Self { data, line: stride, term: 1, activation: Activation::None }
    }

    /// Lines side by side: the columns of a row-major matrix are lines.
    pub(crate) fn columns(data: &'a [f32], stride: usize) -> Self {
        Self { data, line: 1, term: stride, activation: Activation::None }
    }

    /// With `activation` applied to every element.
    pub(crate) fn activated(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// Writes `lines` × `terms` as `to[k · width + i]`, with zeros up to `width` lines.
    #[inline(always)]
    pub(crate) fn pack<I: Isa>(
        &self,
        lines: Range<usize>,
        terms: Range<usize>,
        width: usize,
        to: &mut [f32],
    ) {
        let to = &mut to[..terms.len() * width];
        if self.term == 1 {
            self.pack_across::<I>(lines, terms, width, to);
        } else {
            self.pack_along::<I>(lines, terms, width, to);
        }
        self.activate(to);
    }

    /// Packs `lines` in panels of `width`, panel after panel, each of `terms.len() · width` elements.
    #[inline(always)]
    pub(crate) fn pack_bands<I: Isa>(
        &self,
        lines: Range<usize>,
        terms: Range<usize>,
        width: usize,
        to: &mut [f32],
    ) {
        let (count, panel) = (lines.len().div_ceil(width), terms.len() * width);
        if self.term == 1 || !lines.len().is_multiple_of(width) || !width.is_multiple_of(4) {
            for band in 0..count {
                let first = lines.start + band * width;
                let part = first..(first + width).min(lines.end);
                self.pack::<I>(part, terms.clone(), width, &mut to[band * panel..]);
            }
            return;
        }
        // A term's lines are read in one go and dealt out to the panels.
        for (index, k) in terms.enumerate() {
            let (from, _) = self.data[k * self.term + lines.start..][..lines.len()].as_chunks::<4>();
            prefetch::<I>(self.data, (k + AHEAD) * self.term + lines.start, lines.len());
            for (quad, from) in from.iter().enumerate() {
                let (band, within) = (quad * 4 / width, quad * 4 % width);
                to[band * panel + index * width + within..][..4].copy_from_slice(from);
            }
        }
        self.activate(&mut to[..count * panel]);
    }

    /// Applies the activation to packed elements; the padding stays zero.
    #[inline(always)]
    fn activate(&self, packed: &mut [f32]) {
        if self.activation == Activation::Gelu {
            gelu::apply(packed);
        }
    }

    /// Lines lie side by side: each term is one copy.
    #[inline(always)]
    fn pack_along<I: Isa>(&self, lines: Range<usize>, terms: Range<usize>, width: usize, to: &mut [f32]) {
        let present = lines.len();
        for (k, to) in terms.zip(to.chunks_exact_mut(width)) {
            let from = &self.data[k * self.term + lines.start..][..present];
            prefetch::<I>(self.data, (k + AHEAD) * self.term + lines.start, present);
            // Pieces of a fixed size: a call of `memcpy` would cost more than the copy.
            let (from8, from_rest) = from.as_chunks::<8>();
            let (to8, _) = to.as_chunks_mut::<8>();
            to8.iter_mut().zip(from8).for_each(|(to, from)| *to = *from);
            let (_, to_rest) = to.split_at_mut(present - from_rest.len());
            to_rest.fill(0.0);
            to_rest.iter_mut().zip(from_rest).for_each(|(to, from)| *to = *from);
        }
    }

    /// Terms lie side by side: a transposition, in blocks of 8×8.
    #[inline(always)]
    fn pack_across<I: Isa>(&self, lines: Range<usize>, terms: Range<usize>, width: usize, to: &mut [f32]) {
        let (count, present) = (terms.len(), lines.len());
        for group in (0..width).step_by(8) {
            let size = (width - group).min(8);
            let here = present.saturating_sub(group).min(size);
            let first = (lines.start + group) * self.line + terms.start;
            for i in 8..16 {
                prefetch::<I>(self.data, first + i * self.line, count);
            }
            let blocks = if here == 8 { count / 8 * 8 } else { 0 };
            for k in (0..blocks).step_by(8) {
                debug_assert!(self.data.len() >= first + 7 * self.line + k + 8);
                // SAFETY: eight lines of eight terms are inside both slices: `here` is 8, `k + 8 ≤ count`, and the
                // operand holds all lines and terms that are asked for.
                unsafe {
                    let to = to.as_mut_ptr().add(k * width + group);
                    I::transpose_8x8(self.data.as_ptr().add(first + k), self.line, to, width);
                }
            }
            for k in blocks..count {
                let to = &mut to[k * width + group..][..size];
                for (i, to) in to.iter_mut().enumerate() {
                    *to = if i < here { self.data[first + i * self.line + k] } else { 0.0 };
                }
            }
        }
    }
}
