//! Memory for what is written once and then read over and over: a cache's blocks and a model's weights, side by side in large pages.
//!
//! ```text
//! span      [block | block | block | free        | block | free ]    a multiple of 2 MiB, in large pages where the system has them
//! used      1 1 1 1 1 1 1 1 1 1 1 1 1 0 0 0 0 0 0 1 1 1 1 0 0 0      a bit for each 64 bytes
//! block     holders 8 bytes, then 8 unused | its words | up to 64 bytes
//! weights   lines of 64 bytes, in spans of their own
//! ```
//!
//! An allocator for everything rounds such sizes up to classes an eighth apart, and so leaves blocks of one class at one distance
//! from each other, which maps them to few sets of a memory's banks: attention over 3-bit blocks 12 KiB apart took 7 %
//! longer than over the same ones side by side, at times 14. Large pages, since a deep cache has more small ones than a CPU keeps addresses
//! of, and each block's first request then waits for a walk through the page tables, which a virtual machine walks twice.

mod lines;
mod pool;

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

pub(crate) use lines::{Line, Lines};
use pool::{Content, GRAIN, pool};

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
        let start = pool(Content::Blocks).take(grains(len));
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
            pool(Content::Blocks).give(self.start(), grains(self.len()));
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
