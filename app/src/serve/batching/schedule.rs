//! Who makes the next step: start-time fair queueing over orders, at the grain of one step of one image.
//!
//! Every order has a virtual time that grows by the compute it gets. The order that got least goes first, so a long
//! order neither starves short ones nor is starved by them; a new one starts at the time of those that run, and none is
//! ahead of them by more than what its last batch gave it.

use std::collections::{BTreeMap, VecDeque};

/// An order's number.
pub(super) type OrderId = u64;

/// Images that are ready for a step, by order.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    entries: BTreeMap<OrderId, Entry>,
    /// Virtual time of the order that was served last.
    clock: f64,
}

#[derive(Debug)]
struct Entry {
    model: usize,
    rows: usize,
    /// Seconds of compute of one row.
    cost: f64,
    ready: VecDeque<usize>,
    time: f64,
}

/// Images of one model that make a step together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pick {
    pub(super) model: usize,
    /// Order and image, in the order of service.
    pub(super) images: Vec<(OrderId, usize)>,
    /// Rows that they take.
    pub(super) rows: usize,
}

impl Schedule {
    pub(super) fn add(&mut self, id: OrderId, model: usize, rows: usize, cost: f64, images: usize) {
        let entry = Entry { model, rows, cost, ready: (0..images).collect(), time: self.clock };
        self.entries.insert(id, entry);
    }

    pub(super) fn remove(&mut self, id: OrderId) {
        self.entries.remove(&id);
    }

    /// An image made its step and has more to go.
    pub(super) fn ready_again(&mut self, id: OrderId, image: usize) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.ready.push_back(image);
        }
    }

    /// The images that are due. `target` says, of a model and the rows that are ready for it, how many rows to take.
    pub(super) fn pick(&mut self, target: impl Fn(usize, usize) -> usize) -> Option<Pick> {
        let mut order: Vec<(f64, OrderId)> =
            self.entries.iter().filter(|(_, e)| !e.ready.is_empty()).map(|(id, e)| (e.time, *id)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let (time, first) = *order.first()?;
        self.clock = self.clock.max(time);
        let model = self.entries[&first].model;
        order.retain(|(_, id)| self.entries[id].model == model);
        let ready = order.iter().map(|(_, id)| self.entries[id].ready.len() * self.entries[id].rows).sum();
        // A guided image needs two rows, and whoever is first must not wait for that.
        let limit = target(model, ready).max(self.entries[&first].rows);
        let mut pick = Pick { model, images: Vec::new(), rows: 0 };
        for (_, id) in order {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            let mut got = 0.0;
            while pick.rows + entry.rows <= limit
                && let Some(image) = entry.ready.pop_front()
            {
                pick.images.push((id, image));
                pick.rows += entry.rows;
                got += entry.cost * entry.rows as f64;
            }
            // From the clock, not from its own time: rows that were free for it are no debt, or newcomers, who start
            // at the clock, would all pass before it.
            if got > 0.0 {
                entry.time = self.clock + got;
            }
            if pick.rows == limit {
                break;
            }
        }
        Some(pick)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs orders (rows, images, steps) that come at a step's number; tells at which step each is done.
    fn finish(orders: &[(u64, usize, usize, usize)], width: usize) -> Vec<u64> {
        let mut schedule = Schedule::default();
        let mut left: BTreeMap<(u64, usize), usize> = BTreeMap::new();
        let mut finished = vec![0; orders.len()];
        for now in 0..100_000 {
            for (id, (at, rows, images, steps)) in orders.iter().enumerate() {
                if *at == now {
                    schedule.add(id as u64, 0, *rows, 1.0, *images);
                    left.extend((0..*images).map(|i| ((id as u64, i), *steps)));
                }
            }
            let Some(pick) = schedule.pick(|_, ready| ready.min(width)) else {
                if left.is_empty() && orders.iter().all(|o| o.0 <= now) {
                    break;
                }
                continue;
            };
            assert!(pick.rows <= width);
            for image in pick.images {
                let steps = left.get_mut(&image).unwrap();
                *steps -= 1;
                finished[image.0 as usize] = now + 1;
                if *steps == 0 {
                    left.remove(&image);
                } else {
                    schedule.ready_again(image.0, image.1);
                }
            }
        }
        assert!(left.is_empty());
        finished
    }

    #[test]
    fn a_long_order_does_not_hold_up_short_ones() {
        // 10 images of 250 guided steps fill the batch; a 10-step image comes in later.
        let done = finish(&[(0, 2, 10, 250), (100, 1, 1, 10)], 8);
        assert!(done[1] - 100 <= 12, "{done:?}");
    }

    #[test]
    fn a_stream_of_short_orders_does_not_starve_a_long_one() {
        // For 1000 steps, short ones ask for all of every batch. The long one, of 250 steps alone, gets its part of
        // that time: if it had to wait, it would not end before step 1250.
        let mut orders = vec![(0, 1, 4, 250)];
        orders.extend((0..200).map(|i| (i * 5, 1, 4, 10)));
        let done = finish(&orders, 8);
        assert!(done[0] <= 1200, "{}", done[0]);
    }

    #[test]
    fn what_was_free_is_no_debt_when_newcomers_fill_the_batches() {
        // Alone at first, the guided order gets two rows of every batch. From step 40 on, unguided ones of the same
        // length come as fast as they can be served: it still gets its part and ends among the first of them.
        let mut orders = vec![(0, 2, 1, 100), (0, 1, 1, 100)];
        orders.extend((0..400).map(|i| (40 + i * 5, 1, 2, 20)));
        let done = finish(&orders, 8);
        assert!(done[0] <= 150, "{}", done[0]);
    }

    #[test]
    fn equal_orders_end_together() {
        let done = finish(&[(0, 2, 4, 20), (0, 2, 4, 20), (0, 2, 4, 20)], 8);
        assert!(done.iter().max().unwrap() - done.iter().min().unwrap() <= 2, "{done:?}");
        assert_eq!(*done.iter().max().unwrap(), 60, "no row is left empty");
    }

    #[test]
    fn the_rest_of_a_batch_is_filled_by_who_fits() {
        let mut schedule = Schedule::default();
        schedule.add(1, 0, 2, 1.0, 3);
        schedule.add(2, 0, 1, 1.0, 3);
        let pick = schedule.pick(|_, _| 5).unwrap();
        assert_eq!((pick.rows, pick.images), (5, vec![(1, 0), (1, 1), (2, 0)]));
        assert_eq!(schedule.pick(|_, ready| ready).unwrap().rows, 4, "the rest is still there");
    }

    #[test]
    fn a_guided_image_is_taken_even_where_one_row_is_the_target() {
        let mut schedule = Schedule::default();
        schedule.add(1, 0, 2, 1.0, 1);
        assert_eq!(schedule.pick(|_, _| 1).unwrap().rows, 2);
        assert!(schedule.pick(|_, _| 1).is_none());
    }

    #[test]
    fn models_share_the_time_and_never_a_batch() {
        let mut schedule = Schedule::default();
        schedule.add(1, 0, 1, 3.0, 2);
        schedule.add(2, 1, 1, 1.0, 2);
        let mut served = [0.0_f64, 0.0];
        for _ in 0..400 {
            let pick = schedule.pick(|_, _| 2).unwrap();
            for (id, image) in pick.images {
                assert_eq!(id as usize, pick.model + 1);
                served[pick.model] += [3.0, 1.0][pick.model];
                schedule.ready_again(id, image);
            }
        }
        assert!((served[0] / served[1] - 1.0).abs() < 0.1, "{served:?}");
    }
}
