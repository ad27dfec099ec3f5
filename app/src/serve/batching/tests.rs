//! The batcher on a stand-in for the program.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use models::{Objective, Solver, SolverKind};

use super::curve::Point;
use super::order::Sample;
use super::*;

const VALUES: usize = 4;
/// For anything that takes milliseconds: a loaded machine passes, a hang is seen.
const LONG: Duration = Duration::from_secs(20);

/// What a stand-in does instead of a step.
#[derive(Default)]
struct Behaviour {
    pause: Duration,
    fail_next: AtomicBool,
    panic_next: AtomicBool,
    broken: AtomicBool,
    made: AtomicUsize,
    widest: AtomicUsize,
}

struct Fake(Arc<Behaviour>);

impl Stepper for Fake {
    fn step(&mut self, _: usize, bucket: usize, slots: &mut [Slot]) -> anyhow::Result<()> {
        let rows = slots.iter().map(Slot::rows).sum();
        assert!(rows <= bucket);
        self.0.widest.fetch_max(rows, Ordering::Relaxed);
        std::thread::sleep(self.0.pause);
        anyhow::ensure!(!self.0.fail_next.swap(false, Ordering::Relaxed), "out of order");
        assert!(!self.0.panic_next.swap(false, Ordering::Relaxed), "the step panicked");
        for slot in slots {
            slot.x.resize(VALUES, slot.seed as f32);
            for v in &mut slot.x {
                *v = *v * 0.5 + slot.label as f32 + if slot.seed == 666 { f32::NAN } else { 0.0 };
            }
            slot.preview = slot.wants_preview.then(|| slot.x.clone());
            slot.done += 1;
        }
        Ok(())
    }
}

fn batcher(behaviour: &Arc<Behaviour>, limit: u64) -> Batcher {
    let batcher = Batcher::new();
    let made = behaviour.clone();
    let factory: Factory = Arc::new(move || {
        anyhow::ensure!(!made.broken.load(Ordering::Relaxed), "no memory");
        made.made.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Fake(made.clone())) as Box<dyn Stepper>)
    });
    let points = [1, 2, 4, 8].map(|rows| Point { rows, seconds: 1e-3 * rows as f64 }).to_vec();
    batcher.open(&[Lot { curve: Curve { points }, limit }], &factory).unwrap();
    batcher
}

fn order(steps: usize, guidance: f32, seeds: &[u64]) -> Order {
    let plan = Solver::new(SolverKind::Euler, steps).plan(Objective::Flow, false).unwrap();
    let sample = |seed: &u64| Sample { label: 3, seed: *seed, start: None };
    Order {
        model: 0,
        samples: seeds.iter().map(sample).collect(),
        plan: Arc::new(plan),
        guidance,
        previews: 0,
        deadline: None,
    }
}

fn submit(batcher: &Batcher, order: Order) -> Result<(OrderId, Receiver<Event>), Refusal> {
    let (sender, receiver) = channel();
    let id = batcher.submit(order, Box::new(move |event| drop(sender.send(event))))?;
    Ok((id, receiver))
}

/// All events of an order; it ends.
fn events(receiver: &Receiver<Event>) -> Vec<Event> {
    let mut all = Vec::new();
    loop {
        let event = receiver.recv_timeout(LONG).expect("no event");
        let last = matches!(event, Event::Finished(_) | Event::Failed(_));
        all.push(event);
        if last {
            assert!(receiver.recv_timeout(Duration::from_millis(1)).is_err(), "an event after the last");
            return all;
        }
    }
}

fn failure(receiver: &Receiver<Event>) -> Failure {
    match events(receiver).pop() {
        Some(Event::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

fn images(receiver: &Receiver<Event>) -> Vec<Vec<f32>> {
    let mut all: Vec<(usize, Vec<f32>)> = events(receiver)
        .into_iter()
        .filter_map(|e| match e {
            Event::Image { sample, values } => Some((sample, values)),
            Event::Failed(failure) => panic!("{failure}"),
            _ => None,
        })
        .collect();
    all.sort_by_key(|(sample, _)| *sample);
    all.into_iter().map(|(_, values)| values).collect()
}

fn expected(steps: usize, seed: u64) -> Vec<f32> {
    let value = (0..steps).fold(seed as f32, |v, _| v * 0.5 + 3.0);
    vec![value; VALUES]
}

#[test]
fn many_orders_at_once_get_their_own_images() {
    let behaviour = Arc::new(Behaviour { pause: Duration::from_micros(200), ..Behaviour::default() });
    let batcher = batcher(&behaviour, 1_000_000);
    let mixes = (0..40).map(|i| {
        let (steps, guidance) = (1 + i % 7 * 4, if i % 2 == 0 { 1.0 } else { 2.0 });
        let seeds: Vec<u64> = (0..=i as u64 % 3).map(|k| 10 * i as u64 + k).collect();
        (steps, submit(&batcher, order(steps, guidance, &seeds)).unwrap().1, seeds)
    });
    for (steps, receiver, seeds) in mixes.collect::<Vec<_>>() {
        let want: Vec<_> = seeds.iter().map(|s| expected(steps, *s)).collect();
        assert_eq!(images(&receiver), want);
    }
    assert!(behaviour.widest.load(Ordering::Relaxed) > 4, "orders share batches");
    assert!(batcher.drained(LONG));
    let stats = batcher.stats();
    assert_eq!((stats.finished, batcher.load()[0].waiting), (40, 0));
    assert!(stats.rows_used <= stats.rows_run);
    batcher.stop();
}

#[test]
fn events_of_an_image_come_in_order_with_the_previews_asked_for() {
    let behaviour = Arc::default();
    let batcher = batcher(&behaviour, 1000);
    let wanted = Order { previews: 3, ..order(8, 1.0, &[5]) };
    let all = events(&submit(&batcher, wanted).unwrap().1);
    let steps: Vec<usize> = all
        .iter()
        .filter_map(|e| if let Event::Step { done, .. } = e { Some(*done) } else { None })
        .collect();
    assert_eq!(steps, (1..=8).collect::<Vec<_>>());
    let previews: Vec<(usize, usize)> = all
        .iter()
        .filter_map(|e| if let Event::Preview { index, done, .. } = e { Some((*index, *done)) } else { None })
        .collect();
    assert_eq!(previews, [(0, 2), (1, 4), (2, 6)]);
    assert!(matches!(all[all.len() - 2..], [Event::Image { .. }, Event::Finished(_)]));
}

#[test]
fn a_full_queue_refuses_and_takes_again() {
    let behaviour = Arc::new(Behaviour { pause: Duration::from_millis(2), ..Behaviour::default() });
    let batcher = batcher(&behaviour, 100);
    let (_, first) = submit(&batcher, order(12, 1.0, &[1, 2, 3, 4, 5, 6, 7])).unwrap();
    // The batch has eight rows: it finds one free.
    let (_, second) = submit(&batcher, order(40, 1.0, &[1])).unwrap();
    let refused = submit(&batcher, order(20, 1.0, &[1])).unwrap_err();
    assert!(matches!(refused, Refusal::Full { limit: 100, work: 20, .. }), "{refused}");
    images(&first);
    images(&second);
    assert!(batcher.drained(LONG));
    images(&submit(&batcher, order(20, 1.0, &[1])).unwrap().1);
    assert_eq!(batcher.stats().refused["full"], 1);
}

#[test]
fn a_cancelled_order_frees_its_place_at_once() {
    let behaviour = Arc::new(Behaviour { pause: Duration::from_millis(5), ..Behaviour::default() });
    let batcher = batcher(&behaviour, 100_000);
    let (id, receiver) = submit(&batcher, order(1000, 2.0, &[1, 2, 3])).unwrap();
    assert!(matches!(receiver.recv_timeout(LONG), Ok(Event::Step { .. })));
    batcher.cancel(id);
    assert_eq!(batcher.load()[0].waiting, 0);
    let run = batcher.stats().rows_run;
    assert_eq!(failure(&receiver), Failure::Cancelled);
    std::thread::sleep(Duration::from_millis(50));
    assert!(batcher.stats().rows_run - run <= 8, "at most the step that was being made");
    batcher.cancel(id);
    assert_eq!(batcher.stats().failed["cancelled"], 1);
}

#[test]
fn a_deadline_ends_an_order_between_steps() {
    let behaviour = Arc::new(Behaviour { pause: Duration::from_millis(5), ..Behaviour::default() });
    let batcher = batcher(&behaviour, 100_000);
    let deadline = Some(Instant::now() + Duration::from_millis(40));
    let (_, receiver) = submit(&batcher, Order { deadline, ..order(1000, 1.0, &[1]) }).unwrap();
    assert_eq!(failure(&receiver), Failure::Deadline);
    assert!(batcher.drained(Duration::ZERO));
}

#[test]
fn a_fault_fails_its_batch_alone_and_the_engine_starts_anew() {
    let behaviour = Arc::new(Behaviour { pause: Duration::from_millis(1), ..Behaviour::default() });
    let batcher = batcher(&behaviour, 100_000);
    for (flag, word) in [(&behaviour.fail_next, "out of order"), (&behaviour.panic_next, "the step panicked")]
    {
        flag.store(true, Ordering::Relaxed);
        let (_, receiver) = submit(&batcher, order(50, 1.0, &[1])).unwrap();
        let Failure::Engine(text) = failure(&receiver) else { panic!("not an engine failure") };
        assert!(text.contains(word), "{text}");
        // The engine may still be restarting.
        let (_, next) = until_accepted(&batcher, || order(5, 1.0, &[9]));
        assert_eq!(images(&next), [expected(5, 9)]);
    }
    let stats = batcher.stats();
    assert_eq!((stats.faults, stats.restarts, behaviour.made.load(Ordering::Relaxed)), (2, 2, 3));
}

fn until_accepted(batcher: &Batcher, order: impl Fn() -> Order) -> (OrderId, Receiver<Event>) {
    let start = Instant::now();
    loop {
        match submit(batcher, order()) {
            Ok(accepted) => return accepted,
            Err(Refusal::Loading) if start.elapsed() < LONG => std::thread::sleep(Duration::from_millis(5)),
            Err(refusal) => panic!("{refusal}"),
        }
    }
}

#[test]
fn while_the_engine_cannot_be_made_orders_are_refused() {
    let behaviour = Arc::<Behaviour>::default();
    let batcher = batcher(&behaviour, 100_000);
    behaviour.broken.store(true, Ordering::Relaxed);
    behaviour.fail_next.store(true, Ordering::Relaxed);
    assert!(matches!(failure(&submit(&batcher, order(5, 1.0, &[1])).unwrap().1), Failure::Engine(_)));
    assert_eq!(submit(&batcher, order(5, 1.0, &[1])).unwrap_err(), Refusal::Loading);
    behaviour.broken.store(false, Ordering::Relaxed);
    let (_, receiver) = until_accepted(&batcher, || order(5, 1.0, &[1]));
    assert_eq!(images(&receiver), [expected(5, 1)]);
}

#[test]
fn an_image_that_is_not_finite_fails_its_order_alone() {
    let behaviour = Arc::default();
    let batcher = batcher(&behaviour, 100_000);
    let (_, bad) = submit(&batcher, order(5, 1.0, &[1, 666])).unwrap();
    let (_, good) = submit(&batcher, order(5, 1.0, &[1])).unwrap();
    assert_eq!(failure(&bad), Failure::NotFinite(1));
    assert_eq!(images(&good), [expected(5, 1)]);
}

#[test]
fn draining_finishes_what_was_accepted_and_stopping_fails_the_rest() {
    let behaviour = Arc::new(Behaviour { pause: Duration::from_millis(1), ..Behaviour::default() });
    let draining = batcher(&behaviour, 100_000);
    let (_, receiver) = submit(&draining, order(30, 1.0, &[1])).unwrap();
    draining.close();
    assert_eq!(submit(&draining, order(5, 1.0, &[1])).unwrap_err(), Refusal::Draining);
    assert!(draining.drained(LONG));
    assert_eq!(images(&receiver), [expected(30, 1)]);
    draining.stop();
    assert_eq!(draining.phase(), Phase::Stopped);

    let stopping = batcher(&behaviour, 1_000_000);
    let (_, receiver) = submit(&stopping, order(1000, 1.0, &[1])).unwrap();
    stopping.close();
    assert!(!stopping.drained(Duration::from_millis(20)));
    stopping.stop();
    assert_eq!(failure(&receiver), Failure::Stopped);
}

#[test]
fn the_probe_finds_a_stepper_that_looks_at_its_neighbours() {
    struct Company(bool);
    impl Stepper for Company {
        fn step(&mut self, _: usize, bucket: usize, slots: &mut [Slot]) -> anyhow::Result<()> {
            let company = if self.0 && bucket > 4 { slots.len() as f32 * 1e-3 } else { 0.0 };
            for slot in slots {
                slot.x = vec![slot.seed as f32 + slot.guidance + company; VALUES];
            }
            Ok(())
        }
    }
    let judge = |bad, deterministic| {
        probe::probe(&mut Company(bad), 0, probe::REFERENCE, &[1, 2, 4, 8], VALUES, true, deterministic)
            .unwrap()
    };
    let good = judge(false, true);
    assert!(good.exact && good.buckets == [1, 2, 4, 8] && good.compared > 20, "{good:?}");
    let kept = judge(true, true);
    assert!(kept.exact && kept.buckets == [1, 2, 4] && kept.other_bits[&8] > 0.0, "{kept:?}");
    let all = judge(true, false);
    assert!(!all.exact && all.buckets == [1, 2, 4, 8], "{all:?}");
}
