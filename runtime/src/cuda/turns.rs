//! Turns on one stream: who may queue work, one thread at a time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// Gives turns. A thread that has the turn may take it again.
///
/// While a run is being recorded as a CUDA graph, whatever another thread queued on its stream would be recorded instead
/// of done, and an allocation would end the recording: that is why every call of the driver takes a turn.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Who has the turn, and how often it took it.
    holder: Mutex<Option<(ThreadId, usize)>>,
    free: Condvar,
}

/// The right to queue work on a GPU until it is dropped.
#[derive(Debug)]
#[must_use = "the turn ends when this is dropped"]
pub struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for the turn.
    pub(super) fn take(&self) -> Turn<'_> {
        let me = thread::current().id();
        let mut holder = self.lock();
        loop {
            match &mut *holder {
                None => {
                    *holder = Some((me, 1));
                    return Turn(self);
                }
                Some((thread, times)) if *thread == me => {
                    *times += 1;
                    return Turn(self);
                }
                Some(_) => holder = self.free.wait(holder).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<(ThreadId, usize)>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut holder = self.0.lock();
        *holder = holder.and_then(|(thread, times)| (times > 1).then_some((thread, times - 1)));
        if holder.is_none() {
            self.0.free.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_thread_at_a_time_has_the_turn_however_often() {
        let (turns, inside, most) = (Turns::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let outer = turns.take();
                        let inner = turns.take();
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        drop(inner);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(outer);
                    }
                });
            }
        });
        assert_eq!(most.into_inner(), 1);
        assert!(turns.lock().is_none());
    }
}
