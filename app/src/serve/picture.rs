//! From a model's values to a PNG.

use anyhow::Context;

use crate::render::pixels::byte;

/// Latent values are shown from minus to plus this.
const LATENT_REACH: f32 = 3.0;

/// Bytes (H, W, 1 or 3) of values (C, H, W), and how many a pixel has.
///
/// One channel is grey and three are colour, in `[-1, 1]`. Any other number is a latent without a decoder: its first
/// three channels (one, of two) are shown as they are, from -3 to 3.
///
/// # Errors
/// `values` is not of `shape`.
pub fn pixels(values: &[f32], [channels, height, width]: [usize; 3]) -> anyhow::Result<(Vec<u8>, usize)> {
    let plane = height * width;
    anyhow::ensure!(values.len() == channels * plane && plane > 0, "internal: {} values", values.len());
    let (shown, scale) = match channels {
        1 | 3 => (channels, 1.0),
        2 => (1, 1.0 / LATENT_REACH),
        _ => (3, 1.0 / LATENT_REACH),
    };
    let pixel = |i: usize| (0..shown).map(move |c| byte(values[c * plane + i] * scale));
    Ok(((0..plane).flat_map(pixel).collect(), shown))
}

/// Encodes values (C, H, W) as a PNG of W × H pixels; see [`pixels`].
///
/// # Errors
/// `values` is not of `shape`.
pub fn png(values: &[f32], shape: [usize; 3]) -> anyhow::Result<Vec<u8>> {
    let (bytes, shown) = pixels(values, shape)?;
    let [_, height, width] = shape;
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width as u32, height as u32);
    encoder.set_color(if shown == 1 { png::ColorType::Grayscale } else { png::ColorType::Rgb });
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().context("png header")?;
    writer.write_image_data(&bytes).context("png data")?;
    writer.finish().context("png end")?;
    Ok(out)
}

/// How values become colours, in words.
pub fn decoder(channels: usize) -> &'static str {
    match channels {
        1 | 3 => "pixels",
        _ => "none: the first latent channels are shown, from -3 to 3",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(values: &[f32], shape: [usize; 3]) -> image::DynamicImage {
        image::load_from_memory(&png(values, shape).unwrap()).unwrap()
    }

    #[test]
    fn channels_become_grey_or_colour() {
        let grey = decoded(&[-1.0, 0.0, 1.0, 0.5], [1, 2, 2]).into_luma8();
        assert_eq!(grey.into_raw(), [0, 128, 255, 191]);
        let colour = decoded(&[-1.0, 0.0, 1.0], [3, 1, 1]);
        assert_eq!(colour.color(), image::ColorType::Rgb8);
        assert_eq!(colour.into_rgb8().into_raw(), [0, 128, 255]);
        let latent = decoded(&[-3.0, 0.0, 3.0, 99.0], [4, 1, 1]).into_rgb8();
        assert_eq!(latent.into_raw(), [0, 128, 255]);
        assert!(png(&[0.0; 3], [1, 2, 2]).is_err());
    }
}
