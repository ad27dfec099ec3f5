//! Images encoded beforehand by a VAE, in a `.safetensors` file.

use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::{Dataset, check_read};
use crate::error::{Result, TrainError};
use crate::random::Stream;
use crate::tensor_file::{TensorEntry, TensorFile};

/// A tensor of latents and, where it is the mean of a posterior, the posterior's deviation.
#[derive(Debug)]
struct Posterior {
    mean: TensorEntry,
    std: Option<TensorEntry>,
}

/// Latents read from their file on demand.
///
/// The file holds `latents` `(M, C, H, W)` in F32, F16 or BF16 and `labels` `(M)` I64. With a `std` of the same shape,
/// `latents` is the mean and each read draws `mean + std·z`. `latents_flipped` (and `std_flipped`) hold the encodings of
/// the mirrored images; without them no flip is possible, as a mirrored latent is not the latent of the mirrored image.
/// The file's metadata may give `scale`, which every read is multiplied with, and `num_classes`.
#[derive(Debug)]
pub struct Latents {
    file: TensorFile,
    plain: Posterior,
    flipped: Option<Posterior>,
    labels: Vec<i64>,
    scale: f32,
    class_names: Vec<String>,
}

impl Latents {
    /// Opens a file and checks names, types, shapes and labels; the latents themselves stay on disk.
    ///
    /// # Errors
    /// [`TrainError::Io`], [`TrainError::BadFile`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let check = Check { path: path.to_path_buf(), file: &file };
        let mean = check.latents("latents", None)?;
        let shape = mean.shape.clone();
        let std = check.optional("std", &shape)?;
        let flipped = match check.optional("latents_flipped", &shape)? {
            None => None,
            Some(mean) => {
                let flipped_std = check.optional("std_flipped", &shape)?;
                if flipped_std.is_some() != std.is_some() {
                    let expected = "`std` and `std_flipped` together or neither";
                    return Err(TrainError::bad_file(path, "tensors", expected, "one of the two"));
                }
                Some(Posterior { mean, std: flipped_std })
            }
        };
        let labels = check.labels(shape[0])?;
        let scale: f32 = check.number("scale", 1.0)?;
        if !scale.is_finite() || scale == 0.0 {
            return Err(TrainError::bad_file(
                path,
                "metadata `scale`",
                "a finite number other than 0",
                scale,
            ));
        }
        let least = labels.iter().max().map_or(0, |last| *last as usize + 1);
        let classes = check.number("num_classes", least)?;
        if classes < least {
            let expected = format!("at least {least}, as the labels say");
            return Err(TrainError::bad_file(path, "metadata `num_classes`", expected, classes));
        }
        let class_names = (0..classes).map(|class| class.to_string()).collect();
        Ok(Self { plain: Posterior { mean, std }, flipped, labels, scale, class_names, file })
    }
}

impl Dataset for Latents {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn channels(&self) -> usize {
        self.plain.mean.shape[1]
    }

    fn height(&self) -> usize {
        self.plain.mean.shape[2]
    }

    fn width(&self) -> usize {
        self.plain.mean.shape[3]
    }

    fn num_classes(&self) -> usize {
        self.class_names.len()
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn can_flip(&self) -> bool {
        self.flipped.is_some()
    }

    fn place(&self, index: usize) -> String {
        format!("row {index} of `{}`", self.file.path().display())
    }

    fn read(&self, index: usize, flip: bool, draw: &mut Stream, out: &mut [f32]) -> Result<i64> {
        check_read(self, index, out)?;
        let posterior = match &self.flipped {
            Some(flipped) if flip => flipped,
            None if flip => {
                return Err(TrainError::Internal(
                    "a mirrored latent was asked of a file that has none".into(),
                ));
            }
            _ => &self.plain,
        };
        self.file.read_row_f32(&posterior.mean, index, out)?;
        if let Some(std) = &posterior.std {
            let mut deviations = vec![0.0; out.len()];
            self.file.read_row_f32(std, index, &mut deviations)?;
            for (value, deviation) in out.iter_mut().zip(deviations) {
                *value += deviation * draw.normal();
            }
        }
        for value in out.iter_mut() {
            *value *= self.scale;
        }
        Ok(self.labels[index])
    }
}

struct Check<'a> {
    path: PathBuf,
    file: &'a TensorFile,
}

impl Check<'_> {
    /// A float tensor `(M, C, H, W)`, of the given shape where one is given.
    fn latents(&self, name: &str, shape: Option<&[usize]>) -> Result<TensorEntry> {
        let tensor = self.file.entry(name)?;
        let bad = |what: &str, expected: String, got: String| {
            Err(TrainError::bad_file(&self.path, format!("{what} of `{name}`"), expected, got))
        };
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return bad("element type", "F32, F16 or BF16".into(), format!("{:?}", tensor.dtype));
        }
        match shape {
            Some(shape) if shape != tensor.shape => {
                bad("shape", format!("{shape:?}, as `latents` has"), format!("{:?}", tensor.shape))
            }
            None if tensor.shape.len() != 4 || tensor.shape.contains(&0) => {
                bad("shape", "(M, C, H, W), none of them 0".into(), format!("{:?}", tensor.shape))
            }
            _ => Ok(tensor),
        }
    }

    fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<TensorEntry>> {
        self.file.has(name).then(|| self.latents(name, Some(shape))).transpose()
    }

    fn labels(&self, count: usize) -> Result<Vec<i64>> {
        let tensor = self.file.entry("labels")?;
        if tensor.dtype != Dtype::I64 || tensor.shape != [count] {
            let got = format!("{:?} {:?}", tensor.dtype, tensor.shape);
            return Err(TrainError::bad_file(&self.path, "`labels`", format!("I64 [{count}]"), got));
        }
        let bytes = self.file.read_rows(&tensor, 0, count)?;
        let labels: Vec<i64> = bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
        match labels.iter().find(|label| !(0..=i64::from(u32::MAX)).contains(label)) {
            Some(label) => {
                Err(TrainError::bad_file(&self.path, "`labels`", "class numbers from 0 on", label))
            }
            None => Ok(labels),
        }
    }

    fn number<T: std::str::FromStr>(&self, key: &str, default: T) -> Result<T> {
        let Some(text) = self.file.note(key) else { return Ok(default) };
        text.trim().parse().map_err(|_| {
            TrainError::bad_file(&self.path, format!("metadata `{key}`"), "a number", format!("`{text}`"))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use half::f16;
    use safetensors::tensor::TensorView;

    use super::*;
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
    fn what_does_not_fit_is_named() {
        let latents = || floats("latents", SHAPE, 0.0);
        let message =
            |tensors: &[Tensor], notes: &[(&str, &str)]| open(tensors, notes).unwrap_err().to_string();
        assert!(message(&[labels(&[0])], &[]).contains("latents"));
        assert!(message(&[latents()], &[]).contains("labels"));
        assert!(
            message(&[latents(), labels(&[0, 1])], &[]).contains("`labels`: expected I64 [3], got I64 [2]")
        );
        assert!(message(&[latents(), labels(&[0, -1, 2])], &[]).contains("class numbers from 0 on, got -1"));
        let flat = ("latents", Dtype::F32, vec![3, 4], vec![0; 48]);
        assert!(message(&[flat, labels(&[0; 3])], &[]).contains("shape of `latents`: expected (M, C, H, W)"));
        let bytes = ("latents", Dtype::U8, SHAPE.to_vec(), vec![0; 12]);
        assert!(message(&[bytes, labels(&[0; 3])], &[]).contains("expected F32, F16 or BF16, got U8"));
        let std = floats("std", [3, 1, 2, 1], 0.0);
        assert!(message(&[latents(), std, labels(&[0; 3])], &[]).contains("shape of `std`"));
        let lonely =
            [latents(), floats("std", SHAPE, 0.0), floats("latents_flipped", SHAPE, 0.0), labels(&[0; 3])];
        assert!(message(&lonely, &[]).contains("`std` and `std_flipped` together"));
        for (key, text) in [("scale", "many"), ("scale", "0"), ("num_classes", "2")] {
            let text = message(&[latents(), labels(&[0, 1, 2])], &[(key, text)]);
            assert!(text.contains(&format!("metadata `{key}`")), "{text}");
        }
    }
}
