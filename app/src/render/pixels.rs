//! Float images as bytes.

use anyhow::ensure;

/// The byte of one channel value: `trunc(clamp(127.5·x + 128, 0, 255))`, so that -1 is 0 and 1 is 255. NaN is 0.
///
/// # Source
/// The DiT authors' `sample_ddp.py`; FID sets made with another rounding are half a grey level off.
pub fn byte(x: f32) -> u8 {
    // Two roundings, as in the reference; a fused multiply-add would differ at the borders.
    (127.5 * x + 128.0).clamp(0.0, 255.0) as u8
}

/// A batch of images as bytes, channels last.
///
/// # Shapes
/// - `values`: `shape` = `[N, C, H, W]`, in `[-1, 1]`
/// - returns `(N, H, W, C)`
///
/// # Errors
/// `values` does not have as many elements as `shape` says.
pub fn channels_last(values: &[f32], shape: [usize; 4]) -> anyhow::Result<Vec<u8>> {
    check(values, shape)?;
    let [n, c, h, w] = shape;
    let plane = h * w;
    let mut bytes = Vec::with_capacity(values.len());
    for image in values.chunks_exact((c * plane).max(1)).take(n) {
        for pixel in 0..plane {
            bytes.extend(image.iter().skip(pixel).step_by(plane).map(|&x| byte(x)));
        }
    }
    Ok(bytes)
}

/// Refuses a buffer that is not of its shape.
pub(super) fn check(values: &[f32], shape: [usize; 4]) -> anyhow::Result<()> {
    let expected = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
    ensure!(
        expected == Some(values.len()),
        "images of shape {shape:?} (N, C, H, W) need {} values, got {}",
        expected.map_or_else(|| "too many".to_owned(), |n| n.to_string()),
        values.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_truncated_after_adding_128() {
        let table: [(f32, u8); 9] = [
            (-1.0, 0),
            (-0.996, 1), // 1.01
            (0.0, 128),
            (-0.000_1, 127),
            (0.99, 254), // 254.225
            (1.0, 255),
            (7.0, 255),
            (f32::NEG_INFINITY, 0),
            (f32::NAN, 0),
        ];
        for (x, expected) in table {
            assert_eq!(byte(x), expected, "{x}");
        }
    }

    #[test]
    fn channels_move_last() {
        // (N, C, H, W) = (2, 3, 1, 2); every element its own byte.
        let values: Vec<f32> = (0u8..12).map(|b| (f32::from(b) - 127.75) / 127.5).collect();
        let bytes = channels_last(&values, [2, 3, 1, 2]).unwrap();
        assert_eq!(bytes, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }

    #[test]
    fn a_buffer_of_another_size_is_refused() {
        let error = channels_last(&[0.0; 5], [1, 1, 2, 3]).unwrap_err().to_string();
        assert!(error.contains("need 6") && error.contains("got 5"), "{error}");
    }
}
