//! Windows that step over images (N, C, H, W): where they stand, and the copies that their gradients are made of.

use std::ops::Range;

use crate::value::Value;

/// How a window steps over the two image axes, rows first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Distance between two positions, in pixels.
    pub strides: [usize; 2],
    /// Pixels of padding before and after each axis.
    pub pads: [[usize; 2]; 2],
    /// Distance between two elements of the window, in pixels; 1 is a dense window.
    pub dilations: [usize; 2],
}

impl Default for Window {
    /// Every position inside the image.
    fn default() -> Self {
        Self { strides: [1, 1], pads: [[0, 0], [0, 0]], dilations: [1, 1] }
    }
}

impl Window {
    /// Every position, with `rows` and `columns` of padding on both sides.
    pub fn padded(rows: usize, columns: usize) -> Self {
        Self { pads: [[rows, rows], [columns, columns]], ..Self::default() }
    }

    /// Every `stride`-th position inside the image.
    pub fn strided(stride: usize) -> Self {
        Self { strides: [stride, stride], ..Self::default() }
    }

    /// Length of the padded axis that a window of `kernel` elements covers at `positions` positions.
    pub(crate) fn covered(&self, axis: usize, kernel: usize, positions: usize) -> usize {
        (positions - 1) * self.strides[axis] + (kernel - 1) * self.dilations[axis] + 1
    }

    /// Number of positions on each axis of an image; `None` when the window does not fit or does not move.
    pub(crate) fn positions(&self, image: [usize; 2], kernel: [usize; 2]) -> Option<[usize; 2]> {
        let mut answer = [0; 2];
        for axis in 0..2 {
            if self.strides[axis] == 0 || self.dilations[axis] == 0 || kernel[axis] == 0 {
                return None;
            }
            let padded = image[axis] + self.pads[axis][0] + self.pads[axis][1];
            let room = padded.checked_sub(self.covered(axis, kernel[axis], 1))?;
            answer[axis] = room / self.strides[axis] + 1;
        }
        Some(answer)
    }

    /// The positions at which element `element` of the window lies inside an axis of `size` pixels.
    pub(crate) fn inside(&self, axis: usize, element: usize, size: usize, positions: usize) -> Range<usize> {
        let (stride, before) = (self.strides[axis], self.pads[axis][0]);
        let at = element * self.dilations[axis];
        let start = before.saturating_sub(at).div_ceil(stride).min(positions);
        let end = (size + before).saturating_sub(at).div_ceil(stride).min(positions);
        start..end.max(start)
    }

    /// The pixel below element `element` of the window at `position`; for a position of [`Window::inside`].
    pub(crate) fn pixel(&self, axis: usize, element: usize, position: usize) -> usize {
        position * self.strides[axis] + element * self.dilations[axis] - self.pads[axis][0]
    }
}

/// Moves the elements of one axis `by` places on an axis of `size`: zeros come in, what leaves is dropped. `None` when
/// nothing is left.
pub(crate) fn moved(x: Value<'_>, axis: usize, by: isize, size: usize) -> Option<Value<'_>> {
    let len = x.dim(axis) as isize;
    let (start, end) = ((-by).max(0), len.min(size as isize - by));
    if start >= end {
        return None;
    }
    let (before, after) = ((start + by) as usize, size - (end + by) as usize);
    let kept = if (start, end) == (0, len) { x } else { x.slice(axis, start as usize, end as usize) };
    Some(if (before, after) == (0, 0) { kept } else { kept.pad(axis, before, after) })
}

/// Every `strides`-th pixel of an image whose sides are multiples of the strides.
pub(crate) fn thinned(x: Value<'_>, strides: [usize; 2]) -> Value<'_> {
    let (n, c) = (x.dim(0), x.dim(1));
    let (h, w) = (x.dim(2) / strides[0], x.dim(3) / strides[1]);
    if strides == [1, 1] {
        return x;
    }
    x.reshape([n, c, h, strides[0], w, strides[1]]).slice(3, 0, 1).slice(5, 0, 1).reshape([n, c, h, w])
}

/// Zeros between pixels (and after the last): the transpose of [`thinned`].
pub(crate) fn spread(x: Value<'_>, strides: [usize; 2]) -> Value<'_> {
    let (n, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    if strides == [1, 1] {
        return x;
    }
    x.reshape([n, c, h, 1, w, 1]).pad(3, 0, strides[0] - 1).pad(5, 0, strides[1] - 1).reshape([
        n,
        c,
        h * strides[0],
        w * strides[1],
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_positions_inside_are_those_whose_pixel_exists() {
        let window = Window { strides: [2, 3], pads: [[2, 1], [0, 4]], dilations: [1, 2] };
        let (image, kernel) = ([7, 6], [3, 2]);
        let positions = window.positions(image, kernel).unwrap();
        assert_eq!(positions, [4, 3]);
        for axis in 0..2 {
            for element in 0..kernel[axis] {
                let want: Vec<usize> = (0..positions[axis])
                    .filter(|p| {
                        let at = p * window.strides[axis] + element * window.dilations[axis];
                        (window.pads[axis][0]..image[axis] + window.pads[axis][0]).contains(&at)
                    })
                    .collect();
                let got = window.inside(axis, element, image[axis], positions[axis]);
                assert_eq!(got.collect::<Vec<_>>(), want, "axis {axis}, element {element}");
            }
        }
        assert_eq!(window.positions([1, 1], [5, 1]), None);
        assert_eq!(Window::strided(0).positions([4, 4], [1, 1]), None);
    }
}
