//! The worker: the thread that makes steps, each of a batch that it takes at the border of the last.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::order::Failure;
use super::schedule::Pick;
use super::stepper::{Slot, Stepper};
use super::{Activity, Factory, Phase, Shared};

/// While it waits, it looks for deadlines this often.
const TICK: Duration = Duration::from_millis(100);
/// First and longest pause between attempts to restart.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Makes steps until the batcher stops.
pub(super) fn run(shared: &Shared, mut stepper: Box<dyn Stepper>, factory: &Factory) {
    while let Some((pick, bucket, mut slots)) = next(shared) {
        let start = Instant::now();
        let step = || stepper.step(pick.model, bucket, &mut slots);
        let outcome = catch_unwind(AssertUnwindSafe(step));
        let fault = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(panic) => Some(words(panic.as_ref())),
        };
        let Some(fault) = fault else {
            let mut state = shared.lock();
            state.settle(&pick, bucket, slots, start.elapsed());
            state.activity = Activity::Waiting;
            drop(state);
            shared.ended.notify_all();
            continue;
        };
        fail(shared, &pick, &fault);
        match restart(shared, factory) {
            Some(new) => stepper = new,
            None => return,
        }
    }
}

/// Waits for the next batch; `None` when the batcher stops.
fn next(shared: &Shared) -> Option<(Pick, usize, Vec<Slot>)> {
    let mut state = shared.lock();
    loop {
        if state.phase == Phase::Stopped {
            return None;
        }
        if let Some(batch) = state.take() {
            state.activity = Activity::Stepping(Instant::now());
            return Some(batch);
        }
        // A deadline may have ended an order.
        shared.ended.notify_all();
        state = shared.wake.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Ends every order that had an image in the batch.
fn fail(shared: &Shared, pick: &Pick, fault: &str) {
    let mut state = shared.lock();
    state.stats.faults += 1;
    state.activity = Activity::Restarting;
    for (id, _) in &pick.images {
        state.fail(*id, Failure::Engine(fault.to_owned()));
    }
    drop(state);
    shared.ended.notify_all();
}

/// A new stepper, tried for until there is one; `None` when the batcher stops.
fn restart(shared: &Shared, factory: &Factory) -> Option<Box<dyn Stepper>> {
    let mut pause = PAUSES.0;
    loop {
        let made = catch_unwind(AssertUnwindSafe(|| factory()));
        let mut state = shared.lock();
        if state.phase == Phase::Stopped {
            return None;
        }
        if let Ok(Ok(stepper)) = made {
            state.activity = Activity::Waiting;
            state.stats.restarts += 1;
            return Some(stepper);
        }
        drop(shared.wake.wait_timeout(state, pause));
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// What a panic said.
fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("it panicked: {}", text.unwrap_or("without words"))
}
