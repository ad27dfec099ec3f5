//! The conditioned layer norm and the gated residual of adaLN: rows of one sample share a row of conditioning.

use super::product::{Scratch, Shared, Threads};
use super::rows;

/// Rows that one task takes.
const ROWS: usize = 64;

/// `samples` × `tokens` rows of `width`.
#[derive(Clone, Copy)]
pub(crate) struct Conditioned {
    pub(crate) samples: usize,
    pub(crate) tokens: usize,
    pub(crate) width: usize,
}

/// Some rows of one sample.
#[derive(Clone, Copy)]
struct Part {
    sample: usize,
    /// First element and number of elements.
    start: usize,
    len: usize,
}

impl Part {
    fn of(self, x: &[f32]) -> &[f32] {
        &x[self.start..self.start + self.len]
    }

    /// # Safety
    /// Parts do not overlap; `x` is as long as all rows.
    unsafe fn of_shared<'a>(self, x: Shared<f32>) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(x.at().add(self.start), self.len) }
    }
}

impl Conditioned {
    fn parts_per_sample(self) -> usize {
        self.tokens.div_ceil(ROWS)
    }

    fn each(self, threads: &dyn Threads, task: impl Fn(usize, Part) + Sync) {
        let per = self.parts_per_sample();
        threads.each(self.samples * per, &|index| {
            let (sample, first) = (index / per, index % per * ROWS);
            let rows = ROWS.min(self.tokens - first);
            let start = (sample * self.tokens + first) * self.width;
            task(index, Part { sample, start, len: rows * self.width });
        });
    }

    /// The conditioning of a sample.
    fn shared(self, x: &[f32], sample: usize) -> &[f32] {
        &x[sample * self.width..][..self.width]
    }

    /// `LN(x) ⊙ (1 + scale) + shift`.
    pub(crate) fn layer_norm_modulate(
        self,
        threads: &dyn Threads,
        [x, shift, scale]: [&[f32]; 3],
        epsilon: f32,
        y: &mut [f32],
    ) {
        let y = Shared::new(y);
        self.each(threads, |_, part| {
            // SAFETY: each part is one task's.
            let y = unsafe { part.of_shared(y) };
            let (shift, scale) = (self.shared(shift, part.sample), self.shared(scale, part.sample));
            rows::layer_norm_modulate(part.of(x), shift, scale, y, epsilon);
        });
    }

    /// Gradient of [`Self::layer_norm_modulate`]; `residual` is added to `dx` where it is not empty.
    pub(crate) fn layer_norm_modulate_grad(
        self,
        threads: &dyn Threads,
        [x, scale, ct, residual]: [&[f32]; 4],
        epsilon: f32,
        dx: &mut [f32],
        [dshift, dscale]: [&mut [f32]; 2],
    ) {
        let width = self.width;
        let mut shares = Scratch::new(self.samples * self.parts_per_sample() * 2 * width);
        let (dx, target) = (Shared::new(dx), Shared::new(&mut shares));
        self.each(threads, |index, part| {
            // SAFETY: each part and each share is one task's.
            let (dx, share) = unsafe {
                let share = std::slice::from_raw_parts_mut(target.at().add(index * 2 * width), 2 * width);
                (part.of_shared(dx), share)
            };
            let (dshift, dscale) = share.split_at_mut(width);
            let residual = if residual.is_empty() { residual } else { part.of(residual) };
            let scale = self.shared(scale, part.sample);
            rows::layer_norm_modulate_grad(
                part.of(x),
                scale,
                part.of(ct),
                residual,
                epsilon,
                dx,
                dshift,
                dscale,
            );
        });
        self.total(&shares, &mut [dshift, dscale]);
    }

    /// `x + gate ⊙ y`.
    pub(crate) fn gate_residual(self, threads: &dyn Threads, [x, gate, y]: [&[f32]; 3], out: &mut [f32]) {
        let out = Shared::new(out);
        self.each(threads, |_, part| {
            // SAFETY: each part is one task's.
            let out = unsafe { part.of_shared(out) };
            rows::gate_residual(part.of(x), self.shared(gate, part.sample), part.of(y), out);
        });
    }

    /// Gradient of [`Self::gate_residual`] for `gate` and `y`; that for `x` is `ct` itself.
    pub(crate) fn gate_residual_grad(
        self,
        threads: &dyn Threads,
        [gate, y, ct]: [&[f32]; 3],
        dy: &mut [f32],
        dgate: &mut [f32],
    ) {
        let width = self.width;
        let mut shares = Scratch::new(self.samples * self.parts_per_sample() * width);
        let (dy, target) = (Shared::new(dy), Shared::new(&mut shares));
        self.each(threads, |index, part| {
            // SAFETY: each part and each share is one task's.
            let (dy, share) = unsafe {
                let share = std::slice::from_raw_parts_mut(target.at().add(index * width), width);
                (part.of_shared(dy), share)
            };
            rows::gate_residual_grad(self.shared(gate, part.sample), part.of(y), part.of(ct), dy, share);
        });
        self.total(&shares, &mut [dgate]);
    }

    /// Adds the parts' shares up, in order: `shares` holds for each part a row for each of `totals`.
    fn total(self, shares: &[f32], totals: &mut [&mut [f32]]) {
        let (width, per, kinds) = (self.width, self.parts_per_sample(), totals.len());
        for (kind, total) in totals.iter_mut().enumerate() {
            for (sample, total) in total.chunks_exact_mut(width).enumerate() {
                total.fill(0.0);
                for part in 0..per {
                    rows::add(total, &shares[((sample * per + part) * kinds + kind) * width..][..width]);
                }
            }
        }
    }
}
