//! How long 50,000 features take to become all metrics, and in how much memory.

use std::ops::Range;
use std::time::Instant;

use mudit::fid::evaluation::{Features, Settings};
use mudit::fid::extractor::Description;
use mudit::fid::metrics::frechet;
use mudit::fid::metrics::inception_score::Splits;
use mudit::fid::metrics::numpy_random::Mt19937;
use mudit::fid::part::{Block, Part};
use mudit::fid::plan::{BLOCK, Images, Plan, Side};

const SAMPLES: u64 = 50_000;
const REFERENCE: u64 = 10_000;
const WIDTHS: [usize; 3] = [2048, 2023, 1008];

/// Correlated, skewed features with a spectrum that falls by four decades, as those of photographs do.
struct Generator {
    directions: Vec<f32>,
    rank: usize,
    random: Mt19937,
}

impl Generator {
    fn new(seed: u32) -> Self {
        let (rank, mut random) = (64, Mt19937::new(7));
        let directions = (0..rank * WIDTHS[0]).map(|_| uniform(&mut random)).collect();
        Self { directions, rank, random: Mt19937::new(seed) }
    }

    fn row(&mut self, width: usize, to: &mut Vec<f32>) {
        let weights: Vec<f32> =
            (0..self.rank).map(|k| uniform(&mut self.random) / (1.0 + k as f32)).collect();
        let start = to.len();
        to.extend((0..width).map(|_| uniform(&mut self.random) * 0.2 + 0.3));
        for (weight, direction) in weights.iter().zip(self.directions.chunks_exact(WIDTHS[0])) {
            to[start..].iter_mut().zip(direction).for_each(|(x, d)| *x += weight * d);
        }
        to[start..].iter_mut().for_each(|x| *x = x.max(0.0));
    }
}

fn uniform(random: &mut Mt19937) -> f32 {
    random.u32() as f32 / 2f32.powi(31) - 1.0
}

fn plan(side: Side, count: u64) -> Plan {
    let network = Description {
        preset: "drawn".into(),
        network: "drawn".into(),
        weights: "none".into(),
        weights_sha256: "none".into(),
        preprocessing: "none".into(),
        precision: "f32".into(),
        runtime: "none".into(),
        pool: WIDTHS[0],
        spatial: Some(WIDTHS[1]),
        logits: Some(WIDTHS[2]),
    };
    let images = Images::files(Vec::new());
    Plan::new(side, images, count, network, count, false)
}

/// Features as a pass would leave them; the seconds are those of summing and keeping them.
fn features(at: &std::path::Path, side: Side, count: u64, seed: u32) -> (Features, f64) {
    let plan = plan(side, count);
    let mut part = Part::open(at, &plan, 0..count).unwrap();
    let (mut generator, mut seconds) = (Generator::new(seed), 0.0);
    while !part.is_finished() {
        let Range { start, .. } = part.missing();
        let rows = BLOCK.min(count - start);
        let mut block = Block::default();
        for _ in 0..rows {
            generator.row(WIDTHS[0], &mut block.pool);
            generator.row(WIDTHS[1], &mut block.spatial);
            generator.row(WIDTHS[2], &mut block.logits);
        }
        let mut seen = part.seen.clone();
        seen.images += rows;
        let clock = Instant::now();
        part.add(&block, seen).unwrap();
        seconds += clock.elapsed().as_secs_f64();
    }
    (Features::of(vec![part]).unwrap(), seconds)
}

#[test]
#[ignore = "takes minutes and 1 GB of disk; run it with --release --nocapture on an idle machine"]
fn all_metrics_of_50_000_features() {
    let scratch = tempfile::tempdir().unwrap();
    let (real, mut seconds) = features(&scratch.path().join("r"), Side::Reference, REFERENCE, 1);
    let reference = real.statistics("0").unwrap();
    drop(real);
    let (samples, own) = features(&scratch.path().join("s"), Side::Samples, SAMPLES, 2);
    seconds += own;
    println!("sums of {SAMPLES} + {REFERENCE} features: {seconds:.1} s");
    let clock = Instant::now();
    let found = samples.metrics(&reference, &Settings::usual(Splits::ADM, REFERENCE as usize)).unwrap();
    let metrics = clock.elapsed().as_secs_f64();
    println!("all metrics: {metrics:.1} s\n{:?}", found.named());
    let clock = Instant::now();
    let again = frechet::distance(&samples.statistics("0").unwrap().pool, &reference.pool).unwrap();
    println!("FID alone: {:.2} s", clock.elapsed().as_secs_f64());
    assert_eq!(again, found.fid);
    assert!(metrics + seconds < 180.0, "three minutes are allowed");
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap().trim();
    println!("most memory: {peak}");
    let kilobytes: u64 = peak.split(' ').next().unwrap().parse().unwrap();
    assert!(kilobytes < 2 << 20, "2 GB are allowed");
}
