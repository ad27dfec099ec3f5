//! One pass over the images: each is read once, checked, and its features go into a [`Part`].

use anyhow::{Context, bail, ensure};
use runtime::file::hexadecimal;
use sha2::{Digest, Sha256};

use super::extractor::{Extractor, Features, ImageBatch, Pixels};
use super::part::{Block, Part, Seen};
use super::resuming::{add_pixels, stamps};
use super::source::{Picture, Pictures, Source, Values};
use crate::faults::one_error;

/// Images that the network is given at once, at most.
const GROUP: usize = 64;
/// Their values, at most: large images come in smaller groups.
const GROUP_VALUES: usize = 1 << 26;

/// What turns images into features.
pub trait Network {
    /// Features of images of one size.
    ///
    /// # Errors
    /// The network's own.
    fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features>;

    /// Channels that it takes.
    fn channels(&self) -> usize;
}

impl Network for Extractor {
    fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features> {
        Self::features(self, images)
    }

    fn channels(&self) -> usize {
        Self::channels(self)
    }
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every image is done.
    Finished,
    /// `stop` said so; all whole blocks are saved.
    Stopped,
}

/// Does what is missing in `part`. `stop` is asked between groups of images; `progress` is told how many images of the part
/// are done. What is done is saved, however the pass ends.
///
/// # Errors
/// Images that cannot be read or do not belong together, features that are not finite; each names the image.
pub fn run(
    part: &mut Part,
    source: &mut dyn Source,
    network: &mut dyn Network,
    stop: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<Outcome> {
    let before = part.seen.images;
    let outcome = blocks(part, source, network, stop, progress);
    if outcome.is_err() && part.seen.images > before {
        // The first error is the one to tell.
        let _ = part.save();
    }
    outcome
}

fn blocks(
    part: &mut Part,
    source: &mut dyn Source,
    network: &mut dyn Network,
    stop: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<Outcome> {
    let (missing, block_len) = (part.missing(), part.plan().block);
    let mixed_sizes = part.plan().mixed_sizes;
    let start = part.range().start;
    ensure!(part.asked().is_none(), "internal: a part whose images were not compared");
    let mut stamps = stamps(source, missing.clone(), block_len)?.into_iter();
    let mut pictures = source.pictures(missing.clone());
    for first in missing.clone().step_by(block_len as usize) {
        let end = (first + block_len).min(missing.end);
        let mut work = Work { seen: part.seen.clone(), hash: Sha256::new(), ..Work::default() };
        for index in first..end {
            let picture = pictures.next().with_context(|| format!("internal: image {index} is missing"))?;
            let picture =
                picture.or_else(|fault| with_others(fault, &mut pictures, missing.end - start, stop))?;
            if let Some(full) = work.push(picture, network.channels(), mixed_sizes)? {
                work.extract(&full, network)?;
                progress(index - start);
                if stop() {
                    part.save()?;
                    return Ok(Outcome::Stopped);
                }
            }
        }
        let rest = std::mem::take(&mut work.group);
        work.extract(&rest, network)?;
        work.seen.blocks.push(hexadecimal(&work.hash.finalize()));
        work.seen.stamps.extend(stamps.next());
        part.add(&work.block, work.seen)?;
        progress(end - start);
        if end < missing.end && stop() {
            part.save()?;
            return Ok(Outcome::Stopped);
        }
    }
    Ok(Outcome::Finished)
}

/// A fault and those of the images behind it, which are decoded for that alone.
fn with_others(
    fault: anyhow::Error,
    pictures: &mut Pictures<'_>,
    images: u64,
    stop: &dyn Fn() -> bool,
) -> anyhow::Result<Picture> {
    if fault.is::<crate::Usage>() {
        return Err(fault); // what was asked for is wrong, not a picture
    }
    let others = pictures.take_while(|_| !stop()).filter_map(Result::err);
    one_error(std::iter::once(fault).chain(others).collect(), images)?;
    bail!("internal: no fault is left")
}

/// The values of a group, which are of one type.
fn joined<T: Copy>(group: &[Picture], values: fn(&Values) -> &[T]) -> Vec<T> {
    group.iter().flat_map(|p| values(&p.values)).copied().collect()
}

/// A block in the making.
#[derive(Default)]
struct Work {
    block: Block,
    seen: Seen,
    hash: Sha256,
    group: Vec<Picture>,
}

impl Work {
    /// Takes a picture in; gives the group before it when that is complete.
    fn push(
        &mut self,
        picture: Picture,
        channels: usize,
        mixed_sizes: bool,
    ) -> anyhow::Result<Option<Vec<Picture>>> {
        picture.check()?;
        add_pixels(&mut self.hash, &picture);
        let size = [picture.height, picture.width];
        let first = *self.seen.size.get_or_insert(size);
        if size != first {
            ensure!(
                mixed_sizes,
                "`{}` is {} by {}, the images before are {} by {}: resize them alike, or allow it by --mixed-sizes",
                picture.name,
                size[0],
                size[1],
                first[0],
                first[1]
            );
            self.seen.other_sizes += 1;
        }
        self.seen.grey += u64::from(picture.channels == 1 && channels == 3);
        self.seen.images += 1;
        let picture = picture.with_channels(channels)?;
        let values = size[0] * size[1] * channels;
        let limit = (GROUP_VALUES / values.max(1)).clamp(1, GROUP);
        let ends = self.group.last().is_some_and(|last| {
            self.group.len() >= limit
                || [last.height, last.width] != size
                || std::mem::discriminant(&last.values) != std::mem::discriminant(&picture.values)
        });
        let full = ends.then(|| std::mem::take(&mut self.group));
        self.group.push(picture);
        Ok(full)
    }

    fn extract(&mut self, group: &[Picture], network: &mut dyn Network) -> anyhow::Result<()> {
        let Some(Picture { height, width, channels, values, .. }) = group.first() else { return Ok(()) };
        let bytes: Vec<u8>;
        let floats: Vec<f32>;
        let pixels = match values {
            Values::U8(_) => {
                bytes = joined(group, |v| if let Values::U8(v) = v { v } else { &[] });
                Pixels::U8(&bytes)
            }
            Values::F32(_) => {
                floats = joined(group, |v| if let Values::F32(v) = v { v } else { &[] });
                Pixels::F32(&floats)
            }
        };
        let batch = ImageBatch { height: *height, width: *width, channels: *channels, pixels };
        let features = network.features(&batch)?;
        let Block { pool, spatial, logits } = &mut self.block;
        let taps = [(pool, Some(features.pool)), (spatial, features.spatial), (logits, features.logits)];
        for (to, from) in taps.into_iter().filter_map(|(to, from)| Some((to, from?))) {
            let mut rows = from.outer_iter().zip(group);
            if let Some((_, picture)) = rows.find(|(row, _)| !row.iter().all(|x| x.is_finite())) {
                bail!("the features of `{}` are not finite", picture.name);
            }
            to.extend(from.iter());
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::ops::Range;

    use ndarray::Array2;

    use super::super::plan::tests::plan;
    use super::super::resuming::settle;
    use super::*;

    /// Images of 2 × 2 whose pixels follow from their number.
    pub(crate) struct Toy {
        pub(crate) count: u64,
        /// The picture that is given in place of another.
        pub(crate) odd: Option<(u64, Picture)>,
    }

    pub(crate) fn picture(index: u64, size: usize, channels: usize) -> Picture {
        let pixel = |k: usize| (index * 37 + k as u64 * 11 + index * index % 7) as u8;
        let values = Values::U8((0..size * size * channels).map(pixel).collect());
        Picture { name: format!("toy {index}"), height: size, width: size, channels, values }
    }

    impl Source for Toy {
        fn count(&self) -> u64 {
            self.count
        }

        fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
            Box::new(range.map(|i| match &self.odd {
                Some((at, odd)) if *at == i => Ok(odd.clone()),
                _ => Ok(picture(i, 2, 3)),
            }))
        }
    }

    /// Four, three and two mixtures of the first pixels.
    pub(crate) struct Mixer {
        pub(crate) calls: usize,
    }

    impl Network for Mixer {
        fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features> {
            self.calls += 1;
            let n = images.count();
            let value = |i: usize| match images.pixels {
                Pixels::U8(v) => f32::from(v[i]),
                Pixels::F32(v) => v[i],
            };
            let mix = |width: usize| {
                Array2::from_shape_fn((n, width), |(i, k)| {
                    let at = i * images.image_len();
                    (value(at + k) * 0.01).sin() + value(at + k + 1) * 0.003
                })
            };
            Ok(Features { pool: mix(4), spatial: Some(mix(3)), logits: Some(mix(2)) })
        }

        fn channels(&self) -> usize {
            3
        }
    }

    #[test]
    fn a_pass_that_is_stopped_anywhere_ends_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(700, 300);
        let mut source = Toy { count: 700, odd: None };
        let mut straight = Part::open(&dir.path().join("a"), &plan, 0..700).unwrap();
        let mut told = Vec::new();
        let done = run(&mut straight, &mut source, &mut Mixer { calls: 0 }, &|| false, &mut |n| told.push(n))
            .unwrap();
        assert_eq!(done, Outcome::Finished);
        assert!(told.is_sorted() && told.last() == Some(&700), "{told:?}");

        let mut outcomes = Vec::new();
        for patience in [2, 5, 6, 100] {
            let mut part = Part::open(&dir.path().join("b"), &plan, 0..700).unwrap();
            settle(&mut part, &mut source, &|_| {}).unwrap();
            let asked = std::cell::Cell::new(0);
            let stop = || {
                asked.set(asked.get() + 1);
                asked.get() >= patience
            };
            outcomes.push(run(&mut part, &mut source, &mut Mixer { calls: 0 }, &stop, &mut |_| {}).unwrap());
        }
        assert_eq!(outcomes, [Outcome::Stopped, Outcome::Stopped, Outcome::Stopped, Outcome::Finished]);
        let resumed = Part::finished(&dir.path().join("b")).unwrap();
        assert!(resumed.pool == straight.pool && resumed.seen == straight.seen);
        assert_eq!(resumed.seen.blocks.len(), 3);
    }

    #[test]
    fn images_that_do_not_fit_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let nan = Values::F32(vec![f32::NAN; 12]);
        for (k, (odd, part)) in [
            (picture(5, 3, 3), "3 by 3"),
            (picture(5, 2, 2), "2 channels"),
            (Picture { values: nan, ..picture(5, 2, 3) }, "holds NaN"),
        ]
        .into_iter()
        .enumerate()
        {
            let mut source = Toy { count: 10, odd: Some((5, odd)) };
            let mut target = Part::open(&dir.path().join(k.to_string()), &plan(10, 0), 0..10).unwrap();
            let error = run(&mut target, &mut source, &mut Mixer { calls: 0 }, &|| false, &mut |_| {});
            let error = error.unwrap_err().to_string();
            assert!(error.contains("`toy 5`") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn mixed_sizes_and_grey_are_counted_when_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let mut allowed = plan(10, 0);
        allowed.mixed_sizes = true;
        let mut part = Part::open(&dir.path().join("p"), &allowed, 0..10).unwrap();
        let mut source = Toy { count: 10, odd: Some((5, picture(5, 3, 1))) };
        let mut network = Mixer { calls: 0 };
        run(&mut part, &mut source, &mut network, &|| false, &mut |_| {}).unwrap();
        let seen = &part.seen;
        assert_eq!((seen.images, seen.size, seen.other_sizes, seen.grey), (10, Some([2, 2]), 1, 1));
        assert_eq!(network.calls, 3, "before, the odd one, after");
    }

    /// A network that fails on some images.
    struct Broken;

    impl Network for Broken {
        fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features> {
            let mut features = Mixer { calls: 0 }.features(images)?;
            features.logits.as_mut().unwrap()[(3, 1)] = f32::INFINITY;
            Ok(features)
        }
        fn channels(&self) -> usize {
            3
        }
    }

    #[test]
    fn features_that_are_not_finite_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut part = Part::open(&dir.path().join("p"), &plan(10, 0), 0..10).unwrap();
        let mut source = Toy { count: 10, odd: None };
        let error = run(&mut part, &mut source, &mut Broken, &|| false, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("`toy 3`") && error.contains("not finite"), "{error}");
    }
}
