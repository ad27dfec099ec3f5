//! Curves of a sweep as panels.

use train_engine::sweep::results::{Curve, short};

use super::number;
use crate::render::panels::{Line, Panel, Panels, Scale};

/// Sizes by which lines of one panel differ, the first that does.
const SERIES: [&str; 4] = ["model.hidden_size", "train.batch_size", "train.steps", "model.depth"];

/// A panel a variant and setting, a line a size, the optimum ringed.
pub(in crate::commands) fn curves_picture(
    curves: &[Curve],
    x_key: &str,
    metric: &str,
    title: String,
) -> Panels {
    let varies = |key: &&str| {
        let values: Vec<f64> = curves.iter().filter_map(|c| c.at.get(*key).copied()).collect();
        values.iter().any(|v| Some(v) != values.first())
    };
    let series_key = SERIES.into_iter().find(|key| varies(key));
    let mut sizes: Vec<f64> =
        series_key.map_or(vec![], |key| curves.iter().filter_map(|c| c.at.get(key).copied()).collect());
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let highest = highest_shown(curves);
    let mut panels: Vec<Panel> = Vec::new();
    for curve in curves {
        let size = series_key.and_then(|key| curve.at.get(key).copied());
        let series = sizes.iter().position(|s| Some(*s) == size).unwrap_or(0);
        let rest = curve.at.iter().filter(|(key, _)| Some(key.as_str()) != series_key);
        let common = Curve { at: rest.map(|(k, v)| (k.clone(), *v)).collect(), ..curve.clone() };
        let name = common.words();
        let shown = |mean: Option<f64>| mean.filter(|m| *m <= highest).unwrap_or(f64::NAN);
        let points = curve.points.iter().map(|p| (p.x, shown(p.mean))).collect();
        let spread = curve.points.iter().map(|p| p.sd).collect();
        let line = Line { series, points, spread, marked: curve.best, joined: true };
        match panels.iter_mut().find(|panel| panel.title == name) {
            Some(panel) => panel.lines.push(line),
            None => panels.push(Panel { title: name, lines: vec![line], alarm: false }),
        }
    }
    let log = curves.iter().flat_map(|c| &c.points).all(|p| p.x > 0.0);
    let legend = match series_key {
        Some(key) => sizes.iter().map(|s| format!("{} {}", short(key), number(*s))).collect(),
        None => vec![metric.to_owned()],
    };
    Panels {
        title,
        subtitle:
            "mean over seeds, bars one standard deviation; rings mark the lowest; gaps diverged, or nearly (> 2 medians)"
                .into(),
        x_label: x_key.to_owned(),
        y_label: metric.to_owned(),
        x: if log { Scale::Log2 } else { Scale::Linear },
        y: Scale::Linear,
        common_y: true,
        legend,
        columns: 2,
        zoom: 1.7,
        panels,
    }
}

/// Twice the median: one trial on its way to infinity would press all others into a line.
fn highest_shown(curves: &[Curve]) -> f64 {
    let mut means: Vec<f64> = curves.iter().flat_map(|c| &c.points).filter_map(|p| p.mean).collect();
    means.sort_by(f64::total_cmp);
    means.get(means.len() / 2).map_or(f64::INFINITY, |median| median + median.abs())
}
