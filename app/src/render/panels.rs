//! Small line plots side by side as one SVG: a panel a subject, a colour a series, marks at chosen points.

use std::fmt::Write as _;
use std::path::Path;

use runtime::file::write_atomically;

use super::axis::decimal;
use super::plot::{FAINT_INK, INK, RULE, escaped};

const WIDTH: f64 = 250.0;
const HEIGHT: f64 = 190.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 34.0;
const HEAD: f64 = 78.0;
const ALARM: &str = "#c0272d";

/// How positions on an axis go with the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Equal lengths are equal differences.
    Linear,
    /// Equal lengths are equal ratios; marks are powers of two.
    Log2,
}

/// One line of a panel.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its number in the legend.
    pub series: usize,
    /// Points in order; what has no place on the axes makes a gap.
    pub points: Vec<(f64, f64)>,
    /// Half the height of a bar at each point; may be empty.
    pub spread: Vec<f64>,
    /// A point that is marked with a ring.
    pub marked: Option<usize>,
    /// Whether a line goes through the points.
    pub joined: bool,
}

/// One plot of the picture.
#[derive(Clone, Debug, Default)]
pub struct Panel {
    /// What it shows.
    pub title: String,
    /// Its lines.
    pub lines: Vec<Line>,
    /// Whether the title is in the colour of an alarm.
    pub alarm: bool,
}

/// The picture.
#[derive(Clone, Debug)]
pub struct Panels {
    /// Headline.
    pub title: String,
    /// Small print below it.
    pub subtitle: String,
    /// Name of the horizontal quantity.
    pub x_label: String,
    /// Name of the vertical quantity.
    pub y_label: String,
    /// Horizontal scale.
    pub x: Scale,
    /// Vertical scale.
    pub y: Scale,
    /// Whether all panels show the same vertical range.
    pub common_y: bool,
    /// Names of the series.
    pub legend: Vec<String>,
    /// Plots beside each other.
    pub columns: usize,
    /// How much larger than the smallest readable each plot is.
    pub zoom: f64,
    /// The plots, row by row.
    pub panels: Vec<Panel>,
}

/// The numbers that a panel shows.
#[derive(Clone, Copy)]
struct Range {
    low: f64,
    high: f64,
}

impl Panels {
    /// Replaces the file at `path` by the picture.
    ///
    /// # Errors
    /// The folder cannot be made or written, or the disk is full.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        Ok(write_atomically(path, |out| out.write_all(self.svg().as_bytes()))?)
    }

    /// The picture as an SVG document.
    pub fn svg(&self) -> String {
        let mut svg = String::new();
        // Writing to a `String` cannot fail.
        let _ = self.write(&mut svg);
        svg
    }

    fn write(&self, svg: &mut String) -> std::fmt::Result {
        let columns = self.columns.clamp(1, self.panels.len().max(1));
        let rows = self.panels.len().div_ceil(columns);
        let (w, h) = (WIDTH * self.zoom, HEIGHT * self.zoom);
        let (width, height) = ((columns as f64 * w).max(520.0), HEAD + rows as f64 * h + 6.0);
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="11" fill="{FAINT_INK}">"#
        )?;
        writeln!(svg, r##"<rect width="100%" height="100%" fill="#ffffff"/>"##)?;
        let (title, subtitle) = (escaped(&self.title), escaped(&self.subtitle));
        writeln!(svg, r#"<text x="12" y="24" font-size="16" font-weight="600" fill="{INK}">{title}</text>"#)?;
        writeln!(svg, r#"<text x="12" y="42">{subtitle}</text>"#)?;
        let mut x = 12.0;
        for (i, name) in self.legend.iter().enumerate() {
            let (end, words, colour) = (x + 16.0, x + 21.0, self.colour(i));
            let name = escaped(name);
            writeln!(
                svg,
                r#"<path d="M{x:.1} 60H{end:.1}" stroke="{colour}" stroke-width="3"/><text x="{words:.1}" y="64" fill="{INK}">{name}</text>"#
            )?;
            x = words + 6.2 * name.chars().count() as f64 + 16.0;
        }
        let common = self.common_y.then(|| range(self.panels.iter().flat_map(|p| &p.lines), self.y));
        for (i, panel) in self.panels.iter().enumerate() {
            let (left, top) = ((i % columns) as f64 * w, HEAD + (i / columns) as f64 * h);
            self.panel(panel, common.flatten(), [left, top, w, h], svg)?;
        }
        writeln!(svg, "</svg>")
    }

    fn panel(
        &self,
        panel: &Panel,
        common: Option<Range>,
        [left, top, w, h]: [f64; 4],
        svg: &mut String,
    ) -> std::fmt::Result {
        let xs = ends(panel.lines.iter().flat_map(|l| &l.points).map(|p| placed(p.0, self.x)), 0.04);
        let ys = common.or_else(|| range(&panel.lines, self.y));
        let (Some(xs), Some(ys)) = (xs, ys) else { return Ok(()) };
        let (x0, x1, y0, y1) = (left + LEFT, left + w - RIGHT, top + h - BOTTOM, top + TOP);
        let across = |x: f64| x0 + (placed(x, self.x) - xs.low) / (xs.high - xs.low) * (x1 - x0);
        let down = |y: f64| y0 - (placed(y, self.y) - ys.low) / (ys.high - ys.low) * (y0 - y1);
        let (ink, title) = (if panel.alarm { ALARM } else { INK }, escaped(&panel.title));
        writeln!(
            svg,
            r#"<text x="{x0:.1}" y="{:.1}" font-weight="600" fill="{ink}">{title}</text>"#,
            y1 - 8.0
        )?;
        for (at, words) in marks(ys, self.y, 5) {
            let y = down(at);
            writeln!(
                svg,
                r#"<path d="M{x0:.1} {y:.1}H{x1:.1}" stroke="{RULE}"/><text x="{:.1}" y="{:.1}" text-anchor="end">{words}</text>"#,
                x0 - 5.0,
                y + 4.0
            )?;
        }
        for (at, words) in marks(xs, self.x, 6) {
            let x = across(at);
            writeln!(
                svg,
                r##"<path d="M{x:.1} {y0:.1}v4" stroke="#9a9aa0"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{words}</text>"##,
                y0 + 15.0
            )?;
        }
        let (x_label, y_label) = (escaped(&self.x_label), escaped(&self.y_label));
        writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="middle" font-size="10">{x_label}</text>"#,
            f64::midpoint(x0, x1),
            y0 + 28.0
        )?;
        let middle = f64::midpoint(y0, y1);
        writeln!(
            svg,
            r#"<text transform="translate({:.1} {middle:.1}) rotate(-90)" text-anchor="middle" font-size="10">{y_label}</text>"#,
            left + 11.0
        )?;
        for line in &panel.lines {
            let colour = self.colour(line.series);
            let mut path = String::new();
            let mut pen = 'M';
            for (k, &(x, y)) in line.points.iter().enumerate() {
                let (px, py) = (across(x), down(y));
                if !(px.is_finite() && py.is_finite()) {
                    pen = 'M';
                    continue;
                }
                write!(path, "{pen}{px:.1} {py:.1}")?;
                pen = 'L';
                let radius = if line.marked == Some(k) { 5.0 } else { 2.0 };
                let fill = if line.marked == Some(k) { "none" } else { colour };
                writeln!(
                    svg,
                    r#"<circle cx="{px:.1}" cy="{py:.1}" r="{radius}" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>"#
                )?;
                if let Some(&spread) = line.spread.get(k).filter(|s| **s > 0.0 && s.is_finite()) {
                    let (a, b) = (down(y - spread), down(y + spread));
                    if a.is_finite() && b.is_finite() {
                        writeln!(svg, r#"<path d="M{px:.1} {a:.1}V{b:.1}" stroke="{colour}"/>"#)?;
                    }
                }
            }
            if line.joined && !path.is_empty() {
                writeln!(svg, r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>"#)?;
            }
        }
        Ok(())
    }

    /// Colours from light to dark: series are ordered, by step or by width.
    fn colour(&self, series: usize) -> &'static str {
        const RAMP: [&str; 6] = ["#9ecae1", "#5aa0d0", "#1f6fb2", "#7b4fa0", "#b0356f", "#5b1a3a"];
        let last = self.legend.len().saturating_sub(1).max(1);
        RAMP[(series * (RAMP.len() - 1) / last).min(RAMP.len() - 1)]
    }
}

fn placed(x: f64, scale: Scale) -> f64 {
    match scale {
        Scale::Linear => x,
        Scale::Log2 if x > 0.0 => x.log2(),
        Scale::Log2 => f64::NAN,
    }
}

fn range<'a>(lines: impl IntoIterator<Item = &'a Line>, scale: Scale) -> Option<Range> {
    let values = lines.into_iter().flat_map(|line| {
        line.points.iter().enumerate().flat_map(|(k, p)| {
            let spread = line.spread.get(k).copied().filter(|s| s.is_finite()).unwrap_or(0.0);
            [p.1 - spread, p.1 + spread]
        })
    });
    ends(values.map(|v| placed(v, scale)), 0.08)
}

fn ends(values: impl Iterator<Item = f64>, pad: f64) -> Option<Range> {
    let finite = values.filter(|v| v.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return None;
    }
    // A flat line is shown flat, not as its noise.
    let pad = ((high - low) * pad).max(if high - low < 1e-12 { low.abs().max(1.0) * 0.05 } else { 0.0 });
    Some(Range { low: low - pad, high: high + pad })
}

/// Marks of an axis with their words; the numbers themselves, not their positions.
fn marks(range: Range, scale: Scale, wanted: usize) -> Vec<(f64, String)> {
    let span = range.high - range.low;
    let rough = span / wanted as f64;
    let power = 10f64.powf(rough.log10().floor());
    let mut step =
        [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
    if scale == Scale::Log2 {
        step = step.max(1.0).round();
    }
    let (first, last) = ((range.low / step).ceil() as i64, (range.high / step).floor() as i64);
    let word = |at: f64| match scale {
        Scale::Linear => (at, decimal(at)),
        Scale::Log2 if (0.0..=14.0).contains(&at) => (at.exp2(), decimal(at.exp2())),
        Scale::Log2 => (at.exp2(), format!("2^{at}")),
    };
    (first..=last).map(|k| word(k as f64 * step)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(points: Vec<(f64, f64)>) -> String {
        let line = Line { series: 0, points, spread: vec![0.0, 0.5], marked: Some(1), joined: true };
        let panel = Panel { title: "a < b".into(), lines: vec![line], alarm: true };
        Panels {
            title: "t".into(),
            subtitle: "s".into(),
            x_label: "width".into(),
            y_label: "size".into(),
            x: Scale::Log2,
            y: Scale::Log2,
            common_y: false,
            legend: vec!["step 0".into()],
            columns: 3,
            zoom: 1.0,
            panels: vec![panel],
        }
        .svg()
    }

    #[test]
    fn points_rings_and_bars_are_drawn_and_words_escaped() {
        let svg = picture(vec![(64.0, 1.0), (128.0, 2.0), (256.0, f64::NAN), (512.0, 4.0)]);
        assert_eq!(svg.matches("<circle").count(), 3, "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains(ALARM) && svg.contains(">128<"), "{svg}");
        assert_eq!(svg.matches(r##"fill="none" stroke="#9ecae1""##).count(), 2, "a ring and a line: {svg}");
    }

    #[test]
    fn nothing_to_draw_is_an_empty_panel() {
        assert!(!picture(vec![(64.0, f64::NAN)]).contains("<circle"));
        assert!(!picture(vec![(64.0, 1.0)]).contains("NaN"));
    }
}
