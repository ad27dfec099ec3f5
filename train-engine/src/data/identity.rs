//! What tells one data set from another, wherever it lies: kept in a run's state and in a sweep's journal, so that no run
//! goes on with other images or labels than it began with.

use std::collections::BTreeSet;
use std::path::Path;

use runtime::file::hexadecimal;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Dataset;
use crate::error::{Result, TrainError};

/// Samples whose content is read, at most, of sets that are not in memory: a set of 100 GB is told in a moment.
const SAMPLES: usize = 1024;
/// Class names that a message lists.
const NAMED: usize = 5;

/// A data set's fingerprint. Paths and times are no part of it: a copy is the same set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataIdentity {
    /// Channels, rows and columns of an image.
    pub shape: [usize; 3],
    /// The classes by number: name and images.
    pub classes: Vec<(String, u64)>,
    /// SHA-256 of all labels in the set's order.
    pub labels: String,
    /// SHA-256 of the names and sizes of all files, of sets whose images are files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<String>,
    /// SHA-256 of the images as stored: all of a set in memory, else samples spread over the whole set.
    pub content: String,
}

/// What a data set adds to its [`DataIdentity`] beside sizes, classes and labels.
#[derive(Debug, Default)]
pub struct Stored {
    files: Option<Sha256>,
    content: Sha256,
}

impl Stored {
    /// A file of the set, by its name and size.
    pub fn file(&mut self, name: &Path, bytes: u64) {
        let files = self.files.get_or_insert_default();
        let name = name.as_os_str().as_encoded_bytes();
        files.update((name.len() as u64).to_le_bytes());
        files.update(name);
        files.update(bytes.to_le_bytes());
    }

    /// Stored bytes of a sample.
    pub fn content(&mut self, bytes: &[u8]) {
        self.content.update((bytes.len() as u64).to_le_bytes());
        self.content.update(bytes);
    }
}

/// Indices of a set of `len` whose content is looked at: all of a small one, else spread evenly, the last included.
pub(super) fn spread(len: usize) -> impl Iterator<Item = usize> {
    let count = len.min(SAMPLES);
    (0..count).map(
        move |i| if count < 2 { 0 } else { (i as u128 * (len - 1) as u128 / (count - 1) as u128) as usize },
    )
}

impl DataIdentity {
    /// The identity of an open data set.
    ///
    /// # Errors
    /// What reading it gives.
    pub fn of(set: &dyn Dataset) -> Result<Self> {
        let (mut counts, mut labels) = (vec![0; set.num_classes()], Sha256::new());
        for index in 0..set.len() {
            let label = set.label(index);
            labels.update(label.to_le_bytes());
            let count = usize::try_from(label).ok().and_then(|class| counts.get_mut(class));
            *count.ok_or_else(|| TrainError::Internal(format!("sample {index} is of class {label}")))? += 1;
        }
        let mut stored = Stored::default();
        set.stored(&mut stored)?;
        let hash = |hasher: Sha256| hexadecimal(&hasher.finalize());
        Ok(Self {
            shape: [set.channels(), set.height(), set.width()],
            classes: set.class_names().iter().cloned().zip(counts).collect(),
            labels: hash(labels),
            files: stored.files.map(hash),
            content: hash(stored.content),
        })
    }

    /// Images of the set.
    pub fn images(&self) -> u64 {
        self.classes.iter().map(|(_, images)| images).sum()
    }

    /// What is different from the set as it was `before`, in words; empty for the same set.
    pub fn differences(&self, before: &Self) -> Vec<String> {
        let mut told = Vec::new();
        if self.shape != before.shape {
            told.push(format!("images are {:?} instead of {:?}", self.shape, before.shape));
        }
        told.extend(self.classes_apart(before));
        if self.images() != before.images() {
            told.push(format!("{} images instead of {}", self.images(), before.images()));
            told.extend(self.counts_apart(before));
            return told; // all hashes follow from that
        }
        if self.labels != before.labels {
            told.extend(self.counts_apart(before));
            told.push("the labels are others, or in another order".to_owned());
        }
        if self.files != before.files {
            told.push("the files have other names or sizes".to_owned());
        } else if self.content != before.content {
            told.push("the content of the images is another".to_owned());
        }
        told
    }

    fn classes_apart(&self, before: &Self) -> Option<String> {
        let names = |set: &'_ Self| set.classes.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let (is, was) = (names(self), names(before));
        if is == was {
            return None;
        }
        let [now, then] = [&is, &was].map(|names| names.iter().map(String::as_str).collect::<BTreeSet<_>>());
        let list = |names: Vec<&&str>| {
            let shown: Vec<String> = names.iter().take(NAMED).map(|name| format!("`{name}`")).collect();
            let more = if names.len() > NAMED {
                format!(" and {} more", names.len() - NAMED)
            } else {
                String::new()
            };
            format!("{}{more}", shown.join(", "))
        };
        let (new, gone): (Vec<_>, Vec<_>) =
            (now.difference(&then).collect(), then.difference(&now).collect());
        let mut parts = Vec::new();
        if is.len() != was.len() {
            parts.push(format!("{} classes instead of {}", is.len(), was.len()));
        }
        if !gone.is_empty() {
            parts.push(format!("class {} is gone", list(gone)));
        }
        if !new.is_empty() {
            parts.push(format!("class {} is new", list(new)));
        }
        if parts.is_empty() {
            parts.push("the classes are in another order".to_owned());
        }
        Some(parts.join(", "))
    }

    /// Classes of one name that have another number of images.
    fn counts_apart(&self, before: &Self) -> Option<String> {
        let was =
            |name: &str| before.classes.iter().find(|(other, _)| other == name).map(|(_, images)| *images);
        let changed = self.classes.iter().filter_map(|(name, is)| {
            let was = was(name)?;
            (was != *is).then(|| format!("`{name}` has {is} instead of {was}"))
        });
        let changed: Vec<String> = changed.take(NAMED).collect();
        (!changed.is_empty()).then(|| changed.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(classes: &[(&str, u64)]) -> DataIdentity {
        DataIdentity {
            shape: [1, 8, 8],
            classes: classes.iter().map(|(name, images)| ((*name).to_owned(), *images)).collect(),
            labels: "a".into(),
            files: Some("b".into()),
            content: "c".into(),
        }
    }

    #[test]
    fn every_difference_is_named() {
        let before = identity(&[("cat", 8), ("dog", 8)]);
        let labels = DataIdentity { labels: "x".into(), ..before.clone() };
        let files = DataIdentity { files: Some("x".into()), ..before.clone() };
        let content = DataIdentity { content: "x".into(), ..before.clone() };
        let shape = DataIdentity { shape: [3, 8, 8], ..before.clone() };
        for (now, parts) in [
            (before.clone(), &[][..]),
            (identity(&[("aardvark", 8), ("cat", 8)]), &["class `dog` is gone, class `aardvark` is new"]),
            (identity(&[("dog", 8), ("cat", 8)]), &["the classes are in another order"]),
            (identity(&[("cat", 11), ("dog", 8)]), &["19 images instead of 16", "`cat` has 11 instead of 8"]),
            (
                identity(&[("bird", 8), ("cat", 8), ("dog", 8)]),
                &["3 classes instead of 2, class `bird` is new", "24 images instead of 16"],
            ),
            (labels, &["the labels are others, or in another order"]),
            (files, &["the files have other names or sizes"]),
            (content, &["the content of the images is another"]),
            (shape, &["images are [3, 8, 8] instead of [1, 8, 8]"]),
        ] {
            assert_eq!(now.differences(&before), parts);
        }
    }

    #[test]
    fn samples_are_spread_from_the_first_to_the_last() {
        assert_eq!(spread(0).count(), 0);
        assert_eq!(spread(1).collect::<Vec<_>>(), [0]);
        assert_eq!(spread(5).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        let many: Vec<usize> = spread(1_000_000_000).collect();
        assert_eq!((many.len(), many[0], many[SAMPLES - 1]), (SAMPLES, 0, 999_999_999));
        assert!(many.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
