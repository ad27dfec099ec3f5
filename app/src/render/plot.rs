//! Line plots as SVG: several series, raw and smoothed, linear or logarithmic.

use std::fmt::Write as _;
use std::path::Path;

use runtime::file::write_atomically;

use super::axis::Axis;

/// Colours that stay apart for colour-blind readers and on a printed page, in the order of use.
const COLOURS: [&str; 6] = ["#1f6fb2", "#d1592b", "#2a9370", "#a3578f", "#b98a00", "#5b6b7a"];
const INK: &str = "#222226";
const FAINT_INK: &str = "#63636b";
const RULE: &str = "#e4e4e0";

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 68.0;
const RIGHT: f64 = 24.0;
const BOTTOM: f64 = 54.0;
/// The share of the worst raw points at either end that may leave the picture, so that one spike does not flatten all.
const SPIKES: f64 = 0.005;

/// A plot of lines over a common axis; build it, then [`LinePlot::svg`] or [`LinePlot::save`].
#[derive(Clone, Debug)]
pub struct LinePlot {
    title: String,
    subtitle: String,
    x_label: String,
    y_label: String,
    log_y: bool,
    series: Vec<Series>,
}

#[derive(Clone, Debug)]
struct Series {
    label: String,
    line: Vec<(f64, f64)>,
    raw: Vec<(f64, f64)>,
}

impl LinePlot {
    /// A plot without lines. The labels name the quantity and its unit.
    pub fn new(title: impl Into<String>, x_label: impl Into<String>, y_label: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            subtitle: String::new(),
            x_label: x_label.into(),
            y_label: y_label.into(),
            log_y: false,
            series: Vec::new(),
        }
    }

    /// Small print under the title.
    #[must_use]
    pub fn subtitle(mut self, text: impl Into<String>) -> Self {
        self.subtitle = text.into();
        self
    }

    /// Makes the vertical axis logarithmic; values that are not positive are then left out.
    #[must_use]
    pub fn log_y(mut self) -> Self {
        self.log_y = true;
        self
    }

    /// Adds a line through `points` in their order. A point that is not finite makes a gap.
    #[must_use]
    pub fn line(mut self, label: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.series.push(Series { label: label.into(), line: points, raw: Vec::new() });
        self
    }

    /// Adds noisy `points` as a pale line and over it their mean, see [`smooth`].
    #[must_use]
    pub fn smoothed(mut self, label: impl Into<String>, points: Vec<(f64, f64)>, half_life: f64) -> Self {
        self.series.push(Series { label: label.into(), line: smooth(&points, half_life), raw: points });
        self
    }

    /// The picture as an SVG document of 860 × 460 user units, white behind.
    pub fn svg(&self) -> String {
        let (x, y) = self.axes();
        let top = 24.0
            + if self.title.is_empty() { 0.0 } else { 22.0 }
            + if self.subtitle.is_empty() { 0.0 } else { 18.0 }
            + if self.series.is_empty() { 0.0 } else { 24.0 };
        let frame = Frame { x, y, top };
        let mut svg = String::new();
        // Writing to a `String` cannot fail.
        let _ = self.write_svg(&frame, &mut svg);
        svg
    }

    /// Replaces the file at `path` by the picture.
    ///
    /// # Errors
    /// The folder cannot be made or written, or the disk is full.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        Ok(write_atomically(path, |out| out.write_all(self.svg().as_bytes()))?)
    }

    fn write_svg(&self, frame: &Frame, svg: &mut String) -> std::fmt::Result {
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="12" fill="{FAINT_INK}">"#
        )?;
        writeln!(svg, r##"<rect width="100%" height="100%" fill="#ffffff"/>"##)?;
        self.write_heading(frame, svg)?;
        self.write_axes(frame, svg)?;
        let (left, top, width, height) = (LEFT, frame.top, WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - frame.top);
        writeln!(
            svg,
            r#"<clipPath id="inside"><rect x="{left}" y="{top}" width="{width}" height="{height}"/></clipPath>"#
        )?;
        writeln!(
            svg,
            r#"<g clip-path="url(#inside)" fill="none" stroke-linejoin="round" stroke-linecap="round">"#
        )?;
        // All pale lines first, so that none lies over a clear one.
        for (series, colour) in self.coloured() {
            frame.write_line(&series.raw, colour, r#"stroke-width="1" stroke-opacity="0.28""#, svg)?;
        }
        for (series, colour) in self.coloured() {
            frame.write_line(&series.line, colour, r#"stroke-width="2""#, svg)?;
        }
        writeln!(svg, "</g>\n</svg>")
    }

    fn write_heading(&self, frame: &Frame, svg: &mut String) -> std::fmt::Result {
        let mut y = 16.0;
        if !self.title.is_empty() {
            y += 16.0;
            let title = escaped(&self.title);
            writeln!(
                svg,
                r#"<text x="{LEFT}" y="{y}" font-size="16" font-weight="600" fill="{INK}">{title}</text>"#
            )?;
        }
        if !self.subtitle.is_empty() {
            y += 20.0;
            writeln!(svg, r#"<text x="{LEFT}" y="{y}">{}</text>"#, escaped(&self.subtitle))?;
        }
        let y = frame.top - 16.0;
        let mut x = LEFT;
        for (series, colour) in self.coloured() {
            let (end, words, middle) = (x + 18.0, x + 24.0, y - 4.0);
            writeln!(
                svg,
                r#"<path d="M{x:.1} {middle}H{end:.1}" stroke="{colour}" stroke-width="3"/><text x="{words:.1}" y="{y}" fill="{INK}">{}</text>"#,
                escaped(&series.label)
            )?;
            // The mean width of a letter of this size, as no font is at hand to ask.
            x = words + 6.6 * series.label.chars().count() as f64 + 22.0;
        }
        Ok(())
    }

    fn write_axes(&self, frame: &Frame, svg: &mut String) -> std::fmt::Result {
        let (right, base) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for (value, words) in frame.y.marks(6) {
            let Some(y) = frame.down(value) else { continue };
            let (text_x, text_y) = (LEFT - 8.0, y + 4.0);
            writeln!(
                svg,
                r#"<path d="M{LEFT} {y:.1}H{right}" stroke="{RULE}"/><text x="{text_x}" y="{text_y:.1}" text-anchor="end">{words}</text>"#
            )?;
        }
        for (value, words) in frame.x.marks(8) {
            let Some(x) = frame.across(value) else { continue };
            let text_y = base + 20.0;
            writeln!(
                svg,
                r##"<path d="M{x:.1} {base}v5" stroke="#9a9aa0"/><text x="{x:.1}" y="{text_y}" text-anchor="middle">{words}</text>"##
            )?;
        }
        writeln!(svg, r##"<path d="M{LEFT} {base}H{right}" stroke="#9a9aa0"/>"##)?;
        let (middle, foot) = (f64::midpoint(LEFT, right), HEIGHT - 12.0);
        let (x_label, y_label) = (escaped(&self.x_label), escaped(&self.y_label));
        writeln!(svg, r#"<text x="{middle}" y="{foot}" text-anchor="middle">{x_label}</text>"#)?;
        let middle = f64::midpoint(frame.top, base);
        writeln!(
            svg,
            r#"<text transform="translate(18 {middle:.1}) rotate(-90)" text-anchor="middle">{y_label}</text>"#
        )
    }

    fn coloured(&self) -> impl Iterator<Item = (&Series, &'static str)> {
        self.series.iter().zip(COLOURS.into_iter().cycle())
    }

    fn axes(&self) -> (Axis, Axis) {
        let drawable = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && !(self.log_y && y <= 0.0);
        let lines = || self.series.iter().flat_map(|s| &s.line).copied().filter(drawable);
        let raws = || self.series.iter().flat_map(|s| &s.raw).copied().filter(drawable);
        let (x_low, x_high) = ends(lines().chain(raws()).map(|p| p.0)).unwrap_or((0.0, 1.0));
        let mut heights: Vec<f64> = raws().map(|p| p.1).collect();
        heights.sort_by(f64::total_cmp);
        let spikes = (heights.len() as f64 * SPIKES) as usize;
        let calm = heights.get(spikes..heights.len() - spikes).unwrap_or_default();
        let shown = lines().map(|p| p.1).chain(calm.iter().copied());
        let (low, high) = ends(shown).unwrap_or((0.0, 1.0));
        (Axis::new(x_low, x_high, false), Axis::new(low, high, self.log_y).padded(0.04))
    }
}

/// The mean around each point, over points before and after it, with weights that halve in `half_life` points: no
/// lag. A value that is not finite stays and does not enter any mean.
pub fn smooth(points: &[(f64, f64)], half_life: f64) -> Vec<(f64, f64)> {
    let keep = 0.5f64.powf(1.0 / half_life.max(1e-3));
    let before = running(points.iter(), keep);
    let after = running(points.iter().rev(), keep);
    let both = before.into_iter().zip(after.into_iter().rev());
    let mean = |(&(x, y), (before, after)): (&(f64, f64), (Side, Side))| {
        // The point itself is in both sums.
        let mean = (before.sum + after.sum - y) / (before.weight + after.weight - 1.0);
        (x, if y.is_finite() { mean } else { y })
    };
    points.iter().zip(both).map(mean).collect()
}

/// Values of one side of a point, itself included.
#[derive(Clone, Copy, Default)]
struct Side {
    sum: f64,
    weight: f64,
}

/// Sum of the values up to each point, and of their weights, where each is worth `keep` of the next.
fn running<'a>(points: impl Iterator<Item = &'a (f64, f64)>, keep: f64) -> Vec<Side> {
    let add = |side: &mut Side, &(_, y): &(f64, f64)| {
        let (value, worth) = if y.is_finite() { (y, 1.0) } else { (0.0, 0.0) };
        *side = Side { sum: keep * side.sum + value, weight: keep * side.weight + worth };
        Some(*side)
    };
    points.scan(Side::default(), add).collect()
}

struct Frame {
    x: Axis,
    y: Axis,
    top: f64,
}

impl Frame {
    fn across(&self, x: f64) -> Option<f64> {
        Some(LEFT + self.x.place(x)? * (WIDTH - LEFT - RIGHT))
    }

    fn down(&self, y: f64) -> Option<f64> {
        Some(HEIGHT - BOTTOM - self.y.place(y)? * (HEIGHT - BOTTOM - self.top))
    }

    fn write_line(
        &self,
        points: &[(f64, f64)],
        colour: &str,
        style: &str,
        svg: &mut String,
    ) -> std::fmt::Result {
        let mut path = String::new();
        for run in self.runs(points) {
            for (k, (x, y)) in thinned(&run).into_iter().enumerate() {
                write!(path, "{}{x:.1} {y:.1}", if k == 0 { 'M' } else { 'L' })?;
            }
            if let [(x, y)] = run[..] {
                write!(path, "L{x:.1} {y:.1}")?; // a lone point: a dot, by the round ends
            }
        }
        if path.is_empty() {
            return Ok(());
        }
        writeln!(svg, r#"<path d="{path}" stroke="{colour}" {style}/>"#)
    }

    /// The points in user units, cut where one has no place. Far points are brought near, so that numbers stay short.
    fn runs(&self, points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
        let mut runs = vec![Vec::new()];
        for &(x, y) in points {
            match (self.across(x), self.down(y)) {
                (Some(x), Some(y)) => {
                    if let Some(run) = runs.last_mut() {
                        run.push((x, y.clamp(-HEIGHT, 2.0 * HEIGHT)));
                    }
                }
                _ => runs.push(Vec::new()),
            }
        }
        runs.retain(|run| !run.is_empty());
        runs
    }
}

/// Of the points that fall into one half of a unit, only the first, the lowest, the highest and the last are seen.
fn thinned(run: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let same = |a: &(f64, f64), b: &(f64, f64)| (a.0 * 2.0).floor() == (b.0 * 2.0).floor();
    let mut out = Vec::new();
    for column in run.chunk_by(same) {
        if column.len() <= 4 {
            out.extend_from_slice(column);
            continue;
        }
        let by_height = |a: &(usize, f64), b: &(usize, f64)| a.1.total_cmp(&b.1);
        let heights = || column.iter().map(|p| p.1).enumerate();
        let extremes = [heights().min_by(by_height), heights().max_by(by_height)];
        let mut kept: Vec<usize> = extremes.into_iter().flatten().map(|(k, _)| k).collect();
        kept.extend([0, column.len() - 1]);
        kept.sort_unstable();
        kept.dedup();
        out.extend(kept.into_iter().map(|k| column[k]));
    }
    out
}

fn ends(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |ends, v| {
        let (low, high) = ends.unwrap_or((v, v));
        Some((low.min(v), high.max(v)))
    })
}

pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
#[path = "plot_tests.rs"]
mod tests;
