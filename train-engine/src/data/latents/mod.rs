//! Images encoded beforehand by a VAE: a `.safetensors` file, or arrays of NumPy.

mod numpy;
mod rows;
mod tensors;

use std::path::Path;

use rows::Rows;

use super::identity::spread;
use super::{Dataset, Stored, check_read};
use crate::error::{Result, TrainError};
use crate::random::Stream;

/// Classes that any file may have; more than that are believed of a file with as many samples.
const CLASSES: usize = 1 << 15;
/// Leading bytes of a row that tell its content.
const HEAD: usize = 32 << 10;

/// A tensor of latents and, where it is the mean of a posterior, the posterior's deviation.
#[derive(Debug)]
struct Posterior {
    mean: Rows,
    std: Option<Rows>,
}

/// What a file or directory of latents was found to hold.
#[derive(Debug)]
struct Parts {
    plain: Posterior,
    flipped: Option<Posterior>,
    labels: Vec<i64>,
    scale: f32,
    classes: Classes,
}

/// What is known of the classes beside the labels.
#[derive(Debug)]
enum Classes {
    /// Nothing: there are as many as the labels say.
    ByLabels,
    /// Their number.
    Number(usize),
    /// Their names.
    Names(Vec<String>),
}

/// Latents read from their files on demand.
///
/// A `.safetensors` file holds `latents` `(M, C, H, W)` in F32, F16 or BF16 and `labels` `(M)` I64. With a `std` of the
/// same shape, `latents` is the mean and each read draws `mean + std·z`. `latents_flipped` (and `std_flipped`) hold the
/// encodings of the mirrored images; without them no flip is possible, as a mirrored latent is not the latent of the
/// mirrored image. The file's metadata may give `scale`, which every read is multiplied with, and `num_classes`.
///
/// An `.npz` file, or a directory of `.npy` files, holds arrays of the same names. A directory may also hold one `.npy` for
/// each image: in one sub-directory a class, or in two whose names end in `features` (or `latents`) and `labels`.
#[derive(Debug)]
pub struct Latents {
    parts: Parts,
    class_names: Vec<String>,
}

impl Latents {
    /// Opens a file or directory and checks names, types, shapes and labels; the latents themselves stay on disk.
    ///
    /// # Errors
    /// [`TrainError::Io`], [`TrainError::BadFile`], [`TrainError::BadDataset`].
    pub fn open(path: &Path) -> Result<Self> {
        let parts = if path.is_dir() {
            numpy::open_directory(path)?
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npz")) {
            numpy::open_archive(path)?
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy")) {
            return Err(TrainError::BadDataset { path: path.to_path_buf(), reason: numpy::WANTED.into() });
        } else {
            tensors::open(path)?
        };
        if !parts.scale.is_finite() || parts.scale == 0.0 {
            let expected = "a finite number other than 0";
            return Err(TrainError::bad_file(path, "metadata `scale`", expected, parts.scale));
        }
        let least = judged_labels(path, &parts.labels)?;
        let class_names = match &parts.classes {
            Classes::Names(names) => names.clone(),
            Classes::ByLabels => numbered(least),
            Classes::Number(classes) if (least..=most_classes(&parts.labels)).contains(classes) => {
                numbered(*classes)
            }
            Classes::Number(classes) => {
                let most = most_classes(&parts.labels);
                let expected = format!("from {least}, as the labels say, to {most}");
                return Err(TrainError::bad_file(path, "metadata `num_classes`", expected, classes));
            }
        };
        Ok(Self { parts, class_names })
    }

    fn posterior(&self, flip: bool) -> Result<&Posterior> {
        match &self.parts.flipped {
            Some(flipped) if flip => Ok(flipped),
            None if flip => {
                Err(TrainError::Internal("a mirrored latent was asked of a file that has none".into()))
            }
            _ => Ok(&self.parts.plain),
        }
    }
}

/// The number of classes that labels need at least: it decides about memory, so it is judged first.
fn judged_labels(path: &Path, labels: &[i64]) -> Result<usize> {
    let most = most_classes(labels);
    let wrong = labels.iter().enumerate().find(|(_, label)| !(0..most as i64).contains(*label));
    if let Some((row, label)) = wrong {
        let expected = format!("class numbers from 0 to {}", most - 1);
        return Err(TrainError::bad_file(path, format!("`labels`, row {row}"), expected, label));
    }
    Ok(labels.iter().max().map_or(0, |last| *last as usize + 1))
}

fn most_classes(labels: &[i64]) -> usize {
    labels.len().max(CLASSES)
}

fn numbered(classes: usize) -> Vec<String> {
    (0..classes).map(|class| class.to_string()).collect()
}

impl Dataset for Latents {
    fn len(&self) -> usize {
        self.parts.labels.len()
    }

    fn channels(&self) -> usize {
        self.parts.plain.mean.shape()[0]
    }

    fn height(&self) -> usize {
        self.parts.plain.mean.shape()[1]
    }

    fn width(&self) -> usize {
        self.parts.plain.mean.shape()[2]
    }

    fn num_classes(&self) -> usize {
        self.class_names.len()
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn can_flip(&self) -> bool {
        self.parts.flipped.is_some()
    }

    fn place(&self, index: usize) -> String {
        self.parts.plain.mean.place(index)
    }

    fn label(&self, index: usize) -> i64 {
        self.parts.labels[index]
    }

    fn stored(&self, into: &mut Stored) -> Result<()> {
        into.content(&self.parts.scale.to_le_bytes());
        let posteriors = [Some(&self.parts.plain), self.parts.flipped.as_ref()].into_iter().flatten();
        for rows in posteriors.flat_map(|posterior| std::iter::once(&posterior.mean).chain(&posterior.std)) {
            rows.add_files(into)?;
            for index in spread(self.len()) {
                let bytes = rows.bytes(index)?;
                into.content(&bytes[..bytes.len().min(HEAD)]);
            }
        }
        Ok(())
    }

    fn read(&self, index: usize, flip: bool, draw: &mut Stream, out: &mut [f32]) -> Result<i64> {
        check_read(self, index, out)?;
        let posterior = self.posterior(flip)?;
        posterior.mean.read(index, out)?;
        if let Some(std) = &posterior.std {
            let mut deviations = vec![0.0; out.len()];
            std.read(index, &mut deviations)?;
            for (value, deviation) in out.iter_mut().zip(deviations) {
                *value += deviation * draw.normal();
            }
        }
        for value in out.iter_mut() {
            *value *= self.parts.scale;
        }
        Ok(self.label(index))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use half::f16;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::data::read_finite;
    use crate::random::Purpose;

    type Tensor = (&'static str, Dtype, Vec<usize>, Vec<u8>);

    fn floats(name: &'static str, shape: [usize; 4], first: f32) -> Tensor {
        let count = shape.iter().product::<usize>();
        (
            name,
            Dtype::F32,
            shape.to_vec(),
            (0..count).flat_map(|i| (first + i as f32).to_le_bytes()).collect(),
        )
    }

    fn labels(labels: &[i64]) -> Tensor {
        ("labels", Dtype::I64, vec![labels.len()], labels.iter().flat_map(|l| l.to_le_bytes()).collect())
    }

    fn open(tensors: &[Tensor], notes: &[(&str, &str)]) -> Result<Latents> {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let notes: HashMap<String, String> =
            notes.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), safetensors::serialize(views, Some(notes)).unwrap()).unwrap();
        // The handle inside keeps the file readable after its name is gone.
        Latents::open(file.path())
    }

    fn read(set: &Latents, index: usize, flip: bool, sample: u64) -> (i64, Vec<f32>) {
        let mut out = vec![0.0; set.image_len()];
        let label =
            set.read(index, flip, &mut Stream::new(0, Purpose::VaeDraw, 0, sample), &mut out).unwrap();
        (label, out)
    }

    const SHAPE: [usize; 4] = [3, 1, 2, 2];

    #[test]
    fn rows_are_scaled_and_labelled() {
        let set = open(&[floats("latents", SHAPE, 0.0), labels(&[0, 4, 1])], &[("scale", "0.5")]).unwrap();
        assert_eq!(
            (set.len(), set.channels(), set.height(), set.width(), set.num_classes()),
            (3, 1, 2, 2, 5)
        );
        assert_eq!(read(&set, 1, false, 0), (4, vec![2.0, 2.5, 3.0, 3.5]));
        assert!(!set.can_flip());
        let mut out = [0.0; 4];
        assert!(set.read(0, true, &mut Stream::new(0, Purpose::VaeDraw, 0, 0), &mut out).is_err());
    }

    #[test]
    fn halves_are_widened() {
        let bytes =
            [1.5f32, -2.0, 0.25, 8.0].into_iter().flat_map(|v| f16::from_f32(v).to_le_bytes()).collect();
        let set = open(&[("latents", Dtype::F16, vec![1, 1, 2, 2], bytes), labels(&[0])], &[]).unwrap();
        assert_eq!(read(&set, 0, false, 0).1, [1.5, -2.0, 0.25, 8.0]);
    }

    #[test]
    fn a_posterior_is_drawn_from_its_stream() {
        let std = floats("std", SHAPE, 1.0);
        let set = open(&[floats("latents", SHAPE, 0.0), std, labels(&[0, 0, 0])], &[]).unwrap();
        let mut draw = Stream::new(0, Purpose::VaeDraw, 0, 7);
        let expected: Vec<f32> = (4..8).map(|i| i as f32 + (i as f32 + 1.0) * draw.normal()).collect();
        assert_eq!(read(&set, 1, false, 7).1, expected);
        assert_ne!(read(&set, 1, false, 8).1, expected);
    }

    #[test]
    fn mirrored_latents_are_their_own_tensor() {
        let tensors =
            [floats("latents", SHAPE, 0.0), floats("latents_flipped", SHAPE, 100.0), labels(&[0, 0, 0])];
        let set = open(&tensors, &[]).unwrap();
        assert!(set.can_flip());
        assert_eq!(read(&set, 2, true, 0).1, [108.0, 109.0, 110.0, 111.0]);
    }

    #[test]
    fn numbers_that_are_not_finite_are_named_with_their_row() {
        let set = |name: &'static str, at: usize, value: f32| {
            let mut tensors = [floats("latents", SHAPE, 0.0), floats("std", SHAPE, 1.0), labels(&[0, 1, 2])];
            let tensor = tensors.iter_mut().find(|(other, ..)| *other == name).unwrap();
            tensor.3[4 * at..][..4].copy_from_slice(&value.to_le_bytes());
            open(&tensors, &[]).unwrap()
        };
        let error = |set: &Latents| {
            let mut out = vec![0.0; 4];
            let read = |index| {
                let draw = &mut Stream::new(0, Purpose::VaeDraw, 0, 0);
                read_finite(set, index, false, draw, &mut out)
            };
            let errors: Vec<String> =
                (0..3).map(read).filter_map(Result::err).map(|e| e.to_string()).collect();
            assert_eq!(errors.len(), 1, "{errors:?}");
            errors.concat()
        };
        let text = error(&set("latents", 5, f32::NAN));
        assert!(
            text.starts_with("the data set holds NaN in row 1 of `/") && text.contains("(value 1 of it)"),
            "{text}"
        );
        let text = error(&set("std", 11, f32::NEG_INFINITY));
        assert!(text.contains("in row 2 of `/") && text.contains("(value 3 of it)"), "{text}");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let latents = || floats("latents", SHAPE, 0.0);
        let message =
            |tensors: &[Tensor], notes: &[(&str, &str)]| open(tensors, notes).unwrap_err().to_string();
        assert!(message(&[labels(&[0])], &[]).contains("latents"));
        assert!(message(&[latents()], &[]).contains("labels"));
        assert!(
            message(&[latents(), labels(&[0, 1])], &[]).contains("`labels`: expected I64 [3], got I64 [2]")
        );
        for wrong in [-1, 40_000, 1_000_000_000, i64::MAX, i64::MIN] {
            let text = message(&[latents(), labels(&[0, wrong, 2])], &[]);
            let expected = format!("`labels`, row 1: expected class numbers from 0 to 32767, got {wrong}");
            assert!(text.contains(&expected), "{text}");
        }
        let flat = ("latents", Dtype::F32, vec![3, 4], vec![0; 48]);
        assert!(message(&[flat, labels(&[0; 3])], &[]).contains("shape of `latents`: expected (M, C, H, W)"));
        let bytes = ("latents", Dtype::U8, SHAPE.to_vec(), vec![0; 12]);
        assert!(message(&[bytes, labels(&[0; 3])], &[]).contains("expected F32, F16 or BF16, got U8"));
        let std = floats("std", [3, 1, 2, 1], 0.0);
        assert!(message(&[latents(), std, labels(&[0; 3])], &[]).contains("shape of `std`"));
        let lonely =
            [latents(), floats("std", SHAPE, 0.0), floats("latents_flipped", SHAPE, 0.0), labels(&[0; 3])];
        assert!(message(&lonely, &[]).contains("`std` and `std_flipped` together"));
        for (key, text) in [
            ("scale", "many"),
            ("scale", "0"),
            ("num_classes", "2"),
            ("num_classes", "99999999999999"),
            ("num_classes", "-1"),
        ] {
            let text = message(&[latents(), labels(&[0, 1, 2])], &[(key, text)]);
            assert!(text.contains(&format!("metadata `{key}`")), "{text}");
        }
    }
}
