//! A thread pool for regions of microseconds: a decode step has about two hundred, each split over all threads.
//!
//! Its threads wait awake for a moment after a region, since the next one is near: waking a thread takes 30 to 50 us, as long
//! as a region. Tasks lie in as many rows as there are threads; a thread takes those of its own row in order, so that it
//! reads memory front to back, then what is left in others'. Nothing locks.
//!
//! ```text
//! row 0   tasks 0 1 2 3   <- the calling thread       a row: next task | number of the region
//! row 1   tasks 4 5 6 7   <- thread 1                 taken by compare-and-swap of both
//! ```

mod shares;

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use rayon::prelude::*;

pub use shares::{Queues, Shares};

/// How long a thread looks for the next region before it sleeps: longer than what lies between two tokens.
const AWAKE: Duration = Duration::from_micros(500);
/// Looks before the core is offered to others between them.
const EAGER: usize = 2000;
/// Bits of a row's state that count its tasks; those above are the number of the region.
const TASK_BITS: u32 = 24;
/// A row that is closed: no task has this number.
const CLOSED: u64 = (1 << TASK_BITS) - 1;

thread_local! {
    /// Within a region: what asks for one there has its tasks done in turn.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Threads that a region is split over, the calling one included: as many as rayon's pool has.
pub fn count() -> usize {
    rayon::current_num_threads()
}

/// Calls `work(i)` for each i below `tasks`, on all threads.
///
/// From within a task, and with a single thread, calls are made in turn. Of regions that two threads ask for at once, rayon has
/// the second.
///
/// # Panics
/// A call panics: then when all others have ended.
pub fn for_each(tasks: usize, work: impl Fn(usize) + Sync) {
    static POOL: OnceLock<Pool> = OnceLock::new();
    if tasks <= 1 || INSIDE.get() || count() == 1 {
        return (0..tasks).for_each(work);
    }
    let pool = POOL.get_or_init(|| Pool::new(count()));
    if tasks as u64 >= CLOSED || !pool.run(tasks, &work) {
        (0..tasks).into_par_iter().with_max_len(1).for_each(&work);
    }
}

/// [`for_each`] over items: `work(i, item)`.
pub fn for_each_mut<T: Send>(items: &mut [T], work: impl Fn(usize, &mut T) + Sync) {
    let all = Pieces::of(items, 1);
    for_each(all.count(), |i| {
        // SAFETY: each i is called once.
        let one = unsafe { all.piece(i) };
        work(i, &mut one[0]);
    });
}

/// [`for_each`] over pieces of `size` items, the last of which may be shorter: `work(i, piece)`.
pub fn pieces_mut<T: Send>(items: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let all = Pieces::of(items, size);
    // SAFETY: each i is called once.
    for_each(all.count(), |i| work(i, unsafe { all.piece(i) }));
}

/// [`pieces_mut`] over two slices at once: `work(i, piece, piece of the other)`, as many as both have.
pub fn pieces_of_two_mut<T: Send, U: Send>(
    (items, size): (&mut [T], usize),
    (others, other_size): (&mut [U], usize),
    work: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let (all, more) = (Pieces::of(items, size), Pieces::of(others, other_size));
    for_each(all.count().min(more.count()), |i| {
        // SAFETY: each i is called once.
        let (piece, other) = unsafe { (all.piece(i), more.piece(i)) };
        work(i, piece, other);
    });
}

/// What `work(i)` returns for each i below `tasks`, in order.
pub fn map<T: Send>(tasks: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..tasks).map(|_| None).collect();
    for_each_mut(&mut results, |i, to| *to = Some(work(i)));
    results.into_iter().flatten().collect()
}

/// A slice in pieces that different threads write to.
struct Pieces<T> {
    data: *mut T,
    len: usize,
    size: usize,
}

// SAFETY: a piece has one user at a time, which `piece` demands; items may pass to other threads.
unsafe impl<T: Send> Sync for Pieces<T> {}

impl<T> Pieces<T> {
    fn of(items: &mut [T], size: usize) -> Self {
        assert!(size > 0, "pieces have a size");
        Pieces { data: items.as_mut_ptr(), len: items.len(), size }
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    /// # Safety
    /// The slice is borrowed for as long as the piece is used, and nothing else asks for piece i.
    #[expect(clippy::mut_from_ref, reason = "each piece has one user")]
    unsafe fn piece(&self, i: usize) -> &mut [T] {
        let start = i * self.size;
        assert!(start < self.len);
        // SAFETY: within the slice, and apart from all other pieces.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), self.size.min(self.len - start)) }
    }
}

/// A region's work: a closure without its type.
#[derive(Clone, Copy)]
struct Work {
    data: *mut (),
    /// `unsafe fn(*const (), usize)`, a task of `data`.
    call: *mut (),
}

/// Calls a closure by its address.
///
/// # Safety
/// `data` is a living `F`.
unsafe fn call<F: Fn(usize)>(data: *const (), task: usize) {
    // SAFETY: the caller's promise.
    unsafe { (*data.cast::<F>())(task) }
}

/// One to a cache line or two, whatever the CPU fetches at once.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

/// What all threads see.
struct Shared {
    /// By thread: the number of the region, and how many of the row's tasks are taken.
    rows: Vec<Line<AtomicU64>>,
    /// Regions begun; what waiting threads watch.
    region: Line<AtomicU64>,
    /// Tasks that have not ended.
    left: Line<AtomicUsize>,
    /// The region's work: read by who may then take a task only if the row is still of the same region.
    data: AtomicPtr<()>,
    call: AtomicPtr<()>,
    tasks: AtomicUsize,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: Vec<Line<AtomicBool>>,
    stop: AtomicBool,
}

impl Shared {
    /// Takes the next task of a row.
    fn take(&self, row: usize) -> Option<(Work, usize)> {
        let threads = self.rows.len();
        let state = &self.rows[row].0;
        let mut seen = state.load(Ordering::Acquire);
        loop {
            let tasks = self.tasks.load(Ordering::Relaxed);
            let work = Work { data: self.data.load(Ordering::Relaxed), call: self.call.load(Ordering::Relaxed) };
            let taken = seen & CLOSED;
            let task = row * tasks / threads + taken as usize;
            if taken == CLOSED || task >= (row + 1) * tasks / threads {
                return None;
            }
            // Rows are closed before another region's work is written. So if any of what was read above is of another
            // region, this row is known to be closed by now, and the exchange fails.
            fence(Ordering::Acquire);
            match state.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some((work, task)),
                Err(now) => seen = now,
            }
        }
    }

    /// Does all tasks that nobody has taken, those of one's own row first.
    fn help(&self, own: usize) {
        let threads = self.rows.len();
        for row in (own..threads).chain(0..own) {
            while let Some((work, task)) = self.take(row) {
                // SAFETY: `call` was made from such a function, and the closure lives until `left` is 0, which this task
                // delays until it has ended.
                let done = catch_unwind(AssertUnwindSafe(|| unsafe {
                    std::mem::transmute::<*mut (), unsafe fn(*const (), usize)>(work.call)(work.data, task);
                }));
                if let Err(panic) = done {
                    *self.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
                    self.panicked.store(true, Ordering::Relaxed);
                }
                self.left.0.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// A thread's life.
    fn attend(&self, own: usize) {
        INSIDE.set(true);
        let mut seen = 0;
        while self.next_region(own, &mut seen) {
            self.help(own);
        }
    }

    /// Waits until a region has begun that was not seen yet; false when there will be none.
    fn next_region(&self, own: usize, seen: &mut u64) -> bool {
        let (mut looks, mut since) = (0, None);
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return false;
            }
            let now = self.region.0.load(Ordering::Acquire);
            if now != *seen {
                *seen = now;
                return true;
            }
            looks += 1;
            if looks < EAGER {
                std::hint::spin_loop();
                continue;
            }
            std::thread::yield_now();
            if since.get_or_insert_with(Instant::now).elapsed() > AWAKE {
                self.sleep(own, *seen);
                (looks, since) = (0, None);
            }
        }
    }

    fn sleep(&self, own: usize, seen: u64) {
        let asleep = &self.asleep[own].0;
        asleep.store(true, Ordering::SeqCst);
        // Either this thread sees a new region, or who begins it sees this thread asleep.
        while self.region.0.load(Ordering::SeqCst) == seen && asleep.load(Ordering::SeqCst) {
            std::thread::park();
        }
        asleep.store(false, Ordering::SeqCst);
    }
}

/// Some threads, and the one that asks.
struct Pool {
    shared: Arc<Shared>,
    threads: Vec<(Thread, Option<JoinHandle<()>>)>,
    /// Held by who has a region.
    busy: AtomicBool,
}

impl Pool {
    /// `threads` in all. Fewer where the system gives no more.
    fn new(threads: usize) -> Pool {
        let rows = |n| (0..n).map(|_| Line(AtomicU64::new(CLOSED))).collect();
        let shared = Arc::new(Shared {
            rows: rows(threads),
            region: Line::default(),
            left: Line::default(),
            data: AtomicPtr::default(),
            call: AtomicPtr::default(),
            tasks: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            asleep: (0..threads).map(|_| Line::default()).collect(),
            stop: AtomicBool::new(false),
        });
        let thread = |i: usize| {
            let shared = shared.clone();
            let handle =
                std::thread::Builder::new().name(format!("kvquant {i}")).spawn(move || shared.attend(i)).ok()?;
            Some((handle.thread().clone(), Some(handle)))
        };
        // A row whose thread could not be made is worked on by the others.
        let threads = (1..threads).map_while(thread).collect();
        Pool { shared, threads, busy: AtomicBool::new(false) }
    }

    /// Calls all tasks, unless somebody else's are under way: then nothing is called, and false returned.
    fn run<F: Fn(usize) + Sync>(&self, tasks: usize, work: &F) -> bool {
        let s = &*self.shared;
        if self.busy.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return false;
        }
        let region = s.region.0.load(Ordering::Relaxed) + 1;
        let state = region << TASK_BITS;
        for row in &s.rows {
            row.0.store(state | CLOSED, Ordering::Relaxed);
        }
        fence(Ordering::Release);
        s.data.store(std::ptr::from_ref(work).cast_mut().cast(), Ordering::Relaxed);
        s.call.store(call::<F> as *mut (), Ordering::Relaxed);
        s.tasks.store(tasks, Ordering::Relaxed);
        s.left.0.store(tasks, Ordering::Relaxed);
        for row in &s.rows {
            row.0.store(state, Ordering::Release);
        }
        s.region.0.store(region, Ordering::SeqCst);
        for (i, (thread, _)) in self.threads.iter().enumerate() {
            if s.asleep[i + 1].0.load(Ordering::SeqCst) && s.asleep[i + 1].0.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        INSIDE.set(true);
        s.help(0);
        INSIDE.set(false);
        let mut looks = 0;
        while s.left.0.load(Ordering::Acquire) > 0 {
            looks += 1;
            if looks < EAGER { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = if s.panicked.swap(false, Ordering::Relaxed) {
            s.panic.lock().unwrap_or_else(|e| e.into_inner()).take()
        } else {
            None
        };
        self.busy.store(false, Ordering::Release);
        match panic {
            Some(panic) => resume_unwind(panic),
            None => true,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.region.0.fetch_add(1, Ordering::SeqCst);
        for (thread, handle) in &mut self.threads {
            thread.unpark();
            // A thread that ends by a panic has nothing to say here.
            let _ = handle.take().map(JoinHandle::join);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once() {
        for threads in [2, 3, 7] {
            let pool = Pool::new(threads);
            for round in 0..2000 {
                let tasks = 1 + round % 37;
                let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                assert!(pool.run(tasks, &|i: usize| {
                    done[i].fetch_add(1, Ordering::Relaxed);
                }));
                assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1), "{threads} threads, round {round}");
            }
        }
    }

    #[test]
    fn threads_that_sleep_are_woken() {
        let pool = Pool::new(3);
        for _ in 0..3 {
            std::thread::sleep(4 * AWAKE);
            let both = std::sync::Barrier::new(3);
            // Ends only if each of three threads takes a task.
            assert!(pool.run(3, &|_| {
                both.wait();
            }));
        }
    }

    #[test]
    fn all_threads_work_on_uneven_rows() {
        let pool = Pool::new(2);
        let both = std::sync::Barrier::new(2);
        // The first row has tasks 0 and 1: the second thread has to take one of them too.
        assert!(pool.run(4, &|i| {
            if i < 2 {
                both.wait();
            }
        }));
    }

    #[test]
    fn a_panic_arrives_when_all_tasks_have_ended() {
        let pool = Pool::new(2);
        let ended = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|i: usize| {
                assert!(i != 3, "the third");
                ended.fetch_add(1, Ordering::Relaxed);
            })
        }));
        assert!(result.is_err());
        assert_eq!(ended.load(Ordering::Relaxed), 7);
        assert!(pool.run(8, &|_| {}), "and the pool goes on");
    }

    #[test]
    fn regions_within_regions_and_of_several_threads() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 1..200usize {
                        let sums = map(n, |i| map(i, |j| j).into_iter().sum::<usize>());
                        assert_eq!(sums, (0..n).map(|i| i * i.saturating_sub(1) / 2).collect::<Vec<_>>());
                    }
                });
            }
        });
    }

    #[test]
    fn pieces_cover_a_slice() {
        let (mut a, mut b) = (vec![0usize; 1001], vec![0usize; 101]);
        pieces_of_two_mut((&mut a, 10), (&mut b, 1), |i, a, b| {
            a.fill(i);
            b.fill(a.len());
        });
        assert!(a.iter().enumerate().all(|(at, &x)| x == at / 10));
        assert_eq!((b[0], b[100]), (10, 1));
        pieces_mut(&mut a, 1000, |i, piece| piece.fill(i + piece.len()));
        assert_eq!((a[0], a[1000]), (1000, 2));
        pieces_mut(&mut [0u8; 0], 3, |_, _| unreachable!());
    }
}
