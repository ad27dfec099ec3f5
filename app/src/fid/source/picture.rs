//! One image, decoded and checked.

use std::path::Path;

use anyhow::bail;
use image::DynamicImage;
use train_engine::picture::{self, Decoded};

/// Values of an image on the scale 0..=255.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Bytes.
    U8(Vec<u8>),
    /// Not rounded; finite.
    F32(Vec<f32>),
}

/// One image, channels last.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// File and entry, for messages.
    pub name: String,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
    /// `(H, W, C)`.
    pub values: Values,
}

impl Picture {
    /// Decodes a PNG or a JPEG by its contents.
    ///
    /// # Errors
    /// Bytes of neither, cut or damaged ones, pictures with an alpha channel or more than 8 bits, huge ones.
    pub fn decode(name: &str, bytes: &[u8]) -> anyhow::Result<Self> {
        Self::of(name, picture::decode(Path::new(name), bytes)?)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// As [`decode`](Self::decode); a file that cannot be read.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        Self::of(&path.display().to_string(), picture::read(path)?)
    }

    /// Pixels as they are stored: the tools that FID is compared with do not turn them by EXIF either.
    fn of(name: &str, decoded: Decoded) -> anyhow::Result<Self> {
        let (width, height) = (decoded.image.width() as usize, decoded.image.height() as usize);
        let (channels, values) = match decoded.image {
            DynamicImage::ImageLuma8(image) => (1, image.into_raw()),
            DynamicImage::ImageRgb8(image) => (3, image.into_raw()),
            other => bail!(
                "cannot use the image `{name}`: its pixels are {:?}, expected 8-bit grey or colour without alpha; flatten or \
                 convert it",
                other.color()
            ),
        };
        Ok(Self { name: name.to_owned(), height, width, channels, values: Values::U8(values) })
    }

    /// Refuses values that are no pixels.
    ///
    /// # Errors
    /// NaN, infinities, values outside of 0..=255.
    pub fn check(&self) -> anyhow::Result<()> {
        if let Values::F32(values) = &self.values
            && let Some(bad) = values.iter().find(|v| !(0.0..=255.0).contains(*v))
        {
            bail!("`{}` holds {bad}; pixels are from 0 to 255", self.name);
        }
        Ok(())
    }

    /// The image with `channels` channels: grey is repeated, colour becomes the luma of ITU-R 601.
    ///
    /// # Errors
    /// Another number of channels than 1 or 3.
    pub fn with_channels(self, channels: usize) -> anyhow::Result<Self> {
        if self.channels == channels {
            return Ok(self);
        }
        let values = match (self.channels, channels, self.values) {
            (1, 3, Values::U8(v)) => Values::U8(v.iter().flat_map(|x| [*x; 3]).collect()),
            (1, 3, Values::F32(v)) => Values::F32(v.iter().flat_map(|x| [*x; 3]).collect()),
            (3, 1, Values::U8(v)) => Values::U8(v.as_chunks().0.iter().copied().map(luma).collect()),
            (3, 1, Values::F32(v)) => {
                let luma = |[r, g, b]: &[f32; 3]| 0.299 * r + 0.587 * g + 0.114 * b;
                Values::F32(v.as_chunks().0.iter().map(luma).collect())
            }
            (got, wanted, _) => {
                bail!("`{}` has {got} channels, the network takes {wanted}", self.name)
            }
        };
        Ok(Self { channels, values, ..self })
    }
}

/// Rounded as Python's imaging library does it, so that grey sets agree.
fn luma(colour: [u8; 3]) -> u8 {
    let [r, g, b] = colour.map(u32::from);
    ((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{GrayImage, ImageFormat, RgbImage, RgbaImage};

    use super::*;

    fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn colours() -> RgbImage {
        RgbImage::from_fn(9, 7, |x, y| image::Rgb([x as u8 * 20, y as u8 * 30, 100]))
    }

    #[test]
    fn pictures_decode_to_their_pixels() {
        let found = Picture::decode("a.png", &encode(colours(), ImageFormat::Png)).unwrap();
        assert_eq!((found.height, found.width, found.channels), (7, 9, 3));
        assert_eq!(found.values, Values::U8(colours().into_raw()));
        let grey = GrayImage::from_pixel(4, 4, image::Luma([9]));
        let found = Picture::decode("g", &encode(grey, ImageFormat::Jpeg)).unwrap();
        assert_eq!((found.channels, found.values), (1, Values::U8(vec![9; 16])));
    }

    #[test]
    fn spoiled_pictures_are_named() {
        let (png, jpeg) = (encode(colours(), ImageFormat::Png), encode(colours(), ImageFormat::Jpeg));
        let mut huge = png.clone();
        huge[16..24].copy_from_slice(&[0, 0, 0x7F, 0xFF, 0, 0, 0x7F, 0xFF]);
        let alpha = encode(RgbaImage::new(2, 2), ImageFormat::Png);
        let deep = encode(DynamicImage::new_rgb16(2, 2), ImageFormat::Png);
        for (bytes, part) in [
            (&png[..png.len() / 2], ""),
            (&jpeg[..jpeg.len() - 9], "cut short"),
            (b"text", "neither"),
            (&huge, ""),
            (&alpha, "alpha"),
            (&deep, "Rgb16"),
        ] {
            let error = format!("{:#}", Picture::decode("x/y.png", bytes).unwrap_err());
            assert!(error.contains("`x/y.png`") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn channels_become_what_the_network_takes() {
        let picture = |channels, values| Picture { name: "p".into(), height: 1, width: 1, channels, values };
        let grey = picture(1, Values::U8(vec![7])).with_channels(3).unwrap();
        assert_eq!(grey.values, Values::U8(vec![7; 3]));
        assert_eq!(grey.with_channels(1).unwrap().values, Values::U8(vec![7]));
        // PIL: Image.new("RGB", (1, 1), (200, 100, 50)).convert("L").getpixel((0, 0)) == 124
        let colour = picture(3, Values::U8(vec![200, 100, 50])).with_channels(1).unwrap();
        assert_eq!(colour.values, Values::U8(vec![124]));
        let error = picture(2, Values::U8(vec![0; 2])).with_channels(3).unwrap_err().to_string();
        assert!(error.contains("2 channels"), "{error}");
        for bad in [f32::NAN, -0.5, 256.0] {
            let error = picture(1, Values::F32(vec![bad])).check().unwrap_err().to_string();
            assert!(error.contains("`p` holds"), "{error}");
        }
    }
}
