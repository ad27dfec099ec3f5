//! The measured time of a step over the rows of its batch, and what follows from it: the batch sizes that are kept,
//! and how many rows to take now.

use std::path::{Path, PathBuf};

use runtime::file::write_atomically;
use serde::{Deserialize, Serialize};

/// Batch sizes that are measured, in rows.
pub const CANDIDATES: [usize; 15] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192];
/// The largest batch is the smallest whose time a row is within this of the best.
const PLATEAU: f64 = 1.05;

/// One measured batch size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Rows of the batch.
    pub rows: usize,
    /// Median seconds of a step.
    pub seconds: f64,
}

/// Step times, by rows, ascending.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// The measured points.
    pub points: Vec<Point>,
}

impl Curve {
    /// Whether larger batches can still be better: the last two made no row cheaper.
    pub fn goes_on(&self) -> bool {
        let best = self.best();
        let late = self.points.iter().rev().take(2);
        self.points.len() < 5 || late.clone().any(|p| a_row(*p) <= best * 1.02)
    }

    /// Least seconds a row.
    fn best(&self) -> f64 {
        self.points.iter().map(|p| a_row(*p)).fold(f64::INFINITY, f64::min)
    }

    /// The batch sizes worth keeping: all up to the smallest that is within 5 % of the best time a row. A guided
    /// image needs two rows, so there is always one of at least two.
    #[must_use]
    pub fn kept(&self) -> Self {
        let wide = || self.points.iter().filter(|p| p.rows >= 2);
        let best = wide().map(|p| a_row(*p)).fold(f64::INFINITY, f64::min);
        let largest = wide().find(|p| a_row(**p) <= best * PLATEAU).map_or(0, |p| p.rows);
        Self { points: self.points.iter().filter(|p| p.rows <= largest).copied().collect() }
    }

    /// The same without the batch sizes that `allowed` refuses.
    #[must_use]
    pub fn only(&self, allowed: impl Fn(usize) -> bool) -> Self {
        Self { points: self.points.iter().filter(|p| allowed(p.rows)).copied().collect() }
    }

    /// Rows of the largest batch.
    pub fn largest(&self) -> usize {
        self.points.last().map_or(0, |p| p.rows)
    }

    /// The smallest batch that holds `rows`, or the largest.
    pub fn bucket(&self, rows: usize) -> usize {
        self.points.iter().find(|p| p.rows >= rows).map_or(self.largest(), |p| p.rows)
    }

    /// Seconds of a row in the largest batch.
    pub fn row_seconds(&self) -> f64 {
        self.points.last().map_or(f64::INFINITY, |p| a_row(*p))
    }

    /// Rows a second in the largest batch.
    pub fn rate(&self) -> f64 {
        self.row_seconds().recip()
    }

    /// How many of `ready` rows to take: those that make the time a useful row least.
    pub fn target(&self, ready: usize) -> usize {
        let most = ready.clamp(1, self.largest().max(1));
        let time = |rows: usize| {
            let bucket = self.points.iter().find(|p| p.rows >= rows).or(self.points.last());
            bucket.map_or(f64::INFINITY, |p| p.seconds) / rows as f64
        };
        let full = self.points.iter().map(|p| p.rows).filter(|rows| *rows < most);
        let (rows, _) = full.chain([most]).fold((1, f64::INFINITY), |(best, least), rows| {
            // The larger one of two equals.
            if time(rows) <= least { (rows, time(rows)) } else { (best, least) }
        });
        rows
    }
}

fn a_row(point: Point) -> f64 {
    point.seconds / point.rows as f64
}

/// A curve on disk, good for one program on one machine.
#[derive(Debug)]
pub struct CurveFile {
    path: Option<PathBuf>,
    key: String,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    key: String,
    curve: Curve,
}

impl CurveFile {
    /// `key` says what the times depend on; `directory` is the engine cache, if there is one.
    pub fn new(directory: Option<&Path>, key: &str) -> Self {
        let name = runtime::file::sha256_bytes(key.as_bytes());
        let path = directory.map(|d| d.join("curves").join(format!("{}.json", &name[..32])));
        Self { path, key: key.to_owned() }
    }

    /// Where it lies.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The curve that was measured before, if the file is there and is of this very key.
    pub fn read(&self) -> Option<Curve> {
        let text = std::fs::read(self.path.as_ref()?).ok()?;
        let stored: Stored = serde_json::from_slice(&text).ok()?;
        let rises = stored.curve.points.windows(2).all(|p| p[0].rows < p[1].rows);
        let sound =
            stored.curve.points.iter().all(|p| p.rows > 0 && p.seconds > 0.0 && p.seconds.is_finite());
        (stored.key == self.key && rises && sound && stored.curve.largest() >= 2).then_some(stored.curve)
    }

    /// Keeps a curve.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn write(&self, curve: &Curve) -> anyhow::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let stored = Stored { key: self.key.clone(), curve: curve.clone() };
        let text = serde_json::to_string_pretty(&stored)?;
        Ok(write_atomically(path, |w| writeln!(w, "{text}"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(usize, f64)]) -> Curve {
        Curve { points: points.iter().map(|&(rows, seconds)| Point { rows, seconds }).collect() }
    }

    #[test]
    fn the_largest_batch_is_where_the_plateau_begins() {
        let flat = curve(&[(1, 1.1), (2, 1.8), (4, 3.4), (8, 6.6), (16, 13.0), (32, 26.4)]);
        assert_eq!(flat.kept().largest(), 4);
        let falling = curve(&[(1, 1.0), (2, 1.1), (4, 1.3), (8, 1.8), (16, 3.0), (32, 5.0)]);
        assert_eq!(falling.kept().largest(), 32);
        // One row alone may be the cheapest; a guided image still needs two.
        assert_eq!(curve(&[(1, 1.0), (2, 2.5), (4, 5.5)]).kept().largest(), 2);
        assert_eq!(curve(&[(1, 1.0), (2, 2.02), (4, 4.2)]).kept().largest(), 2);
    }

    #[test]
    fn measuring_ends_when_larger_is_no_better() {
        let mut growing = curve(&[(1, 1.0), (2, 1.5), (4, 2.0), (8, 3.0), (16, 5.0), (24, 7.0)]);
        assert!(growing.goes_on());
        growing.points.extend(curve(&[(32, 10.0), (48, 15.0)]).points);
        assert!(!growing.goes_on());
    }

    #[test]
    fn the_target_is_the_cheapest_fill() {
        let c = curve(&[(2, 1.8), (4, 3.4), (8, 6.0)]);
        assert_eq!((c.target(100), c.target(1)), (8, 1));
        // Three rows would run in a batch of four, at 1.13 a row; two run at 0.9.
        assert_eq!(c.target(3), 2);
        // Seven at 0.857 beat four at 0.85 … not quite.
        assert_eq!(c.target(7), 4);
        let overhead = curve(&[(2, 10.0), (4, 10.5), (8, 11.0)]);
        assert_eq!((overhead.target(3), overhead.target(5)), (3, 5));
        assert_eq!((c.bucket(3), c.bucket(4), c.bucket(5), c.bucket(99)), (4, 4, 8, 8));
    }

    #[test]
    fn a_curve_is_kept_for_its_key_only_and_a_broken_file_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = CurveFile::new(Some(folder.path()), "this machine");
        assert!(file.read().is_none());
        let c = curve(&[(1, 1e-3), (2, 1.5e-3)]);
        file.write(&c).unwrap();
        assert_eq!(file.read(), Some(c));
        assert!(CurveFile::new(Some(folder.path()), "another").read().is_none());
        std::fs::write(file.path().unwrap(), "{\"key\": \"this mach").unwrap();
        assert!(file.read().is_none());
    }
}
