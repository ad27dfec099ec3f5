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
pub(super) struct Door {
    places: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// By the order in which they became idle.
    idle: Mutex<BTreeMap<u64, (Instant, Arc<Notify>)>>,
    tickets: AtomicU64,
}

impl Door {
    /// A door to so many places.
    pub(super) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self {
            places: Arc::new(Semaphore::new(places)),
            waiting: Arc::new(Semaphore::new(waiting(places))),
            idle: Mutex::default(),
            // 0 is no ticket.
            tickets: AtomicU64::new(1),
        })
    }

    /// A place, if one is free.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok()
    }

    /// A place, once one is free; idle connections make room.
    pub(super) async fn next_place(&self) -> Option<OwnedSemaphorePermit> {
        self.next(&self.places).await
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

/// One connection at the door.
#[derive(Debug)]
pub(super) struct Seat {
    door: Arc<Door>,
    phase: AtomicU8,
    /// Its key among the idle ones; 0 is none.
    ticket: AtomicU64,
    leave: Arc<Notify>,
}

impl Seat {
    pub(super) fn new(door: &Arc<Door>) -> Arc<Self> {
        let seat = Self {
            door: door.clone(),
            phase: AtomicU8::new(Phase::Idle as u8),
            ticket: AtomicU64::new(0),
            leave: Arc::default(),
        };
        seat.enter(Phase::Idle);
        Arc::new(seat)
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
                let ticket = self.door.tickets.fetch_add(1, Ordering::Relaxed);
                self.ticket.store(ticket, Ordering::Release);
                self.door.idle().insert(ticket, (Instant::now(), self.leave.clone()));
            }
            // It was idle before, and is until its head is complete.
            Phase::Head => {}
            Phase::Asked | Phase::Answered => self.keep(),
        }
    }

    /// It is not asked to leave.
    fn keep(&self) {
        let ticket = self.ticket.swap(0, Ordering::AcqRel);
        self.door.idle().remove(&ticket);
    }

    /// Ends when the connection is to make room, and nothing is lost with it.
    pub(super) async fn asked_to_leave(&self) {
        loop {
            self.leave.notified().await;
            let ticket = self.ticket.load(Ordering::Acquire);
            if ticket != 0 && !self.door.idle().contains_key(&ticket) {
                return;
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.keep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_idle_one_makes_room_and_busy_ones_stay() {
        let door = Door::new(3);
        let seats: Vec<_> = (0..3).map(|_| (door.place().unwrap(), Seat::new(&door))).collect();
        assert!(door.place().is_none());
        // What came just now is left alone.
        door.make_room();
        assert_eq!(door.idle().len(), 3);
        seats[0].1.enter(Phase::Asked);
        seats[1].1.enter(Phase::Head);
        tokio::time::sleep(GRACE).await;
        door.make_room();
        tokio::time::timeout(GRACE, seats[1].1.asked_to_leave()).await.unwrap();
        for kept in [0, 2] {
            let asked = tokio::time::timeout(GRACE / 10, seats[kept].1.asked_to_leave()).await;
            assert!(asked.is_err(), "{kept}");
        }
        // One that is asked to leave and gets a request at the same moment stays, and can be asked again later.
        door.make_room();
        seats[2].1.enter(Phase::Asked);
        assert!(tokio::time::timeout(GRACE / 10, seats[2].1.asked_to_leave()).await.is_err());
        seats[2].1.enter(Phase::Idle);
        let (next, ()) = tokio::join!(door.next_place(), async {
            seats[2].1.asked_to_leave().await;
            drop(seats);
        });
        assert!(next.is_some() && door.idle().is_empty());
    }
}
