//! Spans of memory from the system, and which parts of them are free.

use std::alloc::{Layout, handle_alloc_error};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

/// Bytes of a large page, and of a span at least.
const LARGE: usize = 2 << 20;
/// Pieces of the greatest size that a span has room for: what is left behind the last is less than a part of it in as many.
const PIECES: usize = 16;
/// Bytes of a span at most, but for what is greater by itself: a system may refuse what it could hardly give.
const MOST: usize = 64 << 20;
/// Bytes of empty spans that are kept: sequences come and go, and memory from the system has to be cleared.
const SPARE: usize = 8 << 20;
/// Bytes that a bit stands for.
pub(super) const GRAIN: usize = 64;

/// What lies in a pool's spans. Blocks come and go, and must not share spans with what stays.
pub(super) enum Content {
    Blocks,
    Weights,
}

/// The pool for a content.
pub(super) fn pool(content: Content) -> MutexGuard<'static, Pool> {
    static POOLS: [Mutex<Pool>; 2] = [const { Mutex::new(Pool::new()) }; 2];
    // Nothing in there panics half done but for a lack of memory.
    POOLS[content as usize].lock().unwrap_or_else(|e| e.into_inner())
}

/// All spans.
pub(super) struct Pool {
    /// By address.
    spans: BTreeMap<usize, Span>,
    /// Addresses of those in which room was not looked for in vain since some was given back. The first that has room gives it, so
    /// that what comes later gets empty.
    roomy: BTreeSet<usize>,
    /// Bytes of those that are empty.
    empty: usize,
}

impl Pool {
    const fn new() -> Self {
        Pool { spans: BTreeMap::new(), roomy: BTreeSet::new(), empty: 0 }
    }

    /// Room for `n` grains.
    pub fn take(&mut self, n: usize) -> NonNull<u8> {
        while let Some(address) = self.roomy.first() {
            let span = self.spans.get_mut(address).expect("listed spans exist");
            let was_empty = span.is_empty();
            if let Some(start) = span.take(n) {
                if was_empty {
                    self.empty -= span.layout.size();
                }
                return start;
            }
            self.roomy.pop_first();
        }
        let bytes = (n * GRAIN * PIECES).min(MOST).max(n * GRAIN);
        let mut span = Span::new(bytes.next_multiple_of(LARGE));
        let start = span.take(n).expect("a span has room for several");
        let address = span.memory.addr().get();
        self.roomy.insert(address);
        self.spans.insert(address, span);
        start
    }

    /// Takes back what [`take`](Pool::take) gave.
    pub fn give(&mut self, start: NonNull<u8>, n: usize) {
        let (&address, span) = self.spans.range_mut(..=start.addr().get()).next_back().expect("it lies in a span");
        span.give(start, n);
        self.roomy.insert(address);
        if span.is_empty() {
            let size = span.layout.size();
            if self.empty + size > SPARE {
                self.roomy.remove(&address);
                self.spans.remove(&address);
            } else {
                self.empty += size;
            }
        }
    }
}

/// Memory of one piece.
struct Span {
    memory: NonNull<u8>,
    layout: Layout,
    used: Vec<u64>,
    /// Grains that are free, and one that none of them lies before.
    free: usize,
    first: usize,
}

// SAFETY: a span owns its memory.
unsafe impl Send for Span {}

impl Span {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, LARGE).expect("a size that memory can have");
        let memory = system::map(layout).unwrap_or_else(|| handle_alloc_error(layout));
        let grains = bytes / GRAIN;
        Span { memory, layout, used: vec![0; grains / 64], free: grains, first: 0 }
    }

    fn grains(&self) -> usize {
        self.used.len() * 64
    }

    fn is_empty(&self) -> bool {
        self.free == self.grains()
    }

    /// The first room for `n` grains.
    fn take(&mut self, n: usize) -> Option<NonNull<u8>> {
        if n > self.free {
            return None;
        }
        let (mut at, mut run) = (self.first, 0);
        while at < self.grains() {
            let (word, left) = (self.used[at / 64] >> (at % 64), 64 - at % 64);
            let ones = word.trailing_ones() as usize;
            if ones > 0 {
                (at, run) = (at + ones, 0);
                continue;
            }
            let zeros = (word.trailing_zeros() as usize).min(left);
            (at, run) = (at + zeros, run + zeros);
            if run >= n {
                let start = at - run;
                self.mark(start, n, true);
                self.free -= n;
                if start == self.first {
                    self.first += n;
                }
                // SAFETY: within the span.
                return Some(unsafe { self.memory.add(start * GRAIN) });
            }
        }
        None
    }

    fn give(&mut self, start: NonNull<u8>, n: usize) {
        let start = (start.addr().get() - self.memory.addr().get()) / GRAIN;
        self.mark(start, n, false);
        self.free += n;
        self.first = self.first.min(start);
    }

    fn mark(&mut self, start: usize, n: usize, used: bool) {
        let end = start + n;
        for word in start / 64..end.div_ceil(64) {
            let from = start.saturating_sub(word * 64);
            let bits = end.min(word * 64 + 64) - (word * 64 + from);
            let mask = (u64::MAX >> (64 - bits)) << from;
            debug_assert_eq!(self.used[word] & mask, if used { 0 } else { mask });
            self.used[word] ^= mask;
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // SAFETY: from `map` with the same layout, and nothing in it is used any more: only empty spans are let go.
        unsafe { system::unmap(self.memory, self.layout) };
    }
}

/// Memory from the system itself: what an allocator gives may lie in pages that were touched before anybody asked for large ones.
#[cfg(target_os = "linux")]
mod system {
    use std::alloc::Layout;
    use std::ptr::{NonNull, null_mut};

    /// Memory of a layout, or none if there is no more.
    pub fn map(layout: Layout) -> Option<NonNull<u8>> {
        let (size, align) = (layout.size(), layout.align());
        let all = size.checked_add(align)?;
        // SAFETY: new memory, of which nobody knows yet; what lies before and behind the aligned part is given back. The advice
        // changes the size of pages that are touched for the first time; without large pages it is an error of no interest.
        unsafe {
            let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let start = libc::mmap(null_mut(), all, rights, flags, -1, 0);
            if start == libc::MAP_FAILED {
                return None;
            }
            let before = start.align_offset(align);
            let memory = start.byte_add(before);
            if before > 0 {
                libc::munmap(start, before);
            }
            if before < align {
                libc::munmap(memory.byte_add(size), align - before);
            }
            libc::madvise(memory, size, libc::MADV_HUGEPAGE);
            NonNull::new(memory.cast())
        }
    }

    /// Gives back what [`map`] gave.
    ///
    /// # Safety
    /// It is of this layout, and nobody uses it any more.
    pub unsafe fn unmap(memory: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { libc::munmap(memory.as_ptr().cast(), layout.size()) };
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::alloc::{Layout, alloc, dealloc};
    use std::ptr::NonNull;

    /// Memory of a layout, or none if there is no more.
    pub fn map(layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: the size is not 0.
        NonNull::new(unsafe { alloc(layout) })
    }

    /// Gives back what [`map`] gave.
    ///
    /// # Safety
    /// It is of this layout, and nobody uses it any more.
    pub unsafe fn unmap(memory: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { dealloc(memory.as_ptr(), layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_free_goes_back() {
        let mut pool = Pool::new();
        let all: Vec<_> = (0..1000).map(|i| (pool.take(150 + i % 7), 150 + i % 7)).collect();
        let spans = pool.spans.len();
        // Side by side: no more spans than these grains fill, and the end of each.
        assert_eq!(spans, (all.iter().map(|a| a.1).sum::<usize>()).div_ceil(LARGE / GRAIN - 160));
        // Every second one: no span is empty, and others of the size fit between.
        all.iter().step_by(2).for_each(|&(start, n)| pool.give(start, n));
        assert_eq!(pool.spans.len(), spans);
        let again: Vec<_> = (0..400).map(|_| (pool.take(150), 150)).collect();
        assert_eq!(pool.spans.len(), spans);
        all.iter().skip(1).step_by(2).chain(&again).for_each(|&(start, n)| pool.give(start, n));
        assert_eq!((pool.spans.len(), pool.empty), (SPARE / LARGE, SPARE), "few stay");
        let many: Vec<_> = (0..5000).map(|_| pool.take(150)).collect();
        many.into_iter().for_each(|start| pool.give(start, 150));
        assert_eq!((pool.spans.len(), pool.empty), (SPARE / LARGE, SPARE), "and no more");
        // Great ones have spans of their size.
        let n = LARGE / GRAIN + 1;
        let great = pool.take(n);
        let (_, span) = pool.spans.range(..=great.addr().get()).next_back().expect("its span");
        assert!((PIECES * n..PIECES * n + LARGE / GRAIN).contains(&span.grains()));
        pool.give(great, n);
        assert_eq!((pool.spans.len(), pool.empty), (SPARE / LARGE, SPARE));
    }

    proptest! {
        #[test]
        fn nothing_is_given_twice(steps in prop::collection::vec((any::<bool>(), 1usize..9000, any::<prop::sample::Index>()), 1..200)) {
            let mut pool = Pool::new();
            let mut held: Vec<(NonNull<u8>, usize)> = Vec::new();
            for (take, n, which) in steps {
                if take || held.is_empty() {
                    let start = pool.take(n);
                    let of = |(start, n): (NonNull<u8>, usize)| start.addr().get()..start.addr().get() + n * GRAIN;
                    let new = of((start, n));
                    prop_assert!(held.iter().map(|h| of(*h)).all(|h| h.end <= new.start || new.end <= h.start));
                    let (base, span) = pool.spans.range(..=new.start).next_back().unwrap();
                    prop_assert!(new.start.is_multiple_of(GRAIN) && new.end <= base + span.layout.size());
                    held.push((start, n));
                } else {
                    let (start, n) = held.swap_remove(which.index(held.len()));
                    pool.give(start, n);
                }
                let free: usize = pool.spans.values().map(|s| s.free).sum();
                let all: usize = pool.spans.values().map(Span::grains).sum();
                prop_assert_eq!(all - free, held.iter().map(|h| h.1).sum::<usize>());
                let empty: usize = pool.spans.values().filter(|s| s.is_empty()).map(|s| s.layout.size()).sum();
                prop_assert!(empty == pool.empty && empty <= SPARE);
            }
        }
    }
}
