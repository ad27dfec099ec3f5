//! What the values of an array mean, and whether they are what they are taken for.

use anyhow::bail;
use serde::{Deserialize, Serialize};

use super::Values;
use crate::Usage;
use crate::fid::plan::BLOCK;

/// Range of the pixels of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// 0 to 255.
    Bytes,
    /// 0 to 1.
    Unit,
    /// -1 to 1.
    Signed,
}

/// Pixels of 0 … 255 of which none is above this are those of another scale; decoders overshoot 1 a little.
const DARKEST: f32 = 2.0;
/// Part of bytes that are 1, where others are 0, from which on they are no dark picture.
const ONES: f64 = 0.01;

impl Scale {
    /// Its name on the command line, and the range.
    fn range(self) -> (&'static str, [f32; 2]) {
        match self {
            Self::Bytes => ("bytes", [0.0, 255.0]),
            Self::Unit => ("unit", [0.0, 1.0]),
            Self::Signed => ("signed", [-1.0, 1.0]),
        }
    }

    /// The values on the scale 0 … 255; `name` is the image's.
    ///
    /// # Errors
    /// Values outside of the range.
    pub(super) fn to_bytes(self, values: Values, name: &str) -> anyhow::Result<Values> {
        if self == Self::Bytes {
            // Judged by every picture's own check.
            return Ok(values);
        }
        let (word, [low, high]) = self.range();
        let outside = |bad: &dyn std::fmt::Display| {
            Usage(format!(
                "{name} holds {bad}; pixels of `--scale {word}` are from {low} to {high}: clip them, or name another scale"
            ))
        };
        match values {
            Values::U8(mut bytes) => {
                if let Some(bad) = bytes.iter().find(|b| self == Self::Signed || **b > 1) {
                    return Err(outside(bad).into());
                }
                for byte in &mut bytes {
                    *byte *= 255;
                }
                Ok(Values::U8(bytes))
            }
            Values::F32(mut floats) => {
                if let Some(bad) = floats.iter().find(|v| !(low..=high).contains(*v)) {
                    return Err(outside(bad).into());
                }
                for value in &mut floats {
                    *value = (*value - low) * (255.0 / (high - low));
                }
                Ok(Values::F32(floats))
            }
        }
    }
}

/// Refuses images that are said to be of 0 … 255 and are of another scale by all that a block of them shows; black images
/// are passed over. `place` is the array's name.
///
/// # Errors
/// Such images; what reading says.
pub(super) fn judge(images: impl Iterator<Item = anyhow::Result<Values>>, place: &str) -> anyhow::Result<()> {
    let (mut lowest, mut seen, mut ones, mut total, mut bytes) = (0.0f32, 0, 0, 0, false);
    for image in images {
        let telling = match image? {
            Values::U8(values) => {
                if values.iter().any(|v| *v > 1) {
                    return Ok(());
                }
                bytes = true;
                // None is above 1.
                let own: usize = values.iter().map(|v| usize::from(*v)).sum();
                (ones, total) = (ones + own, total + values.len());
                own > 0
            }
            Values::F32(values) => {
                if values.iter().any(|v| *v > DARKEST) {
                    return Ok(());
                }
                lowest = values.iter().copied().fold(lowest, f32::min);
                values.iter().any(|v| *v != 0.0)
            }
        };
        seen += u64::from(telling);
        if seen == BLOCK {
            break;
        }
    }
    // Below that, no scale is near: each image's own check tells.
    if seen == 0 || lowest < -DARKEST || bytes && (ones as f64) < ONES * total as f64 {
        return Ok(());
    }
    let (found, scale) = match (bytes, lowest < 0.0) {
        (true, _) => ("every byte is 0 or 1", Scale::Unit),
        (false, false) => ("the values are from 0 to 1", Scale::Unit),
        (false, true) => ("the values are from -1 to 1", Scale::Signed),
    };
    let (word, [low, high]) = scale.range();
    bail!(Usage(format!(
        "{place}: {found} in all {seen} images that were looked at, and pixels are from 0 to 255: say `--scale {word}` if \
         {low} to {high} is their range, or `--scale bytes` if they are nearly black"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(images: &[Values]) -> Option<String> {
        judge(images.iter().cloned().map(Ok), "x.npz: arr_0").err().map(|e| e.to_string())
    }

    #[test]
    fn another_scale_is_seen_and_named() {
        let floats = |v: &[f32]| Values::F32(v.to_vec());
        let black = || Values::U8(vec![0; 9]);
        for (images, expected) in [
            (vec![floats(&[0.0, 0.5, 1.0])], Some("`--scale unit`")),
            (vec![floats(&[0.0, 0.0]), floats(&[0.3, 0.999])], Some("`--scale unit`")),
            (vec![floats(&[0.1, 1.01])], Some("`--scale unit`")),
            (vec![floats(&[-1.0, 0.2]), floats(&[0.3, 1.0])], Some("`--scale signed`")),
            (vec![floats(&[-1.004, 0.2])], Some("`--scale signed`")),
            (vec![black(), Values::U8(vec![0, 1, 1])], Some("`--scale unit`")),
            (vec![floats(&[0.0, 0.5]), floats(&[0.0, 3.0])], None),
            (vec![floats(&[0.0; 5])], None),
            (vec![floats(&[-3.0, 1.0])], None),
            (vec![black(), black()], None),
            (vec![Values::U8(vec![0, 1, 2])], None),
            // A black set of which one pixel is off.
            (vec![Values::U8([vec![0; 300], vec![1]].concat())], None),
        ] {
            let found = judged(&images);
            assert_eq!(found.is_some(), expected.is_some(), "{images:?}: {found:?}");
            if let (Some(found), Some(part)) = (found, expected) {
                assert!(found.contains(part) && found.starts_with("x.npz"), "{found}");
            }
        }
    }

    #[test]
    fn a_given_scale_is_brought_to_bytes() {
        let floats = |scale: Scale, v: &[f32]| scale.to_bytes(Values::F32(v.to_vec()), "image 3");
        assert_eq!(floats(Scale::Unit, &[0.0, 0.2, 1.0]).unwrap(), Values::F32(vec![0.0, 51.0, 255.0]));
        assert_eq!(floats(Scale::Signed, &[-1.0, 0.0, 1.0]).unwrap(), Values::F32(vec![0.0, 127.5, 255.0]));
        let ones = Scale::Unit.to_bytes(Values::U8(vec![0, 1]), "x").unwrap();
        assert_eq!(ones, Values::U8(vec![0, 255]));
        for (scale, bad) in
            [(Scale::Unit, 1.5), (Scale::Unit, -0.1), (Scale::Signed, 1.5), (Scale::Unit, f32::NAN)]
        {
            let error = floats(scale, &[0.5, bad]).unwrap_err().to_string();
            assert!(error.contains("image 3") && error.contains(&bad.to_string()), "{error}");
        }
        assert!(Scale::Signed.to_bytes(Values::U8(vec![1]), "x").is_err());
        assert!(Scale::Unit.to_bytes(Values::U8(vec![7]), "x").is_err());
    }
}
