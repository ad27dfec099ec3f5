//! Places for connections, and which of the idle ones leaves when all are taken.
//!
//! A connection is idle until the head of a request is complete, and again once the answer is sent: nothing is lost with
//! it then. All others keep their places.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Most connections beside those that have a place: they wait for one, and probes are answered at once.
const MOST_WAITING: usize = 64;
/// What has just come or was just answered is about to ask.
const GRACE: Duration = Duration::from_millis(250);

/// The places of a server.
#[derive(Debug)]
pub(super) struct Places {
    serving: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// By the order in which they became idle.
    idle: Mutex<BTreeMap<u64, (Instant, Arc<Notify>)>>,
    tickets: AtomicU64,
}

impl Places {
    /// So many places.
    pub(super) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self {
            serving: Arc::new(Semaphore::new(places)),
            waiting: Arc::new(Semaphore::new(waiting(places))),
            idle: Mutex::default(),
            // 0 is no ticket.
            tickets: AtomicU64::new(1),
        })
    }

    /// A place, if one is free.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.serving.clone().try_acquire_owned().ok()
    }

    /// A place, once one is free; idle connections make room.
    pub(super) async fn next_place(&self) -> Option<OwnedSemaphorePermit> {
        self.next(&self.serving).await
    }

    /// A place to wait at, once one is free; idle connections make room.
    pub(super) async fn waiting_place(&self) -> Option<OwnedSemaphorePermit> {
        self.next(&self.waiting).await
    }

    async fn next(&self, semaphore: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        let next = semaphore.clone().acquire_owned();
        tokio::pin!(next);
        loop {
            self.make_room();
            if let Ok(place) = tokio::time::timeout(GRACE / 5, &mut next).await {
                // It is never closed.
                return place.ok();
            }
        }
    }

    /// Asks the connection to leave that has been idle longest.
    pub(super) fn make_room(&self) {
        let mut idle = self.idle();
        let first = idle.first_entry().filter(|entry| entry.get().0.elapsed() >= GRACE);
        if let Some(entry) = first {
            entry.remove().1.notify_one();
        }
    }

    fn idle(&self) -> MutexGuard<'_, BTreeMap<u64, (Instant, Arc<Notify>)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connections beside those that have a place, of so many places.
pub(in crate::serve) fn waiting(places: usize) -> usize {
    places.min(MOST_WAITING)
}

/// What a connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Nothing of a request has come.
    Idle,
    /// The head of one has begun.
    Head,
    /// One is being answered.
    Asked,
    /// The answer is made, and perhaps not sent.
    Answered,
}

/// One connection, and the place it has or waits for.
#[derive(Debug)]
pub(super) struct Occupant {
    places: Arc<Places>,
    phase: AtomicU8,
    /// Its key among the idle ones; 0 is none.
    ticket: AtomicU64,
    leave: Arc<Notify>,
}

impl Occupant {
    pub(super) fn new(places: &Arc<Places>) -> Arc<Self> {
        let occupant = Self {
            places: places.clone(),
            phase: AtomicU8::new(Phase::Idle as u8),
            ticket: AtomicU64::new(0),
            leave: Arc::default(),
        };
        occupant.enter(Phase::Idle);
        Arc::new(occupant)
    }

    pub(super) fn phase(&self) -> Phase {
        [Phase::Idle, Phase::Head, Phase::Asked, Phase::Answered]
            [usize::from(self.phase.load(Ordering::Acquire)) % 4]
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
        match phase {
            Phase::Idle => {
                self.keep();
                let ticket = self.places.tickets.fetch_add(1, Ordering::Relaxed);
                self.ticket.store(ticket, Ordering::Release);
                self.places.idle().insert(ticket, (Instant::now(), self.leave.clone()));
            }
            // It was idle before, and is until its head is complete.
            Phase::Head => {}
            Phase::Asked | Phase::Answered => self.keep(),
        }
    }

    /// It is not asked to leave.
    fn keep(&self) {
        let ticket = self.ticket.swap(0, Ordering::AcqRel);
        self.places.idle().remove(&ticket);
    }

    /// Ends when the connection is to make room, and nothing is lost with it.
    pub(super) async fn asked_to_leave(&self) {
        loop {
            self.leave.notified().await;
            let ticket = self.ticket.load(Ordering::Acquire);
            if ticket != 0 && !self.places.idle().contains_key(&ticket) {
                return;
            }
        }
    }
}

impl Drop for Occupant {
    fn drop(&mut self) {
        self.keep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_idle_one_makes_room_and_busy_ones_stay() {
        let places = Places::new(3);
        let occupants: Vec<_> = (0..3).map(|_| (places.place().unwrap(), Occupant::new(&places))).collect();
        assert!(places.place().is_none());
        // What came just now is left alone.
        places.make_room();
        assert_eq!(places.idle().len(), 3);
        occupants[0].1.enter(Phase::Asked);
        occupants[1].1.enter(Phase::Head);
        tokio::time::sleep(GRACE).await;
        places.make_room();
        tokio::time::timeout(GRACE, occupants[1].1.asked_to_leave()).await.unwrap();
        for kept in [0, 2] {
            let asked = tokio::time::timeout(GRACE / 10, occupants[kept].1.asked_to_leave()).await;
            assert!(asked.is_err(), "{kept}");
        }
        // One that is asked to leave and gets a request at the same moment stays, and can be asked again later.
        places.make_room();
        occupants[2].1.enter(Phase::Asked);
        assert!(tokio::time::timeout(GRACE / 10, occupants[2].1.asked_to_leave()).await.is_err());
        occupants[2].1.enter(Phase::Idle);
        let (next, ()) = tokio::join!(places.next_place(), async {
            occupants[2].1.asked_to_leave().await;
            drop(occupants);
        });
        assert!(next.is_some() && places.idle().is_empty());
    }
}
