//! Parts that are stopped, split and spoiled.

use super::super::plan::tests::plan;
use super::super::plan::{BLOCK, Shard};
use super::*;

/// Features of images `range` of a set.
fn block(range: Range<u64>) -> Block {
    let rows = |width: u64, salt: u64| -> Vec<f32> {
        let all = range.clone().flat_map(|i| (0..width).map(move |k| (i * 7 + k * 3 + salt) % 101));
        all.map(|x| x as f32 / 10.0).collect()
    };
    Block { pool: rows(4, 0), spatial: rows(3, 1), logits: rows(2, 2) }
}

fn fill(part: &mut Part, until: u64) {
    while !part.is_finished() && part.missing().start < until {
        let start = part.missing().start;
        let range = start..(start + BLOCK).min(part.range().end);
        let mut seen = part.seen.clone();
        seen.images += range.end - range.start;
        seen.blocks.push(format!("{start}"));
        part.add(&block(range), seen).unwrap();
    }
}

fn whole(part: &Part) -> (Vec<f32>, Vec<f32>) {
    let (mut kept, mut logits) = (Vec::new(), Vec::new());
    part.kept_features(&mut kept).unwrap();
    part.each_logits(|row| {
        assert_eq!(row.len(), 2);
        logits.extend_from_slice(row);
        Ok(())
    })
    .unwrap();
    (kept, logits)
}

#[test]
fn a_killed_part_goes_on_to_the_same_end() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(2100, 600);
    let range = plan.shard(Shard::WHOLE).unwrap();
    let mut straight = Part::open(&dir.path().join("a"), &plan, range.clone()).unwrap();
    fill(&mut straight, u64::MAX);
    let place = dir.path().join("b");
    for (save, until) in [(true, 500), (false, 900), (true, 1100), (false, u64::MAX)] {
        let mut part = Part::open(&place, &plan, range.clone()).unwrap();
        fill(&mut part, until);
        if save {
            part.save().unwrap();
        }
        // Dropped here: what was not saved is as good as lost, and its bytes lie behind the state.
    }
    let resumed = Part::finished(&place).unwrap();
    assert!(resumed.pool == straight.pool && resumed.spatial == straight.spatial);
    assert_eq!(resumed.seen, straight.seen);
    assert_eq!(whole(&resumed), whole(&straight));
    assert_eq!(whole(&resumed).0, block(0..600).pool);
    assert_eq!(whole(&resumed).1, block(0..2100).logits);
    resumed.remove().unwrap();
    assert!(!place.exists());
}

#[test]
fn shards_hold_the_same_as_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(1600, 900);
    let mut one = Part::open(&dir.path().join("one"), &plan, 0..1600).unwrap();
    fill(&mut one, u64::MAX);
    let (mut pool, mut kept, mut logits) = (Moments::new(4), Vec::new(), Vec::new());
    for number in 1..=3 {
        let range = plan.shard(Shard { number, of: 3 }).unwrap();
        let mut part = Part::open(&dir.path().join(number.to_string()), &plan, range).unwrap();
        fill(&mut part, u64::MAX);
        pool.merge(&part.pool).unwrap();
        let (k, l) = whole(&part);
        kept.extend(k);
        logits.extend(l);
    }
    assert!(pool == one.pool && (kept, logits) == whole(&one));
}

#[test]
fn another_plan_and_damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let (ours, mut other) = (plan(300, 300), plan(300, 300));
    let mut part = Part::open(&place, &ours, 0..300).unwrap();
    let error = Part::open(&place, &ours, 0..300).unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
    fill(&mut part, 1);
    part.save().unwrap();
    drop(part);
    let error = Part::finished(&place).unwrap_err().to_string();
    assert!(error.contains("250 of 300"), "{error}");
    other.network.preset = "other".into();
    let error = Part::open(&place, &other, 0..300).unwrap_err().to_string();
    assert!(error.contains("network.preset") && error.contains("--work"), "{error}");
    let error = Part::open(&place, &ours, 0..250).unwrap_err().to_string();
    assert!(error.contains("0..300"), "{error}");
    let error = Part::finished(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no part"), "{error}");

    let state = fs::read(place.join(STATE)).unwrap();
    for spoil in [state.len() / 2, 40, 3] {
        let mut bytes = state.clone();
        bytes[spoil] ^= 1;
        fs::write(place.join(STATE), &bytes).unwrap();
        let error = Part::open(&place, &ours, 0..300).unwrap_err().to_string();
        assert!(error.contains("is damaged"), "{error}");
    }
    fs::write(place.join(STATE), &state).unwrap();
    fs::write(place.join(POOL), [0; 12]).unwrap();
    let error = Part::open(&place, &ours, 0..300).unwrap_err().to_string();
    assert!(error.contains("cut short"), "{error}");
}
