//! Right operands that do not change from product to product, packed once.
//!
//! Packing reads every weight once and waits for memory while it does; a forward pass of one image spends a tenth of its
//! time there. Weights that their owner declares frozen are packed at their first product and kept until they change.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::scratch::Scratch;

/// Address, columns and terms of an operand.
type Key = (usize, usize, usize);

/// Frozen memory: end address and what was packed of it, by start address.
type Regions = BTreeMap<usize, (usize, HashMap<Key, Arc<Scratch>>)>;

static REGIONS: Mutex<Regions> = Mutex::new(BTreeMap::new());

fn regions() -> MutexGuard<'static, Regions> {
    REGIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that does not change while this lives.
#[derive(Debug)]
pub(crate) struct Frozen(usize);

impl Frozen {
    /// Declares `values` frozen; the caller drops the answer before it changes or frees them.
    pub(crate) fn new(values: &[f32]) -> Self {
        let start = values.as_ptr() as usize;
        regions().insert(start, (start + size_of_val(values), HashMap::new()));
        Self(start)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        regions().remove(&self.0);
    }
}

/// The packed form of a frozen operand, made by `pack` when it is asked for first; `None` when `data` is not frozen.
pub(super) fn packed(
    data: &[f32],
    columns: usize,
    terms: usize,
    pack: impl FnOnce() -> Scratch,
) -> Option<Arc<Scratch>> {
    let start = data.as_ptr() as usize;
    let end = start + columns * terms * size_of::<f32>();
    let key = (start, columns, terms);
    let inside = |regions: &Regions| -> Option<usize> {
        let (first, (last, _)) = regions.range(..=start).next_back()?;
        (end <= *last).then_some(*first)
    };
    let region = {
        let regions = regions();
        let region = inside(&regions)?;
        if let Some(found) = regions[&region].1.get(&key) {
            return Some(Arc::clone(found));
        }
        region
    };
    // Not under the lock: packing runs on many threads, and another session may want its own weights meanwhile.
    let made = Arc::new(pack());
    if let Some((_, packed)) = regions().get_mut(&region) {
        packed.insert(key, Arc::clone(&made));
    }
    Some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_frozen_operands_are_kept_and_only_as_long() {
        let weights = vec![1.0_f32; 64];
        let made = |value: f32| {
            move || {
                let mut scratch = Scratch::new(4);
                scratch.fill(value);
                scratch
            }
        };
        let first = |found: Option<Arc<Scratch>>| found.map(|s| s[0]);
        assert_eq!(first(packed(&weights, 4, 4, made(1.0))), None);
        let frozen = Frozen::new(&weights);
        assert_eq!(first(packed(&weights, 4, 4, made(1.0))), Some(1.0));
        assert_eq!(first(packed(&weights, 4, 4, made(2.0))), Some(1.0), "kept");
        assert_eq!(first(packed(&weights[16..], 4, 4, made(3.0))), Some(3.0), "another operand");
        assert_eq!(first(packed(&weights[48..], 4, 5, made(4.0))), None, "reaches beyond the end");
        drop(frozen);
        let _again = Frozen::new(&weights);
        assert_eq!(first(packed(&weights, 4, 4, made(5.0))), Some(5.0), "packed anew");
    }
}
