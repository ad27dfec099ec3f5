//! Nested shares as SVG: the whole on top, below each part its own parts, as wide as they are long.

use std::fmt::Write as _;
use std::path::Path;

use runtime::file::write_atomically;

use super::plot::escaped;

const INK: &str = "#222226";
const FAINT_INK: &str = "#63636b";
/// Colours of the parts of the whole, in order; parts of parts are paler and darker in turn.
const COLOURS: [[&str; 2]; 5] = [
    ["#9dc3e3", "#b7d4ec"],
    ["#efb391", "#f5c9b0"],
    ["#c8cdd2", "#d8dce0"],
    ["#e3d08c", "#ece0b0"],
    ["#9fd3bf", "#b9e0d1"],
];
const WHOLE: &str = "#dfe3e8";
const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 16.0;
const TOP: f64 = 64.0;
const ROW: f64 = 26.0;
/// Mean width of a letter of the labels, as no font is at hand to ask.
const LETTER: f64 = 6.3;
/// Narrower parts are not drawn: they are part of what is above them.
const NARROWEST: f64 = 0.25;

/// Something that takes time, and what it is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Its name.
    pub label: String,
    /// Milliseconds, its parts included.
    pub ms: f64,
    /// Its parts in order.
    pub children: Vec<Frame>,
}

impl Frame {
    /// A frame without parts.
    pub fn new(label: impl Into<String>, ms: f64) -> Self {
        Self { label: label.into(), ms, children: Vec::new() }
    }

    /// Adds time to this frame and to the frames below it that `path` names; those that are not there are made.
    pub fn add<'a>(&mut self, path: impl IntoIterator<Item = &'a str>, ms: f64) {
        self.ms += ms;
        let mut at = self;
        for label in path {
            let found = at.children.iter().position(|c| c.label == label).unwrap_or_else(|| {
                at.children.push(Self::new(label, 0.0));
                at.children.len() - 1
            });
            at = &mut at.children[found];
            at.ms += ms;
        }
    }

    fn depth(&self) -> usize {
        1 + self.children.iter().map(Self::depth).max().unwrap_or(0)
    }

    /// The picture as an SVG document 1200 user units wide; each part tells its time and share when pointed at.
    pub fn svg(&self, title: &str, subtitle: &str) -> String {
        let height = TOP + ROW * self.depth() as f64 + MARGIN;
        let mut svg = String::new();
        // Writing to a `String` cannot fail.
        let _ = self.write(title, subtitle, height, &mut svg);
        svg
    }

    /// Replaces the file at `path` by the picture.
    ///
    /// # Errors
    /// The folder cannot be made or written, or the disk is full.
    pub fn save(&self, title: &str, subtitle: &str, path: &Path) -> anyhow::Result<()> {
        Ok(write_atomically(path, |out| out.write_all(self.svg(title, subtitle).as_bytes()))?)
    }

    fn write(&self, title: &str, subtitle: &str, height: f64, svg: &mut String) -> std::fmt::Result {
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="11.5" fill="{INK}">"#
        )?;
        writeln!(svg, r##"<rect width="100%" height="100%" fill="#ffffff"/>"##)?;
        let (title, subtitle) = (escaped(title), escaped(subtitle));
        writeln!(svg, r#"<text x="{MARGIN}" y="28" font-size="16" font-weight="600">{title}</text>"#)?;
        writeln!(svg, r#"<text x="{MARGIN}" y="48" font-size="12" fill="{FAINT_INK}">{subtitle}</text>"#)?;
        let scale = if self.ms > 0.0 { (WIDTH - 2.0 * MARGIN) / self.ms } else { 0.0 };
        let painter = Painter { scale, whole: self.ms };
        painter.write(self, MARGIN, 0, WHOLE, "", svg)?;
        let mut left = MARGIN;
        for (i, part) in self.children.iter().enumerate() {
            painter.below(part, left, 1, COLOURS[i.min(COLOURS.len() - 1)], 0, &part.label, svg)?;
            left += part.ms * scale;
        }
        writeln!(svg, "</svg>")
    }
}

struct Painter {
    scale: f64,
    whole: f64,
}

impl Painter {
    #[expect(clippy::too_many_arguments, reason = "where, how and what of a rectangle")]
    fn below(
        &self,
        frame: &Frame,
        left: f64,
        depth: usize,
        colours: [&str; 2],
        turn: usize,
        path: &str,
        svg: &mut String,
    ) -> std::fmt::Result {
        if frame.ms * self.scale < NARROWEST {
            return Ok(());
        }
        self.write(frame, left, depth, colours[turn % 2], path, svg)?;
        let mut at = left;
        for (i, part) in frame.children.iter().enumerate() {
            let path = format!("{path} › {}", part.label);
            self.below(part, at, depth + 1, colours, i, &path, svg)?;
            at += part.ms * self.scale;
        }
        Ok(())
    }

    fn write(
        &self,
        frame: &Frame,
        left: f64,
        depth: usize,
        colour: &str,
        path: &str,
        svg: &mut String,
    ) -> std::fmt::Result {
        let (width, top) = (frame.ms * self.scale, TOP + ROW * depth as f64);
        let share = 100.0 * frame.ms / self.whole.max(f64::MIN_POSITIVE);
        let name = escaped(if path.is_empty() { &frame.label } else { path });
        write!(
            svg,
            r##"<g><title>{name}: {} ms, {share:.1} %</title><rect x="{left:.2}" y="{top}" width="{width:.2}" height="{ROW}" fill="{colour}" stroke="#ffffff" stroke-width="{:.2}"/>"##,
            short(frame.ms),
            (width / 8.0).min(1.0)
        )?;
        if let Some(words) = fitting(&frame.label, frame.ms, width - 8.0) {
            let (x, y) = (left + 4.0, top + ROW * 0.66);
            write!(svg, r#"<text x="{x:.2}" y="{y:.1}">{}</text>"#, escaped(&words))?;
        }
        writeln!(svg, "</g>")
    }
}

/// As much of a label as there is room for: with its time, alone, cut short, or none.
fn fitting(label: &str, ms: f64, width: f64) -> Option<String> {
    let room = (width / LETTER).floor().max(0.0) as usize;
    let long = format!("{label}  {} ms", short(ms));
    let letters = label.chars().count();
    if long.chars().count() <= room {
        return Some(long);
    }
    if letters <= room {
        return Some(label.to_owned());
    }
    (room >= 3).then(|| label.chars().take(room - 1).chain(['…']).collect())
}

/// Three figures.
fn short(ms: f64) -> String {
    match ms {
        m if m >= 100.0 => format!("{m:.0}"),
        m if m >= 10.0 => format!("{m:.1}"),
        m if m >= 1.0 => format!("{m:.2}"),
        m => format!("{m:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        let mut root = Frame::new("train-step", 0.0);
        root.add(["forward", "blocks.0", "a<b"], 30.0);
        root.add(["backward", "blocks.0", "MatMul"], 60.0);
        root.add(["forward", "blocks.1"], 10.0);
        root.add(["backward", "tiny"], 0.001);
        root
    }

    #[test]
    fn parts_add_up() {
        let root = frame();
        assert_eq!(root.ms, 100.001);
        assert_eq!(root.children[0].ms, 40.0);
        assert_eq!(root.children[0].children.iter().map(|c| c.ms).sum::<f64>(), 40.0);
        assert_eq!(root.depth(), 4);
    }

    #[test]
    fn widths_are_shares_and_names_are_escaped() {
        let svg = frame().svg("A & B", "sub");
        assert!(
            svg.contains("A &amp; B") && svg.contains("forward › blocks.0 › a&lt;b: 30.0 ms, 30.0 %"),
            "{svg}"
        );
        assert!(!svg.contains("a<b") && !svg.contains("tiny"), "too narrow to be seen");
        let widths: Vec<f64> = svg
            .split("width=\"")
            .skip(3)
            .filter_map(|rest| rest.split('"').next()?.parse().ok())
            .filter(|w| *w > 1.0)
            .collect();
        let whole = WIDTH - 2.0 * MARGIN;
        assert!((widths[0] - whole).abs() < 0.01, "{widths:?}");
        assert!(widths.iter().any(|w| (w - 0.4 * whole).abs() < 0.1), "{widths:?}");
        assert_eq!(svg.matches("<g>").count(), svg.matches("</g>").count());
        assert_eq!(svg.matches("<title>").count(), 8, "all but the tiny one");
    }

    #[test]
    fn labels_are_cut_to_their_room() {
        assert_eq!(fitting("blocks.0", 12.34, 200.0).unwrap(), "blocks.0  12.3 ms");
        assert_eq!(fitting("blocks.0", 12.34, 60.0).unwrap(), "blocks.0");
        assert_eq!(fitting("blocks.0", 12.34, 30.0).unwrap(), "blo…");
        assert_eq!(fitting("blocks.0", 12.34, 10.0), None);
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let svg = Frame::new("empty", 0.0).svg("t", "s");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
