//! The metrics give the numbers of scipy, torch-fidelity and the definitions on the same features.
//!
//! The fixture is written by `tests/peers/fid_metrics.py`.

use mudit::fid::metrics::inception_score::{Scores, Splits};
use mudit::fid::metrics::kernel_distance::{Subsets, kernel_distance};
use mudit::fid::metrics::manifold::overlap;
use mudit::fid::metrics::moments::{Gaussian, Moments};
use mudit::fid::metrics::{Rows, frechet};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::scene::fixture;

/// Largest relative difference of a number.
const TOLERANCE: f64 = 1e-6;

struct Fixture {
    file: Vec<u8>,
    expected: Value,
}

impl Fixture {
    fn read() -> Self {
        let text = std::fs::read(fixture("fid-metrics", "expected.json")).unwrap();
        let file = std::fs::read(fixture("fid-metrics", "features.safetensors")).unwrap();
        Self { file, expected: serde_json::from_slice(&text).unwrap() }
    }

    /// Width and values of an f32 matrix.
    fn tensor(&self, name: &str) -> (usize, Vec<f32>) {
        let file = SafeTensors::deserialize(&self.file).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        (tensor.shape()[1], tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// Values of an f64 tensor.
    fn doubles(&self, name: &str) -> Vec<f64> {
        let file = SafeTensors::deserialize(&self.file).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F64, "{name}");
        tensor.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
    }

    fn number(&self, path: &str) -> f64 {
        self.expected.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no `{path}`"))
    }
}

fn close(what: &str, found: f64, expected: f64) {
    let error = (found - expected).abs() / expected.abs().max(1e-300);
    assert!(error <= TOLERANCE, "{what}: {found} against {expected}, relative error {error:e}");
}

#[test]
fn inception_scores_are_those_of_both_tools() {
    let fixture = Fixture::read();
    let (classes, logits) = fixture.tensor("logits");
    let rows = Rows::new(&logits, classes).unwrap();
    for (splits, key) in
        [(Splits::TORCH_FIDELITY, "is_torch_fidelity"), (Splits::Consecutive { size: 150 }, "is_adm_150")]
    {
        let mut scores = Scores::new(splits, rows.len(), classes);
        (0..rows.len()).for_each(|i| scores.add(rows.row(i)).unwrap());
        let found = scores.finish().unwrap();
        close(key, found.mean, fixture.number(&format!("/{key}/0")));
        close(key, found.std, fixture.number(&format!("/{key}/1")));
    }
}

#[test]
fn precision_and_recall_count_exactly() {
    let fixture = Fixture::read();
    let ((width, samples), (_, reference)) = (fixture.tensor("samples"), fixture.tensor("reference"));
    let (samples, reference) = (Rows::new(&samples, width).unwrap(), Rows::new(&reference, width).unwrap());
    let found = overlap(samples, reference, 3).unwrap();
    assert_eq!(found.samples_inside as f64, fixture.number("/samples_inside"));
    assert_eq!(found.reference_inside as f64, fixture.number("/reference_inside"));
}

#[test]
fn kernel_distance_is_torch_fidelitys_on_its_subsets() {
    let fixture = Fixture::read();
    let ((width, samples), (_, reference)) = (fixture.tensor("samples"), fixture.tensor("reference"));
    let (samples, reference) = (Rows::new(&samples, width).unwrap(), Rows::new(&reference, width).unwrap());
    let found = kernel_distance(samples, reference, Subsets { count: 30, size: 200, seed: 2020 }).unwrap();
    close("KID", found.mean, fixture.number("/kid/0"));
    close("KID deviation", found.std, fixture.number("/kid/1"));
    // As the tool computes it for itself, in f32.
    assert!((found.mean - fixture.number("/kid_float32/0")).abs() < 1e-6);
}

#[test]
fn the_distance_of_features_is_that_of_scipy_and_torch_fidelity() {
    let fixture = Fixture::read();
    let gaussian = |name: &str| {
        let (width, values) = fixture.tensor(name);
        let mut moments = Moments::new(width);
        for block in values.chunks(100 * width) {
            moments.add_block(Rows::new(block, width).unwrap()).unwrap();
        }
        moments.gaussian().unwrap()
    };
    let found = frechet::distance(&gaussian("samples"), &gaussian("reference")).unwrap();
    close("scipy", found, fixture.number("/fid_sqrtm"));
    close("torch-fidelity", found, fixture.number("/fid_torch_fidelity"));
}

#[test]
fn the_distance_of_statistics_is_right_for_any_rank() {
    let fixture = Fixture::read();
    let cases: Vec<String> = fixture.expected["frechet"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(cases, ["well", "graded", "few", "one-few", "same"]);
    for case in cases {
        let gaussian = |side: &str| {
            let get = |what: &str| fixture.doubles(&format!("frechet.{case}.{side}.{what}"));
            let (mean, sigma) = (get("mu"), get("sigma"));
            Gaussian::new(mean, &sigma).unwrap()
        };
        let (x, y) = (gaussian("x"), gaussian("y"));
        let spread: f64 = (0..x.mean.len()).map(|i| x.covariance[(i, i)] + y.covariance[(i, i)]).sum();
        for (a, b) in [(&x, &y), (&y, &x)] {
            let found = frechet::distance(a, b).unwrap();
            let expected = fixture.number(&format!("/frechet/{case}/vectors"));
            // Equal sets have distance 0, known to the rounding of its terms.
            let slack = TOLERANCE * expected.abs() + 1e-13 * spread;
            assert!((found - expected).abs() <= slack, "{case}: {found} against {expected}");
            if let Some(sqrtm) = fixture.expected.pointer(&format!("/frechet/{case}/sqrtm")) {
                close(&format!("{case}, scipy"), found, sqrtm.as_f64().unwrap());
            }
        }
    }
}
