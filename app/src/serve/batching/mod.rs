//! Step-level batching: images of many orders share a batch, and come and go at the border of every step.
//!
//! | module | holds |
//! |---|---|
//! | [`order`] | what is asked for, what happens to it |
//! | `schedule` | who makes the next step |
//! | `backlog` | how much work is accepted |
//! | [`curve`] | the measured step time over the batch size |
//! | [`stepper`] | the state of an image, and one step of a batch |
//! | [`probe`] | whether an image depends on its neighbours |
//! | `worker` | the thread that makes steps |
//! | [`stats`] | counters |
//!
//! It knows no HTTP: orders come by [`Batcher::submit`], events go to a function.

mod backlog;
pub mod curve;
pub mod order;
pub mod probe;
mod schedule;
pub mod stats;
pub mod stepper;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use backlog::Backlog;
use curve::Curve;
use order::{Cost, Event, Failure, Order, Refusal, Sink};
use schedule::{OrderId, Pick, Schedule};
use stats::{Load, Stats};
use stepper::{Slot, Stepper};

/// Makes the stepper; called again after a fault.
pub type Factory = Arc<dyn Fn() -> anyhow::Result<Box<dyn Stepper>> + Send + Sync>;

/// One model as the batcher sees it.
#[derive(Clone, Debug)]
pub struct Lot {
    /// Step times of the batch sizes that there are programs for.
    pub curve: Curve,
    /// Most image-steps that are accepted beyond what fits into the largest batch.
    pub limit: u64,
}

/// Where the batcher is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Takes nothing yet.
    Loading,
    /// Takes orders.
    Serving,
    /// Finishes what it has.
    Draining,
    /// Computes nothing any more.
    Stopped,
}

/// Takes orders and gives their images. Clones are handles of the same batcher.
#[derive(Clone)]
pub struct Batcher {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Batcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batcher").field("phase", &self.phase()).finish_non_exhaustive()
    }
}

struct Shared {
    state: Mutex<State>,
    /// There is work, or the phase changed.
    wake: Condvar,
    /// An order ended.
    ended: Condvar,
}

struct State {
    phase: Phase,
    schedule: Schedule,
    live: HashMap<OrderId, Live>,
    models: Vec<(Curve, Backlog)>,
    activity: Activity,
    worker: Option<JoinHandle<()>>,
    next: OrderId,
    stats: Stats,
}

/// What the worker does, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    Waiting,
    Stepping(Instant),
    Restarting,
}

/// An accepted order.
struct Live {
    order: Order,
    /// Images that are not in a batch right now and not ready yet.
    slots: Vec<Option<Slot>>,
    left: usize,
    /// Image-steps that are not done.
    work: u64,
    sink: Sink,
    accepted: Instant,
    started: Option<Instant>,
    /// Batches that its images were in, and their rows in use.
    batches: (u64, u64),
}

impl Batcher {
    /// A batcher that takes nothing until [`Batcher::open`].
    pub fn new() -> Self {
        let state = State {
            phase: Phase::Loading,
            schedule: Schedule::default(),
            live: HashMap::new(),
            models: Vec::new(),
            activity: Activity::Waiting,
            worker: None,
            next: 0,
            stats: Stats::default(),
        };
        let shared = Shared { state: Mutex::new(state), wake: Condvar::new(), ended: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }

    /// Starts the thread that makes steps of these models, and takes orders from now on.
    ///
    /// # Errors
    /// The stepper cannot be made, or the thread cannot be started.
    pub fn open(&self, models: &[Lot], factory: &Factory) -> anyhow::Result<()> {
        let stepper = factory()?;
        let mut state = self.shared.lock();
        state.models = models
            .iter()
            .map(|lot| {
                let backlog = Backlog::new(lot.limit, lot.curve.rate(), lot.curve.largest() as u64);
                (lot.curve.clone(), backlog)
            })
            .collect();
        let (shared, factory) = (self.shared.clone(), factory.clone());
        let run = move || worker::run(&shared, stepper, &factory);
        state.worker = Some(std::thread::Builder::new().name("steps".into()).spawn(run)?);
        if state.phase == Phase::Loading {
            state.phase = Phase::Serving;
        }
        Ok(())
    }

    /// Accepts an order; `sink` is then told what happens to it.
    ///
    /// # Errors
    /// [`Refusal`]; the sink is not called.
    pub fn submit(&self, order: Order, sink: Sink) -> Result<OrderId, Refusal> {
        let mut state = self.shared.lock();
        let state = &mut *state;
        if let Err(refusal) = state.accept(&order) {
            *state.stats.refused.entry(refusal.reason()).or_default() += 1;
            return Err(refusal);
        }
        let id = state.next;
        state.next += 1;
        let slot = |sample: &order::Sample| {
            Some(Slot {
                seed: sample.seed,
                guidance: order.guidance,
                plan: order.plan.clone(),
                x: sample.start.clone().unwrap_or_default(),
                ..Slot::still(sample.label)
            })
        };
        let cost = state.models[order.model].0.row_seconds();
        state.schedule.add(id, order.model, order.rows(), cost, order.samples.len());
        let live = Live {
            slots: order.samples.iter().map(slot).collect(),
            left: order.samples.len(),
            work: order.work(),
            sink,
            accepted: Instant::now(),
            started: None,
            batches: (0, 0),
            order,
        };
        state.live.insert(id, live);
        self.shared.wake.notify_all();
        Ok(id)
    }

    /// Gives an order up: no further step of it is made. One that has ended stays as it is.
    pub fn cancel(&self, id: OrderId) {
        let mut state = self.shared.lock();
        state.fail(id, Failure::Cancelled);
        self.shared.ended.notify_all();
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.shared.lock().phase
    }

    /// Takes no more orders.
    pub fn close(&self) {
        let mut state = self.shared.lock();
        if state.phase != Phase::Stopped {
            state.phase = Phase::Draining;
        }
    }

    /// Waits until all accepted orders have ended; whether they did in time.
    pub fn drained(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.shared.lock();
        while !state.live.is_empty() {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return false };
            let waited = self.shared.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Fails what is left and ends the worker.
    pub fn stop(&self) {
        let mut state = self.shared.lock();
        state.phase = Phase::Stopped;
        let all: Vec<OrderId> = state.live.keys().copied().collect();
        for id in all {
            state.fail(id, Failure::Stopped);
        }
        let worker = state.worker.take();
        drop(state);
        self.shared.wake.notify_all();
        self.shared.ended.notify_all();
        if let Some(worker) = worker {
            // It catches panics itself; one that died anyway has nothing left to end.
            let _ = worker.join();
        }
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.shared.lock().stats.clone()
    }

    /// The work of each model.
    pub fn load(&self) -> Vec<Load> {
        let state = self.shared.lock();
        let load = |(_, b): &(Curve, Backlog)| Load {
            waiting: b.waiting(),
            limit: b.limit(),
            rate: b.rate(),
            fill: b.fill(),
        };
        state.models.iter().map(load).collect()
    }

    /// Orders that are not ended.
    pub fn orders(&self) -> usize {
        self.shared.lock().live.len()
    }

    /// Whether steps are being made: the worker is not stuck in one for `limit`.
    pub fn is_alive(&self, limit: Duration) -> bool {
        let state = self.shared.lock();
        let stuck = matches!(state.activity, Activity::Stepping(since) if since.elapsed() > limit);
        match state.phase {
            Phase::Loading => true,
            Phase::Stopped => false,
            Phase::Serving | Phase::Draining => !stuck,
        }
    }
}

impl Default for Batcher {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn accept(&mut self, order: &Order) -> Result<(), Refusal> {
        match self.phase {
            Phase::Loading => return Err(Refusal::Loading),
            Phase::Draining | Phase::Stopped => return Err(Refusal::Draining),
            Phase::Serving => {}
        }
        if self.activity == Activity::Restarting {
            return Err(Refusal::Loading);
        }
        self.models[order.model].1.accept(order.work(), order.all_rows(), Instant::now())
    }

    /// Ends an order with a failure and frees what it holds.
    fn fail(&mut self, id: OrderId, failure: Failure) {
        let Some(live) = self.live.remove(&id) else { return };
        self.schedule.remove(id);
        let rows = (live.left * live.order.rows()) as u64;
        self.models[live.order.model].1.release(live.work, rows);
        *self.stats.failed.entry(failure.reason()).or_default() += 1;
        self.stats.orders.entry(live.order.model).or_default().failed.note(live.accepted.elapsed());
        (live.sink)(Event::Failed(failure));
    }

    /// The next batch, its images taken out of their orders.
    fn take(&mut self) -> Option<(Pick, usize, Vec<Slot>)> {
        let now = Instant::now();
        let late = |live: &Live| live.order.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<OrderId> = self.live.iter().filter(|(_, l)| late(l)).map(|(id, _)| *id).collect();
        for id in late {
            self.fail(id, Failure::Deadline);
        }
        let (schedule, models) = (&mut self.schedule, &self.models);
        let pick = schedule.pick(|model, ready| models[model].0.target(ready))?;
        let mut slots = Vec::with_capacity(pick.images.len());
        for (id, image) in &pick.images {
            let live = self.live.get_mut(id)?;
            let mut slot = live.slots[*image].take()?;
            if live.started.is_none() {
                live.started = Some(now);
                self.stats.queued.note(now - live.accepted);
                self.stats.orders.entry(pick.model).or_default().queued.note(now - live.accepted);
            }
            slot.wants_preview = live.order.previews_at(slot.done + 1).is_some();
            slots.push(slot);
        }
        let bucket = self.models[pick.model].0.bucket(pick.rows);
        Some((pick, bucket, slots))
    }

    /// Puts images back after their step.
    fn settle(&mut self, pick: &Pick, bucket: usize, slots: Vec<Slot>, took: Duration) {
        let now = Instant::now();
        self.stats.steps.entry((pick.model, bucket)).or_default().note(took);
        self.stats.rows_used += pick.rows as u64;
        self.stats.rows_run += bucket as u64;
        for ((id, image), slot) in pick.images.iter().zip(slots) {
            self.settle_image(*id, *image, slot, pick.rows, now);
        }
    }

    fn settle_image(&mut self, id: OrderId, image: usize, mut slot: Slot, batch: usize, now: Instant) {
        // Nobody waits for it any more.
        let Some(live) = self.live.get_mut(&id) else { return };
        let work = slot.rows() as u64;
        live.work -= work;
        live.batches = (live.batches.0 + 1, live.batches.1 + batch as u64);
        self.models[live.order.model].1.done(work, now);
        let done = slot.done;
        (live.sink)(Event::Step { sample: image, done });
        if let (Some(values), Some(index)) = (slot.preview.take(), live.order.previews_at(done)) {
            (live.sink)(Event::Preview { sample: image, index, done, values });
        }
        if done < slot.plan.steps.len() {
            live.slots[image] = Some(slot);
            self.schedule.ready_again(id, image);
            return;
        }
        if !slot.x.iter().all(|v| v.is_finite()) {
            self.fail(id, Failure::NotFinite(image));
            return;
        }
        self.models[live.order.model].1.release(0, work);
        (live.sink)(Event::Image { sample: image, values: slot.x });
        live.left -= 1;
        self.stats.images += 1;
        let orders = self.stats.orders.entry(live.order.model).or_default();
        orders.images += 1;
        orders.last = Some(SystemTime::now());
        if live.left > 0 {
            return;
        }
        let started = live.started.unwrap_or(now);
        let cost = Cost {
            queued: started - live.accepted,
            computed: now - started,
            rows: live.batches.1 as f64 / live.batches.0.max(1) as f64,
        };
        (live.sink)(Event::Finished(cost));
        self.stats.finished += 1;
        orders.finished.note(now - live.accepted);
        self.stats.total.note(now - live.accepted);
        self.live.remove(&id);
        self.schedule.remove(id);
    }
}
