//! Words on an RGB picture, in the built-in bitmap fonts.

use std::convert::Infallible;

use embedded_graphics::mono_font::iso_8859_1::{FONT_6X10, FONT_7X13, FONT_7X13_BOLD, FONT_10X20};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::{DrawTarget, Drawable, OriginDimensions, Pixel, Point, RgbColor, Size};
use embedded_graphics::text::{Alignment, Baseline, Text, TextStyleBuilder};
use image::{Rgb, RgbImage};

/// A fixed-width font; its sizes are in pixels.
#[derive(Clone, Copy)]
pub(super) struct Face(&'static MonoFont<'static>);

/// Small print.
pub(super) const SMALL: Face = Face(&FONT_6X10);
/// Labels over cells of ordinary size.
pub(super) const PLAIN: Face = Face(&FONT_7X13);
/// Titles.
pub(super) const BOLD: Face = Face(&FONT_7X13_BOLD);
/// Labels over large cells.
pub(super) const LARGE: Face = Face(&FONT_10X20);

impl Face {
    pub(super) fn line_height(self) -> u32 {
        self.0.character_size.height
    }

    /// How many characters fit into `width` pixels, at least one.
    pub(super) fn characters_in(self, width: u32) -> usize {
        (width / self.0.character_size.width).max(1) as usize
    }
}

/// `text` in at most `lines` lines of at most `width` characters, broken at spaces and after `/ , - _`; what does
/// not fit is cut and ends in `..`.
pub(super) fn wrap(text: &str, width: usize, lines: usize) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut pieces: Vec<&str> = text.split_inclusive([' ', '/', ',', '-', '_']).collect();
    pieces.reverse();
    let mut line = String::new();
    while let Some(piece) = pieces.pop() {
        if length(line.trim_end()) + length(piece.trim_end()) + (line.ends_with(' ') as usize) <= width
            || line.trim().is_empty()
        {
            line.push_str(piece);
            continue;
        }
        if out.len() + 1 == lines {
            line.push_str(piece);
            line.extend(pieces.iter().rev().copied());
            break;
        }
        out.push(std::mem::take(&mut line).trim().to_owned());
        line.push_str(piece);
    }
    if !line.trim().is_empty() {
        out.push(line.trim().to_owned());
    }
    for line in &mut out {
        if length(line) > width {
            let kept: String = line.chars().take(width.saturating_sub(2)).collect();
            *line = format!("{}..", kept.trim_end());
        }
    }
    out
}

fn length(text: &str) -> usize {
    text.chars().count()
}

/// Writes one line; `x` is its left edge, or its middle when `centred`; `y` is its top.
pub(super) fn write(
    picture: &mut RgbImage,
    face: Face,
    colour: Rgb<u8>,
    (x, y): (u32, u32),
    centred: bool,
    text: &str,
) {
    let Rgb([r, g, b]) = colour;
    let style = MonoTextStyle::new(face.0, Rgb888::new(r, g, b));
    let place = TextStyleBuilder::new()
        .alignment(if centred { Alignment::Center } else { Alignment::Left })
        .baseline(Baseline::Top)
        .build();
    let at = Point::new(x as i32, y as i32);
    // The canvas cannot fail.
    let Ok(_) = Text::with_text_style(text, at, style, place).draw(&mut Canvas(picture));
}

struct Canvas<'a>(&'a mut RgbImage);

impl OriginDimensions for Canvas<'_> {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas<'_> {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y)) else { continue };
            if let Some(pixel) = self.0.get_pixel_mut_checked(x, y) {
                *pixel = Rgb([colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_wrap_at_borders_of_words_and_are_cut_at_the_end() {
        let table: [(&str, usize, &[&str]); 8] = [
            ("Bag", 12, &["Bag"]),
            ("T-shirt/top", 12, &["T-shirt/top"]),
            ("T-shirt/top", 8, &["T-shirt/", "top"]),
            ("great white shark", 12, &["great white", "shark"]),
            ("great white shark, man-eater, man-eating shark", 12, &["great white", "shark, man.."]),
            ("Antidisestablishment", 8, &["Antidi.."]),
            ("", 8, &[]),
            ("éclair au café", 6, &["éclair", "au c.."]),
        ];
        for (text, width, expected) in table {
            let lines = wrap(text, width, 2);
            assert_eq!(lines, expected, "{text}");
            assert!(lines.iter().all(|l| length(l) <= width), "{lines:?}");
        }
    }

    #[test]
    fn letters_that_leave_the_picture_are_clipped() {
        let mut picture = RgbImage::from_pixel(20, 10, Rgb([255; 3]));
        write(&mut picture, PLAIN, Rgb([0; 3]), (10, 2), true, "a long line");
        let dark = picture.pixels().filter(|p| p.0 == [0; 3]).count();
        assert!(dark > 10, "{dark}");
    }
}
