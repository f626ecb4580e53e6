//! Cache lines of one owner.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use super::pool::{Content, GRAIN, pool};

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Line(pub [u8; 64]);

const _: () = assert!(size_of::<Line>() == GRAIN && align_of::<Line>() == GRAIN);

impl Line {
    /// The bytes of lines.
    pub fn bytes(lines: &[Line]) -> &[u8] {
        // SAFETY: a Line is 64 bytes without padding.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), 64 * lines.len()) }
    }

    /// The bytes of lines.
    pub fn bytes_mut(lines: &mut [Line]) -> &mut [u8] {
        // SAFETY: as above, and any bytes are a Line.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), 64 * lines.len()) }
    }
}

/// Lines of zeros to be filled: a `Box<[Line]>` in large pages.
pub(crate) struct Lines {
    start: NonNull<Line>,
    len: usize,
}

// SAFETY: as for `Box<[Line]>`: it owns what it points to.
unsafe impl Send for Lines {}
// SAFETY: likewise.
unsafe impl Sync for Lines {}

impl Lines {
    /// So many.
    pub fn zeros(len: usize) -> Self {
        let start = if len == 0 { NonNull::dangling() } else { pool(Content::Weights).take(len).cast::<Line>() };
        // SAFETY: the pool gave room for as many lines to nobody else, aligned to a line.
        unsafe { start.write_bytes(0, len) };
        Lines { start, len }
    }
}

impl Deref for Lines {
    type Target = [Line];

    #[inline(always)]
    fn deref(&self) -> &[Line] {
        // SAFETY: as many were written when this was made, and only its owner can write them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: likewise.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if self.len > 0 {
            pool(Content::Weights).give(self.start.cast(), self.len);
        }
    }
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} lines", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zeros_again_after_others_had_their_place() {
        for n in [0, 1, 1000, 70_000] {
            let mut a = Lines::zeros(n);
            let mut b = Lines::zeros(n);
            assert!(Line::bytes(&a).iter().chain(Line::bytes(&b)).all(|x| *x == 0));
            Line::bytes_mut(&mut a).fill(1);
            Line::bytes_mut(&mut b).fill(2);
            assert_eq!((a.len(), b.len()), (n, n));
            assert!(Line::bytes(&a).iter().all(|x| *x == 1), "each has lines of its own");
        }
    }
}
