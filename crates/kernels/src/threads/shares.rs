//! Items that differ in size, in queues, one a thread, for threads that keep something from item to item: a thread asks for the next
//! of its own queue, then of others'.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Line;

/// The queues: how many of its items each has given. Kept from region to region, so that the next needs no memory.
#[derive(Debug, Default)]
pub struct Queues(Vec<Queue>);

#[derive(Debug)]
struct Queue {
    next: Line<AtomicUsize>,
    end: usize,
}

impl Queues {
    /// Queues that nothing was taken of: each begins where the one before ends.
    ///
    /// # Panics
    /// An end lies before the one before it.
    pub fn set(&mut self, ends: impl IntoIterator<Item = usize>) {
        self.0.clear();
        let mut start = 0;
        for end in ends {
            assert!(start <= end, "queues end in order");
            self.0.push(Queue { next: Line(AtomicUsize::new(start)), end });
            start = end;
        }
    }

    /// Shares out items that lie in these queues.
    ///
    /// # Panics
    /// There are fewer items than the last queue's end.
    pub fn share<'a, T: Send>(&'a self, items: &'a mut [T]) -> Shares<'a, T> {
        assert!(self.0.last().is_none_or(|queue| queue.end <= items.len()), "an item for each number");
        Shares { queues: &self.0, items: items.as_mut_ptr(), of: PhantomData }
    }
}

/// Items of some queues, each of which one thread gets.
pub struct Shares<'a, T> {
    queues: &'a [Queue],
    items: *mut T,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: an item has one user, and may pass to another thread.
unsafe impl<T: Send> Sync for Shares<'_, T> {}

impl<'a, T: Send> Shares<'a, T> {
    /// The next item for a thread; none when all are taken.
    pub fn take(&self, thread: usize) -> Option<&'a mut T> {
        let number = (thread..self.queues.len()).chain(0..thread).find_map(|queue| {
            let Queue { next, end } = &self.queues[queue];
            // Who finds a queue at its end does not look there often: no counter gets far beyond it.
            let taken = next.0.fetch_add(1, Ordering::Relaxed);
            (taken < *end).then_some(taken)
        })?;
        // SAFETY: there are as many items (`Queues::share`), borrowed for 'a; queues do not overlap and their counters only rise, so
        // that nobody else has this number.
        Some(unsafe { &mut *self.items.add(number) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_taken_once() {
        let mut queues = Queues::default();
        for (n, threads) in [(0, 1), (1, 3), (1000, 1), (1001, 2), (5000, 5)] {
            let mut items = vec![0; n];
            queues.set((1..=threads).map(|t| t * n / threads));
            let shares = queues.share(&mut items);
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let shares = &shares;
                    scope.spawn(move || {
                        while let Some(item) = shares.take(thread) {
                            *item += 1;
                        }
                    });
                }
            });
            assert!(items.iter().all(|n| *n == 1), "{n} items, {threads} threads");
        }
    }

    #[test]
    fn ones_own_come_first() {
        let (mut queues, mut items) = (Queues::default(), [0, 1, 2, 3, 4]);
        queues.set([2, 4, 5]);
        let shares = queues.share(&mut items);
        let order = [1, 1, 1, 1, 2, 0].map(|t| shares.take(t).copied());
        assert_eq!(order, [Some(2), Some(3), Some(4), Some(0), Some(1), None]);
    }
}
