//! A labelled grid of images as one picture: columns with names, whole-number enlargement, light background.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, ensure};
use image::{ImageFormat, Rgb, RgbImage};
use runtime::file::write_atomically;

use super::lettering::{BOLD, Face, LARGE, PLAIN, SMALL, wrap, write};
use super::pixels::{byte, check};

const BACKGROUND: Rgb<u8> = Rgb([247, 247, 244]);
const FRAME: Rgb<u8> = Rgb([214, 214, 208]);
const INK: Rgb<u8> = Rgb([34, 34, 38]);
const FAINT_INK: Rgb<u8> = Rgb([110, 110, 116]);
/// Drawn where a value is NaN, so that it cannot be taken for a picture.
const NOT_A_NUMBER: Rgb<u8> = Rgb([255, 0, 255]);

/// Small images are enlarged by the whole number that brings them nearest to so many pixels.
const CELL_TARGET: usize = 84;
const MARGIN: u32 = 16;
const GAP: u32 = 6;
const LABEL_LINES: usize = 2;
/// Latents are shown from the mean minus to the mean plus so many standard deviations.
const LATENT_REACH: f64 = 2.5;

/// One column: its name and which images of the batch stand in it, from the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Name over the column; wrapped to two lines, then cut.
    pub label: String,
    /// Indices into the batch.
    pub images: Vec<usize>,
}

impl Column {
    /// Columns for a batch laid out row by row: image `i` stands in column `i % names.len()`.
    pub fn row_major<S: AsRef<str>>(names: &[S], images: usize) -> Vec<Self> {
        let step = names.len().max(1);
        let column = |(k, name): (usize, &S)| Self {
            label: name.as_ref().to_owned(),
            images: (k..images).step_by(step).collect(),
        };
        names.iter().enumerate().map(column).collect()
    }

    /// One column a class that occurs in `labels`, in the order of the classes, each with its first `rows` images.
    /// A class without a name is shown by its number.
    pub fn by_class<S: AsRef<str>>(labels: &[i64], names: &[S], rows: usize) -> Vec<Self> {
        let mut classes: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        for (image, &class) in labels.iter().enumerate() {
            let images = classes.entry(class).or_default();
            if images.len() < rows {
                images.push(image);
            }
        }
        let name = |class: i64| usize::try_from(class).ok().and_then(|k| names.get(k));
        classes
            .into_iter()
            .map(|(class, images)| Self {
                label: name(class).map_or_else(|| class.to_string(), |n| n.as_ref().to_owned()),
                images,
            })
            .collect()
    }
}

/// The words around a grid.
#[derive(Clone, Debug, Default)]
pub struct Caption {
    /// One line at the top.
    pub title: Option<String>,
    /// One line of small print at the bottom.
    pub note: Option<String>,
}

/// Draws the chosen images of a batch as labelled columns.
///
/// One channel is grey, three are RGB, both from `[-1, 1]` by [`byte`]. Any other number of channels is taken for
/// latents: the first three (or the first one, when there are two) are shown as RGB (or grey), each stretched from
/// 2.5 standard deviations under to 2.5 over its own mean over the batch, and a line under the grid says so. Images
/// smaller than 84 pixels are enlarged by a whole number without smoothing; NaN is magenta.
///
/// # Shapes
/// - `values`: `shape` = `[N, C, H, W]`
///
/// # Errors
/// A size in `shape` is 0, `values` does not have that many elements, there is no column or no image in any, or a
/// column names an image that is not in the batch.
pub fn grid(
    values: &[f32],
    shape: [usize; 4],
    columns: &[Column],
    caption: &Caption,
) -> anyhow::Result<RgbImage> {
    check(values, shape)?;
    let [n, channels, height, width] = shape;
    ensure!(!shape.contains(&0), "images of shape {shape:?} (N, C, H, W) cannot be drawn: a size is 0");
    let rows = columns.iter().map(|c| c.images.len()).max().unwrap_or(0);
    ensure!(rows > 0, "a grid needs a column with at least one image, got {} columns", columns.len());
    for column in columns {
        if let Some(image) = column.images.iter().find(|&&i| i >= n) {
            anyhow::bail!("column `{}` asks for image {image}, the batch has {n}", column.label);
        }
    }

    let tones = Tones::of(values, shape);
    let scale = ((CELL_TARGET + width.max(height) / 2) / width.max(height)).max(1) as u32;
    let cell = (width as u32 * scale + 2, height as u32 * scale + 2); // with its frame of one pixel
    let pitch = (cell.0 + GAP, cell.1 + GAP);

    let face = face_for(cell.0);
    let per_line = face.characters_in(cell.0 + GAP - 2);
    let labels: Vec<Vec<String>> = columns.iter().map(|c| wrap(&c.label, per_line, LABEL_LINES)).collect();
    let label_lines = labels.iter().map(Vec::len).max().unwrap_or(0) as u32;

    let across = columns.len() as u32 * pitch.0 - GAP;
    let inner = across.max(MIN_WIDTH);
    let left = MARGIN + (inner - across) / 2;
    let heading = if cell.0 < LARGE_CELL { BOLD } else { LARGE };
    let title =
        caption.title.as_deref().map(|t| wrap(t, heading.characters_in(inner), 2)).unwrap_or_default();
    let notes: Vec<String> = caption
        .note
        .iter()
        .map(String::as_str)
        .chain(tones.note())
        .flat_map(|t| wrap(t, SMALL.characters_in(inner), 2))
        .collect();

    let title_height = block_height(title.len(), heading);
    let top = MARGIN + title_height + label_lines * face.line_height() + 4;
    let foot = top + rows as u32 * pitch.1 - GAP;
    let total =
        foot + if notes.is_empty() { 0 } else { 8 + notes.len() as u32 * (SMALL.line_height() + 2) } + MARGIN;
    let mut picture = RgbImage::from_pixel(inner + 2 * MARGIN, total, BACKGROUND);

    for (line, text) in (0u32..).zip(&title) {
        let y = MARGIN + line * (heading.line_height() + 2);
        write(&mut picture, heading, INK, (MARGIN, y), false, text);
    }
    for (k, (column, label)) in (0u32..).zip(columns.iter().zip(&labels)) {
        let x = left + k * pitch.0;
        // Short labels stand on the last line, next to their pictures.
        let first = MARGIN + title_height + (label_lines - label.len() as u32) * face.line_height();
        for (line, text) in (0u32..).zip(label) {
            write(&mut picture, face, INK, (x + cell.0 / 2, first + line * face.line_height()), true, text);
        }
        for (row, &image) in (0u32..).zip(&column.images) {
            let size = channels * height * width;
            let pixels = &values[image * size..(image + 1) * size];
            paint(&mut picture, (x, top + row * pitch.1), cell, scale, |px, py| {
                tones.colour(pixels, height * width, py as usize * width + px as usize)
            });
        }
    }
    for (line, text) in (0u32..).zip(&notes) {
        write(
            &mut picture,
            SMALL,
            FAINT_INK,
            (MARGIN, foot + 8 + line * (SMALL.line_height() + 2)),
            false,
            text,
        );
    }
    Ok(picture)
}

/// Encodes `picture` as PNG and replaces the file at `path` by it.
///
/// # Errors
/// The folder cannot be made or written, or the disk is full.
pub fn save_png(picture: &RgbImage, path: &Path) -> anyhow::Result<()> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, ImageFormat::Png)
        .with_context(|| format!("cannot encode {}", path.display()))?;
    Ok(write_atomically(path, |out| out.write_all(bytes.get_ref()))?)
}

/// From so many pixels on a cell has large letters.
const LARGE_CELL: u32 = 160;
/// A picture of one column is still wide enough for a title.
const MIN_WIDTH: u32 = 168;

fn face_for(cell: u32) -> Face {
    match cell {
        0..60 => SMALL,
        60..LARGE_CELL => PLAIN,
        _ => LARGE,
    }
}

fn block_height(lines: usize, face: Face) -> u32 {
    if lines == 0 { 0 } else { lines as u32 * (face.line_height() + 2) + 10 }
}

/// One framed cell, its upper left corner at `(x, y)`.
fn paint(
    picture: &mut RgbImage,
    (x, y): (u32, u32),
    (width, height): (u32, u32),
    scale: u32,
    colour: impl Fn(u32, u32) -> Rgb<u8>,
) {
    for dy in 0..height {
        for dx in 0..width {
            let edge = dx == 0 || dy == 0 || dx + 1 == width || dy + 1 == height;
            let tone = if edge { FRAME } else { colour((dx - 1) / scale, (dy - 1) / scale) };
            picture.put_pixel(x + dx, y + dy, tone);
        }
    }
}

/// How the channels of a batch become colours: `channel`, and per channel `factor·x + offset` into `[-1, 1]`.
struct Tones {
    shown: Vec<Tone>,
    latent: Option<String>,
}

struct Tone {
    channel: usize,
    factor: f32,
    offset: f32,
}

impl Tones {
    fn of(values: &[f32], shape @ [_, channels, ..]: [usize; 4]) -> Self {
        let latent = !matches!(channels, 1 | 3);
        let count = if channels < 3 { 1 } else { 3 };
        let tone = |channel| {
            let (factor, offset) = if latent { stretch(values, shape, channel) } else { (1.0, 0.0) };
            Tone { channel, factor, offset }
        };
        let text = match count {
            1 => format!("channel 0 of {channels} as grey, stretched from its mean -2.5 sd to +2.5 sd"),
            _ => format!(
                "channels 0-2 of {channels} latent channels as RGB, each from its mean -2.5 sd to +2.5 sd"
            ),
        };
        Self { shown: (0..count).map(tone).collect(), latent: latent.then_some(text) }
    }

    fn note(&self) -> Option<&str> {
        self.latent.as_deref()
    }

    fn colour(&self, image: &[f32], plane: usize, pixel: usize) -> Rgb<u8> {
        let value = |tone: &Tone| image[tone.channel * plane + pixel] * tone.factor + tone.offset;
        let shown: Vec<f32> = self.shown.iter().map(value).collect();
        match shown[..] {
            _ if shown.iter().any(|x| x.is_nan()) => NOT_A_NUMBER,
            [r, g, b] => Rgb([byte(r), byte(g), byte(b)]),
            _ => Rgb([byte(shown[0]); 3]),
        }
    }
}

/// The affine map that takes one channel's mean ∓ 2.5 standard deviations to ∓1; values that are not finite are
/// left out.
fn stretch(values: &[f32], [_, channels, height, width]: [usize; 4], channel: usize) -> (f32, f32) {
    let plane = height * width;
    let finite = || {
        let planes = values.chunks_exact(plane).skip(channel).step_by(channels);
        planes.flatten().filter(|x| x.is_finite()).map(|&x| f64::from(x))
    };
    let count = finite().count().max(1) as f64;
    let mean = finite().sum::<f64>() / count;
    let deviation = (finite().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt();
    let factor = 1.0 / (LATENT_REACH * deviation).max(1e-12);
    (factor as f32, (-mean * factor) as f32)
}

#[cfg(test)]
#[path = "grid_tests.rs"]
mod tests;
