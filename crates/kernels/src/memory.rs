//! What the cache asks of the system's memory.
//!
//! A block lies in two or three pages of 4 kB, and a deep cache in more pages than a CPU keeps addresses of: each block's
//! first request then waits for a walk through the page tables, which a virtual machine walks twice. Large pages take that
//! away; many systems give them only to memory for which they were asked.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a large page.
const LARGE: usize = 2 << 20;
/// Bytes that are asked for at a time.
const SPAN: usize = 32 * LARGE;

/// Asks for large pages where an allocator that goes upward takes its next memory from: behind `near`, which it has just
/// given. Without an effect where the system has none, and on what memory holds.
pub fn prefer_large_pages<T>(near: &[T]) {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let first = near.as_ptr().addr().next_multiple_of(LARGE);
    let asked = ASKED.load(Ordering::Relaxed);
    // The second half of a span is asked for early, so that nothing is touched before it is asked for.
    if first >= asked && first < asked.saturating_add(SPAN / 2) {
        return;
    }
    ASKED.store(first, Ordering::Relaxed);
    #[cfg(target_os = "linux")]
    // SAFETY: this advice changes the size of pages that are touched for the first time, never what memory holds or whether
    // it may be accessed; an address without memory is an error that is of no interest.
    unsafe {
        libc::madvise(std::ptr::without_provenance_mut(first), SPAN, libc::MADV_HUGEPAGE);
    }
}
