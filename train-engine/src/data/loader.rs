//! Batches read ahead of the training step.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use rayon::iter::{IndexedParallelIterator as _, ParallelIterator as _};
use rayon::slice::ParallelSliceMut as _;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::plan::{BatchPlan, Cursor};
use super::{Dataset, read_finite};
use crate::error::{Result, TrainError};

/// What one optimizer step trains on.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The step, counted from 0.
    pub step: u64,
    /// The images' indices in the data set.
    pub indices: Vec<usize>,
    /// The images: `(N, C, H, W)` flat.
    pub x0: Vec<f32>,
    /// Their labels: `(N)`.
    pub y: Vec<i64>,
}

/// A thread that reads batches in order, some ahead; dropping it ends the thread.
#[derive(Debug)]
pub struct Loader {
    /// `None` only while being dropped.
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
    remaining: u64,
}

impl Loader {
    /// Starts reading the batches of `steps`.
    ///
    /// At most `prefetch` finished batches wait; `workers` threads read the images of a batch. Neither changes a value.
    ///
    /// # Errors
    /// [`TrainError::Internal`] when the system gives no thread.
    pub fn start(
        dataset: Arc<dyn Dataset>,
        plan: BatchPlan,
        flip: bool,
        steps: Range<u64>,
        prefetch: usize,
        workers: usize,
    ) -> Result<Self> {
        let no_thread = |error: &dyn std::fmt::Display| {
            TrainError::Internal(format!("cannot start a thread for the data: {error}"))
        };
        let pool = (workers > 1)
            .then(|| {
                ThreadPoolBuilder::new().num_threads(workers).thread_name(|i| format!("data-{i}")).build()
            })
            .transpose()
            .map_err(|error| no_thread(&error))?;
        let remaining = steps.end.saturating_sub(steps.start);
        // The batch in the thread's hands counts too.
        let (sender, receiver) = sync_channel(prefetch.saturating_sub(1));
        let thread = std::thread::Builder::new().name("data".into()).spawn(move || {
            let mut cursor = Cursor::new(plan);
            for step in steps {
                let indices = cursor.indices(step).to_vec();
                let batch = read_batch(dataset.as_ref(), &plan, flip, step, indices, pool.as_ref());
                let failed = batch.is_err();
                if sender.send(batch).is_err() || failed {
                    return;
                }
            }
        });
        let thread = thread.map_err(|error| no_thread(&error))?;
        Ok(Self { batches: Some(receiver), thread: Some(thread), remaining })
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    /// The next step's batch; after an error, or when all steps are through, nothing.
    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let batch = self.batches.as_ref()?.recv().unwrap_or_else(|_| {
            Err(TrainError::Internal("the thread that reads the data ended before its last batch".into()))
        });
        self.remaining = if batch.is_ok() { self.remaining - 1 } else { 0 };
        Some(batch)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Closing the channel is what ends the thread.
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            // A panic in there has been told by `next`.
            drop(thread.join());
        }
    }
}

fn read_batch(
    dataset: &dyn Dataset,
    plan: &BatchPlan,
    flip: bool,
    step: u64,
    indices: Vec<usize>,
    pool: Option<&ThreadPool>,
) -> Result<Batch> {
    let size = dataset.image_len();
    let mut x0 = vec![0.0; size * indices.len()];
    let read = |(row, image): (usize, &mut [f32])| {
        let flip = flip && plan.is_flipped(step, row);
        read_finite(dataset, indices[row], flip, &mut plan.draw(step, row), image)
    };
    let y: Result<Vec<i64>> = match pool {
        None => x0.chunks_exact_mut(size).enumerate().map(read).collect(),
        Some(pool) => pool.install(|| x0.par_chunks_exact_mut(size).enumerate().map(read).collect()),
    };
    Ok(Batch { step, y: y?, x0, indices })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::random::Stream;

    /// Image `i` is `[i, flipped, a draw]`, label `i % 3`.
    struct Counting {
        len: usize,
        reads: AtomicUsize,
        broken: Option<usize>,
    }

    impl Counting {
        fn set(len: usize, broken: Option<usize>) -> Arc<Self> {
            Arc::new(Self { len, reads: AtomicUsize::new(0), broken })
        }
    }

    impl Dataset for Counting {
        fn len(&self) -> usize {
            self.len
        }
        fn channels(&self) -> usize {
            1
        }
        fn height(&self) -> usize {
            1
        }
        fn width(&self) -> usize {
            3
        }
        fn num_classes(&self) -> usize {
            3
        }
        fn class_names(&self) -> &[String] {
            &[]
        }
        fn label(&self, index: usize) -> i64 {
            index as i64 % 3
        }
        fn read(&self, index: usize, flip: bool, draw: &mut Stream, out: &mut [f32]) -> Result<i64> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            if self.broken == Some(index) {
                return Err(TrainError::Internal(format!("image {index}")));
            }
            assert_ne!(self.broken, Some(usize::MAX), "a data set that panics");
            out.copy_from_slice(&[index as f32, f32::from(u8::from(flip)), draw.normal()]);
            Ok(index as i64 % 3)
        }
    }

    fn batches(flip: bool, steps: Range<u64>, prefetch: usize, workers: usize) -> Vec<Batch> {
        let plan = BatchPlan::new(9, 23, 4).unwrap();
        let loader = Loader::start(Counting::set(23, None), plan, flip, steps, prefetch, workers).unwrap();
        loader.collect::<Result<_>>().unwrap()
    }

    #[test]
    fn batches_come_in_order_and_hold_what_the_plan_says() {
        let plan = BatchPlan::new(9, 23, 4).unwrap();
        let batches = batches(true, 0..12, 2, 1);
        assert_eq!(batches.len(), 12);
        for (step, batch) in batches.iter().enumerate() {
            assert_eq!(batch.step, step as u64);
            assert_eq!(batch.indices, plan.indices(batch.step));
            for (row, image) in batch.x0.chunks_exact(3).enumerate() {
                assert_eq!(image[0], batch.indices[row] as f32);
                assert_eq!(image[1] == 1.0, plan.is_flipped(batch.step, row));
                assert_eq!(batch.y[row], batch.indices[row] as i64 % 3);
            }
        }
        assert!(batches.iter().flat_map(|batch| batch.x0.chunks_exact(3)).any(|image| image[1] == 1.0));
    }

    #[test]
    fn start_prefetch_and_workers_change_no_value() {
        let whole = batches(true, 0..12, 2, 1);
        assert_eq!(batches(true, 7..12, 1, 1), whole[7..]);
        assert_eq!(batches(true, 0..12, 5, 3), whole);
        assert!(
            batches(false, 0..12, 1, 1).iter().all(|batch| batch.x0.chunks_exact(3).all(|i| i[1] == 0.0))
        );
        assert_eq!(batches(true, 3..3, 1, 1), []);
    }

    #[test]
    fn an_error_arrives_in_its_place_and_ends_the_batches() {
        let plan = BatchPlan::new(9, 23, 4).unwrap();
        let broken = plan.indices(2)[1];
        let mut loader = Loader::start(Counting::set(23, Some(broken)), plan, false, 0..12, 2, 1).unwrap();
        assert!(loader.next().unwrap().is_ok());
        assert!(loader.next().unwrap().is_ok());
        assert_eq!(loader.next().unwrap().unwrap_err().to_string(), format!("internal: image {broken}"));
        assert!(loader.next().is_none());
    }

    #[test]
    fn a_panic_of_the_data_set_is_an_error() {
        let plan = BatchPlan::new(9, 23, 4).unwrap();
        let mut loader =
            Loader::start(Counting::set(23, Some(usize::MAX)), plan, false, 0..12, 2, 1).unwrap();
        assert!(loader.next().unwrap().unwrap_err().to_string().contains("ended before its last batch"));
    }

    #[test]
    fn the_thread_waits_for_its_reader_and_ends_with_it() {
        let plan = BatchPlan::new(9, 23, 4).unwrap();
        let set = Counting::set(23, None);
        let mut loader = Loader::start(set.clone(), plan, false, 0..u64::from(u32::MAX), 3, 1).unwrap();
        loader.next().unwrap().unwrap();
        drop(loader);
        assert_eq!(Arc::strong_count(&set), 1);
        // One taken, three ahead, and at most one started while the first was handed over.
        assert!(set.reads.load(Ordering::SeqCst) <= 5 * 4);
    }
}
