//! Some of another source's images.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::ensure;

use super::fingerprint::Fingerprint;
use super::{Numbers, Pictures, Source};
use crate::Usage;

/// The first images of another source, or as many spread evenly over it.
pub struct Subset {
    source: Box<dyn Source>,
    count: u64,
    spread: bool,
}

impl Subset {
    /// Takes `count` images.
    ///
    /// # Errors
    /// The source has fewer, or none are asked for.
    pub fn new(source: Box<dyn Source>, count: u64, spread: bool) -> anyhow::Result<Self> {
        ensure!(
            (1..=source.count()).contains(&count),
            Usage(format!("{count} images are asked for, the input has {}", source.count()))
        );
        Ok(Self { source, count, spread })
    }

    /// The number that an image has in the source.
    fn number(&self, own: u64) -> u64 {
        if self.spread {
            (u128::from(own) * u128::from(self.source.count()) / u128::from(self.count)) as u64
        } else {
            own
        }
    }
}

impl Source for Subset {
    fn count(&self) -> u64 {
        self.count
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        if self.spread { self.picked(Box::new(range)) } else { self.source.pictures(range) }
    }

    fn picked<'a>(&'a mut self, numbers: Numbers<'a>) -> Pictures<'a> {
        let (count, total) = (u128::from(self.count), u128::from(self.source.count()));
        if !self.spread {
            return self.source.picked(numbers);
        }
        self.source.picked(Box::new(numbers.map(move |own| (u128::from(own) * total / count) as u64)))
    }

    fn fingerprint(&mut self, range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        // Those between are no harm: pixels decide where a fingerprint differs.
        let end = if range.end == self.count { self.source.count() } else { self.number(range.end) };
        let end = if self.spread { end } else { range.end };
        self.source.fingerprint(self.number(range.start)..end, fingerprint)
    }

    fn group(&self, number: u64) -> Option<String> {
        self.source.group(self.number(number))
    }

    fn remarks(&self) -> Vec<String> {
        let mut remarks = self.source.remarks();
        if let Some((some, all)) = groups_of_first(self.source.as_ref(), self.count).filter(|_| !self.spread)
        {
            remarks.push(format!(
                "the first {} of {} images are of {some} of {all} folders or files only: --spread takes as many from all of \
                 them",
                self.count,
                self.source.count()
            ));
        }
        remarks
    }
}

/// How many groups the first `count` images are of, and all; none if it is the same.
pub fn groups_of_first(source: &dyn Source, count: u64) -> Option<(usize, usize)> {
    if count >= source.count() || source.group(0).is_none() {
        return None;
    }
    let all: BTreeSet<Option<String>> = (0..source.count()).map(|i| source.group(i)).collect();
    let some: BTreeSet<Option<String>> = (0..count).map(|i| source.group(i)).collect();
    (some.len() < all.len()).then_some((some.len(), all.len()))
}

#[cfg(test)]
mod tests {
    use super::super::{Picture, Values, one_by_one};
    use super::*;

    /// Twelve images in three folders.
    struct Sorted;

    impl Source for Sorted {
        fn count(&self) -> u64 {
            12
        }
        fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
            one_by_one(range, |i| {
                let values = Values::U8(vec![i as u8]);
                Ok(Picture { name: String::new(), height: 1, width: 1, channels: 1, values })
            })
        }
        fn group(&self, number: u64) -> Option<String> {
            Some((number / 4).to_string())
        }
    }

    #[test]
    fn the_first_or_evenly_spread_images_are_taken() {
        let found = |count, spread, range: Range<u64>| -> Vec<u8> {
            let mut part = Subset::new(Box::new(Sorted), count, spread).unwrap();
            assert_eq!(part.count(), count);
            let byte = |p: anyhow::Result<Picture>| match p.unwrap().values {
                Values::U8(v) => v[0],
                Values::F32(_) => panic!("bytes"),
            };
            part.pictures(range).map(byte).collect()
        };
        assert_eq!(found(5, false, 0..5), [0, 1, 2, 3, 4]);
        assert_eq!(found(5, true, 0..5), [0, 2, 4, 7, 9]);
        assert_eq!(found(5, true, 2..4), [4, 7]);
        assert_eq!(found(12, true, 0..12), (0..12).collect::<Vec<u8>>());
        assert!(
            Subset::new(Box::new(Sorted), 13, true).is_err()
                && Subset::new(Box::new(Sorted), 0, false).is_err()
        );
    }

    #[test]
    fn the_first_images_of_a_sorted_set_are_remarked_on() {
        let remarks =
            |count, spread| Subset::new(Box::new(Sorted), count, spread).unwrap().remarks().join("");
        assert!(remarks(8, false).contains("2 of 3 folders") && remarks(8, false).contains("--spread"));
        assert_eq!((remarks(9, false), remarks(12, false), remarks(8, true)), Default::default());
    }
}
