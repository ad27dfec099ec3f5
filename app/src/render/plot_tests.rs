use super::*;

/// Refuses what is not well formed: unclosed or crossed elements, bare `<` or `&`, attributes without quotes.
/// Returns the names of the elements in order.
fn elements(svg: &str) -> Result<Vec<String>, String> {
    let (mut open, mut names) = (Vec::new(), Vec::new());
    let mut rest = svg;
    while let Some(start) = rest.find('<') {
        check_text(&rest[..start])?;
        let end = rest[start..].find('>').ok_or("a tag that never ends")? + start;
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            if open.pop() != Some(name.to_owned()) {
                return Err(format!("`</{name}>` closes another element"));
            }
            continue;
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |t| (t, true));
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        if attributes.matches('"').count() != 2 * attributes.matches("=\"").count() || tag.contains('<') {
            return Err(format!("attributes of `{tag}`"));
        }
        check_text(attributes)?;
        names.push(name.to_owned());
        if !closed {
            open.push(name.to_owned());
        }
    }
    if !open.is_empty() || !rest.trim().is_empty() {
        return Err(format!("left open: {open:?} {rest}"));
    }
    Ok(names)
}

fn check_text(text: &str) -> Result<(), String> {
    let known = ["&amp;", "&lt;", "&gt;", "&quot;"];
    let bare = text.match_indices('&').find(|(at, _)| !known.iter().any(|e| text[*at..].starts_with(e)));
    bare.map_or(Ok(()), |_| Err(format!("a bare & in `{text}`")))
}

fn noisy(n: usize) -> Vec<(f64, f64)> {
    let noise = |k: usize| ((k * 7919) % 1000) as f64 / 1000.0 - 0.5;
    (0..n).map(|k| (k as f64, 0.2 + 1.5 / (1.0 + k as f64 / 40.0) + 0.08 * noise(k))).collect()
}

#[test]
fn the_checker_itself_refuses_broken_documents() {
    for broken in ["<a><b></a></b>", "<a>", "<a x=1\"/>", "<a>b & c</a>", "<a"] {
        assert!(elements(broken).is_err(), "{broken}");
    }
}

#[test]
fn the_document_is_well_formed_and_holds_every_line() {
    let plot = LinePlot::new("loss <of> \"A & B\"", "step", "loss")
        .subtitle("5 > 4 & so on")
        .smoothed("train", noisy(500), 20.0)
        .line("held out", noisy(20));
    let svg = plot.svg();
    let names = elements(&svg).unwrap();
    assert_eq!(names[0], "svg");
    assert!(svg.contains("loss &lt;of&gt; &quot;A &amp; B&quot;"));
    for label in ["step", "train", "held out"] {
        assert!(svg.contains(&format!(">{label}</text>")), "{label}");
    }
    assert_eq!(svg.matches("stroke-opacity").count(), 1, "one pale line");
    assert_eq!(svg.matches(r#"stroke-width="2""#).count(), 2, "two clear lines");
}

#[test]
fn numbers_that_are_not_finite_make_gaps_and_never_reach_the_document() {
    let points = vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 0.0), (3.0, f64::INFINITY), (4.0, 2.0), (5.0, 3.0)];
    for plot in [LinePlot::new("t", "x", "y"), LinePlot::new("t", "x", "y").log_y()] {
        let svg = plot.clone().line("a", points.clone()).smoothed("b", points.clone(), 2.0).svg();
        elements(&svg).unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let line = svg.lines().find(|l| l.contains(r#"stroke-width="2""#)).unwrap();
        // Log axis: the 0 has no place, too, but the gap is the same one.
        assert_eq!(line.matches('M').count(), if plot.log_y { 2 } else { 3 }, "{line}");
    }
}

#[test]
fn a_plot_of_nothing_is_still_a_picture() {
    for plot in [LinePlot::new("", "", ""), LinePlot::new("t", "x", "y").line("empty", vec![]).log_y()] {
        elements(&plot.svg()).unwrap();
    }
    elements(&LinePlot::new("t", "x", "y").line("one", vec![(3.0, 3.0)]).svg()).unwrap();
}

#[test]
fn a_long_run_stays_a_small_file_and_keeps_its_extremes() {
    let mut points = noisy(200_000);
    points[100_000].1 = 1.9; // one spike in the middle
    let svg = LinePlot::new("t", "x", "y").line("a", points).svg();
    assert!(svg.len() < 150_000, "{}", svg.len());
    let line = svg.lines().find(|l| l.contains(r#"stroke-width="2""#)).unwrap();
    let heights: Vec<f64> = line
        .split(['M', 'L', '"'])
        .filter_map(|p| p.split_once(' ').and_then(|(_, y)| y.parse().ok()))
        .collect();
    let highest = heights.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    assert!(highest > heights.len() / 3 && highest < 2 * heights.len() / 3, "the spike is gone");
}

#[test]
fn one_spike_of_the_raw_points_does_not_set_the_scale() {
    let mut points: Vec<(f64, f64)> = (0..1000).map(|k| (k as f64, 1.0)).collect();
    points[500].1 = 1e6;
    let plot = LinePlot::new("t", "x", "y").smoothed("a", points, 1e9);
    let (_, y) = plot.axes();
    assert!(y.place(1e6).unwrap() > 100.0);
}

#[test]
fn smoothing_keeps_lines_has_no_lag_and_halves_in_its_half_life() {
    let line: Vec<(f64, f64)> = (0..2000).map(|k| (f64::from(k), 3.0 + 0.5 * f64::from(k))).collect();
    let smoothed = smooth(&line, 7.0);
    assert!(smoothed[500..1500].iter().zip(&line[500..]).all(|(a, b)| (a.1 - b.1).abs() < 1e-9));
    let flat: Vec<(f64, f64)> = (0..50).map(|k| (f64::from(k), 3.0)).collect();
    assert!(smooth(&flat, 7.0).iter().all(|p| (p.1 - 3.0).abs() < 1e-12));
    // One impulse: its trace halves in ten points, to both sides.
    let impulse: Vec<(f64, f64)> =
        (0..2001).map(|k| (f64::from(k), f64::from(u8::from(k == 1000)))).collect();
    let trace = smooth(&impulse, 10.0);
    for at in [990, 1010] {
        assert!((trace[at].1 / trace[1000].1 - 0.5).abs() < 1e-9, "{}", trace[at].1);
    }
    // A hole in the values is no value.
    let holed = [(0.0, 2.0), (1.0, f64::NAN), (2.0, 2.0)];
    let smoothed = smooth(&holed, 1.0);
    assert!(smoothed[1].1.is_nan() && smoothed[0].1 == 2.0 && smoothed[2].1 == 2.0);
}
