//! From the bytes of a picture file to its pixels.

use std::fs;
use std::io::{self, Cursor};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use super::jpeg;
use crate::error::{Result, TrainError};

/// Most pixels of a picture, as many as Pillow reads: more is a header that is spoiled, or a trap.
const MAX_PIXELS: u64 = 178_956_970;
/// Memory that a decoder may take, in bytes.
const DECODER_MEMORY: u64 = 1 << 30;
/// Largest encoded picture, in bytes.
pub const MAX_ENCODED: u64 = 1 << 28;

/// A picture as its file holds it.
#[derive(Debug)]
pub struct Decoded {
    /// The pixels: grey and transparency are kept, a palette's and CMYK's colours are RGB.
    pub image: DynamicImage,
    /// How a viewer would turn it, by EXIF; the pixels are not turned.
    pub orientation: Orientation,
}

/// Reads and decodes a file.
///
/// # Errors
/// [`TrainError::Io`]; what [`decode`] says.
pub fn read(path: &Path) -> Result<Decoded> {
    let failed = TrainError::io("read", path);
    let bytes = fs::metadata(path).and_then(|about| {
        if about.len() >= MAX_ENCODED {
            return Err(io::Error::other(format!("{} bytes are no picture", about.len())));
        }
        fs::read(path)
    });
    decode(path, &bytes.map_err(failed)?)
}

/// Decodes a PNG or a JPEG by its contents; `name` is for the error.
///
/// # Errors
/// [`TrainError::BadImage`]: bytes of neither, cut or damaged ones, a picture without pixels or with too many.
pub fn decode(name: &Path, bytes: &[u8]) -> Result<Decoded> {
    let decoded = match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => png(bytes),
        Ok(ImageFormat::Jpeg) => jpeg::decode(bytes),
        Ok(other) => Err(format!("it is {}, neither a PNG nor a JPEG: convert it", named(other))),
        Err(_) if bytes.is_empty() => Err("the file is empty".to_owned()),
        Err(_) => Err("it is neither a PNG nor a JPEG".to_owned()),
    };
    decoded.map_err(|reason| TrainError::BadImage { path: name.to_owned(), reason })
}

fn png(bytes: &[u8]) -> Result<Decoded, String> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), ImageFormat::Png);
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(DECODER_MEMORY);
    reader.limits(limits);
    let decode = || {
        let mut decoder = reader.into_decoder()?;
        let (width, height) = decoder.dimensions();
        if let Err(reason) = check_size(width, height) {
            return Ok(Err(reason));
        }
        let orientation = decoder.orientation()?;
        Ok(Ok(Decoded { image: DynamicImage::from_decoder(decoder)?, orientation }))
    };
    decode().map_err(|error: image::ImageError| error.to_string())?
}

/// Refuses pictures that are empty or huge, before memory is asked for.
pub(super) fn check_size(width: u32, height: u32) -> Result<(), String> {
    match u64::from(width) * u64::from(height) {
        0 => Err("it has no pixels".to_owned()),
        1..=MAX_PIXELS => Ok(()),
        _ => Err(format!("it says to be {width} by {height}; at most {MAX_PIXELS} pixels are read")),
    }
}

/// `a GIF`: a format's usual ending, as a word.
fn named(format: ImageFormat) -> String {
    let ending = format.extensions_str().first().copied().unwrap_or("picture");
    format!("of the format {}", ending.to_uppercase())
}
