//! Work in parts that differ in size, of which each thread has a row, for threads that keep something from part to part: a thread
//! asks for the next part of its own row, then of others'.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Line;

/// Numbers, each of which one thread gets.
#[derive(Debug)]
pub struct Shares(Vec<Row>);

#[derive(Debug)]
struct Row {
    next: Line<AtomicUsize>,
    end: usize,
}

impl Shares {
    /// Rows of numbers, one a thread.
    pub fn new(rows: impl IntoIterator<Item = Range<usize>>) -> Shares {
        Shares(rows.into_iter().map(|r| Row { next: Line(AtomicUsize::new(r.start)), end: r.end }).collect())
    }

    /// The next number for a thread; none when all are taken.
    pub fn take(&self, thread: usize) -> Option<usize> {
        (thread..self.0.len()).chain(0..thread).find_map(|row| {
            let Row { next, end } = &self.0[row];
            // Who has looked at a row at its end may look again: no counter gets far beyond it.
            let taken = next.0.fetch_add(1, Ordering::Relaxed);
            (taken < *end).then_some(taken)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_taken_once() {
        for (n, threads) in [(0, 1), (1, 3), (1000, 1), (1001, 2), (5000, 5)] {
            let shares = Shares::new((0..threads).map(|t| t * n / threads..(t + 1) * n / threads));
            let taken: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let (shares, taken) = (&shares, &taken);
                    scope.spawn(move || {
                        while let Some(i) = shares.take(thread) {
                            taken[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
            assert!(taken.iter().all(|t| t.load(Ordering::Relaxed) == 1), "{n} numbers, {threads} threads");
        }
    }

    #[test]
    fn ones_own_come_first() {
        let shares = Shares::new([0..2, 2..4, 4..5]);
        assert_eq!([1, 1, 1, 1, 2, 0].map(|t| shares.take(t)), [Some(2), Some(3), Some(4), Some(0), Some(1), None]);
    }
}
