//! Pixels to patches and back.

use super::product::{Shared, Threads};

/// Images of `channels` × `height` × `width` in square patches of side `patch`.
#[derive(Clone, Copy)]
pub(crate) struct Patches {
    pub(crate) samples: usize,
    pub(crate) channels: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) patch: usize,
    /// Whether a patch's features are ordered (row, column, channel) rather than (channel, row, column).
    pub(crate) channels_last: bool,
}

impl Patches {
    fn image(self) -> usize {
        self.channels * self.height * self.width
    }

    /// Calls `pair(pixel, feature)` with the offsets in one image of all elements that correspond.
    fn each(self, mut pair: impl FnMut(usize, usize)) {
        let Self { channels, height, width, patch, channels_last, .. } = self;
        let mut feature = 0;
        for top in (0..height).step_by(patch) {
            for left in (0..width).step_by(patch) {
                let mut one = |c: usize, i: usize, j: usize| {
                    pair((c * height + top + i) * width + left + j, feature);
                    feature += 1;
                };
                if channels_last {
                    for i in 0..patch {
                        for j in 0..patch {
                            (0..channels).for_each(|c| one(c, i, j));
                        }
                    }
                } else {
                    for c in 0..channels {
                        for i in 0..patch {
                            (0..patch).for_each(|j| one(c, i, j));
                        }
                    }
                }
            }
        }
    }

    /// Patches (N, T, C·P·P) of images (N, C, H, W).
    pub(crate) fn take(self, threads: &dyn Threads, images: &[f32], patches: &mut [f32]) {
        self.map(threads, images, patches, |from, to| self.each(|pixel, feature| to[feature] = from[pixel]));
    }

    /// Images (N, C, H, W) of patches (N, T, C·P·P).
    pub(crate) fn put_back(self, threads: &dyn Threads, patches: &[f32], images: &mut [f32]) {
        self.map(threads, patches, images, |from, to| self.each(|pixel, feature| to[pixel] = from[feature]));
    }

    fn map(
        self,
        threads: &dyn Threads,
        from: &[f32],
        to: &mut [f32],
        one: impl Fn(&[f32], &mut [f32]) + Sync,
    ) {
        let size = self.image();
        let target = Shared::new(to);
        threads.each(self.samples, &|n| {
            // SAFETY: images do not overlap; `to` holds `samples` of them.
            let to = unsafe { std::slice::from_raw_parts_mut(target.at().add(n * size), size) };
            one(&from[n * size..][..size], to);
        });
    }
}
