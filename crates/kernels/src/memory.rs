//! Memory for what no longer changes: a cache's blocks, as long as each is, side by side.
//!
//! ```text
//! span      [block | block | block | free        | block | free ]    a multiple of 2 MiB, in large pages where the system has them
//! used      1 1 1 1 1 1 1 1 1 1 1 1 1 0 0 0 0 0 0 1 1 1 1 0 0 0      a bit for each 64 bytes
//! block     holders 8 bytes, then 8 unused | its words | up to 64 bytes
//! ```
//!
//! An allocator for everything rounds such sizes up to classes an eighth apart, and so leaves blocks of one class at one distance
//! from each other, which maps them to few sets of a memory's banks: attention over 3-bit blocks 12 KiB apart took 7 %
//! longer than over the same ones side by side, at times 14. Large pages, since a deep cache has more small ones than a CPU keeps addresses
//! of, and each block's first request then waits for a walk through the page tables, which a virtual machine walks twice.

use std::alloc::{Layout, handle_alloc_error};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard};

/// Bytes of a large page, and of a span at least.
const LARGE: usize = 2 << 20;
/// Pieces of the greatest size that a span has room for: what is left behind the last is less than a part of it in as many.
const PIECES: usize = 16;
/// Bytes of empty spans that are kept: sequences come and go, and memory from the system has to be cleared.
const SPARE: usize = 8 << 20;
/// Bytes that a bit stands for.
const GRAIN: usize = 64;
/// Bytes before the words.
const HEADER: usize = 16;

/// Words that were written once, held by any number of owners: an `Arc<[u32]>` in memory that only such words share.
pub struct SharedWords {
    words: NonNull<u32>,
    len: u32,
}

// SAFETY: as for `Arc<[u32]>`: nobody writes words that have a second holder, and the number of holders is atomic.
unsafe impl Send for SharedWords {}
// SAFETY: likewise.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// `len` words, zero before `fill` writes them.
    ///
    /// # Panics
    /// 2^32 words or more.
    pub fn new(len: usize, fill: impl FnOnce(&mut [u32])) -> Self {
        let short = u32::try_from(len).expect("fewer than 2^32 words");
        let start = pool().take(grains(len));
        // SAFETY: the pool gave room for a header and as many words to nobody else, aligned to more than both.
        let words = unsafe {
            start.cast::<AtomicUsize>().write(AtomicUsize::new(1));
            let words = start.add(HEADER).cast::<u32>();
            words.write_bytes(0, len);
            words
        };
        let shared = SharedWords { words, len: short };
        // SAFETY: written above, and nobody else has them yet.
        fill(unsafe { NonNull::slice_from_raw_parts(words, len).as_mut() });
        shared
    }

    /// How many hold them.
    pub fn holders(&self) -> usize {
        self.count().load(Ordering::Relaxed)
    }

    /// Bytes that they take: their count of holders, what fills up the last 64 bytes, and the bits that say what is used too.
    pub fn bytes(&self) -> usize {
        let grains = grains(self.len());
        grains * GRAIN + grains.div_ceil(8)
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: the words were placed behind a header.
        unsafe { self.words.cast::<u8>().sub(HEADER) }
    }

    fn count(&self) -> &AtomicUsize {
        // SAFETY: the header begins with it, aligned as spans are.
        unsafe { self.start().cast().as_ref() }
    }
}

impl Deref for SharedWords {
    type Target = [u32];

    #[inline(always)]
    fn deref(&self) -> &[u32] {
        // SAFETY: as many words were written when this was made, and nobody writes them while it is borrowed.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len as usize) }
    }
}

impl Clone for SharedWords {
    fn clone(&self) -> Self {
        let before = self.count().fetch_add(1, Ordering::Relaxed);
        assert!(before < isize::MAX as usize, "fewer holders");
        SharedWords { words: self.words, len: self.len }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        if self.count().fetch_sub(1, Ordering::Release) == 1 {
            // What other holders read comes before the memory is given to somebody else.
            fence(Ordering::Acquire);
            pool().give(self.start(), grains(self.len()));
        }
    }
}

impl std::fmt::Debug for SharedWords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} words, {} holders", self.len(), self.holders())
    }
}

fn grains(words: usize) -> usize {
    (HEADER + 4 * words).div_ceil(GRAIN)
}

fn pool() -> MutexGuard<'static, Pool> {
    static POOL: Mutex<Pool> = Mutex::new(Pool::new());
    // Nothing in there panics half done but for a lack of memory.
    POOL.lock().unwrap_or_else(|e| e.into_inner())
}

/// All spans.
struct Pool {
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
    fn take(&mut self, n: usize) -> NonNull<u8> {
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
        let mut span = Span::new((n * GRAIN * PIECES).next_multiple_of(LARGE));
        let start = span.take(n).expect("a span has room for several");
        let address = span.memory.addr().get();
        self.roomy.insert(address);
        self.spans.insert(address, span);
        start
    }

    /// Takes back what [`take`](Pool::take) gave.
    fn give(&mut self, start: NonNull<u8>, n: usize) {
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
    fn words_are_kept_until_nobody_holds_them() {
        let words = |seed: u32, n: usize| {
            SharedWords::new(n, |to| {
                assert!(to.iter().all(|w| *w == 0));
                to.iter_mut().zip(seed..).for_each(|(w, x)| *w = x);
            })
        };
        let is = |w: &SharedWords, seed: u32| w.iter().zip(seed..).all(|(w, x)| *w == x);
        std::thread::scope(|scope| {
            for t in 0..4u32 {
                scope.spawn(move || {
                    let mut held: Vec<(u32, SharedWords)> = Vec::new();
                    for i in 0..2000u32 {
                        let seed = t << 20 | i << 4;
                        held.push((seed, words(seed, (i as usize * 7919 + t as usize) % 5000)));
                        if i % 3 > 0 {
                            let (seed, out) = held.swap_remove((i * 31) as usize % held.len());
                            let other = out.clone();
                            assert_eq!((out.holders(), other.len()), (2, out.len()));
                            drop(out);
                            assert!(is(&other, seed) && other.holders() == 1);
                        }
                    }
                    assert!(held.iter().all(|(seed, w)| is(w, *seed)));
                });
            }
        });
    }

    #[test]
    fn bytes_count_header_padding_and_bits() {
        let bytes = |n| SharedWords::new(n, |_| ()).bytes();
        assert_eq!([bytes(0), bytes(12), bytes(13), bytes(2000)], [65, 65, 129, 126 * 64 + 16]);
    }

    #[test]
    fn a_panic_while_words_are_written_frees_them() {
        let caught = std::panic::catch_unwind(|| SharedWords::new(100, |_| panic!("on the way")));
        assert!(caught.is_err());
        assert_eq!(SharedWords::new(100, |w| w[99] = 1)[99], 1);
    }

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
