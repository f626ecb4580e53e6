//! The block that comes next, asked for a few lines at a time: blocks lie apart, where no CPU looks ahead by itself, and a
//! burst of requests would wait for the ones before it.

use kvquant_quant::pack::{VECTOR, unit_bytes};

use super::SideView;

const LINE: usize = 64;

/// Codes of one side that are still to be asked for. What else the side has is few lines, asked for at once.
#[derive(Default)]
pub(super) struct Ahead<'a> {
    codes: &'a [u8],
    at: usize,
}

/// Asks for a line, into the cache of that level. Nothing happens that a program can see, whatever the address.
#[inline(always)]
fn ask<const LEVEL: u32>(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: nothing is read or written. SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if LEVEL == 1 { _mm_prefetch::<_MM_HINT_T0>(at.cast()) } else { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: nothing is read or written; the instruction is part of aarch64.
    unsafe {
        use std::arch::asm;
        if LEVEL == 1 {
            asm!("prfm pldl1keep, [{0}]", in(reg) at, options(nostack, preserves_flags, readonly));
        } else {
            asm!("prfm pldl2keep, [{0}]", in(reg) at, options(nostack, preserves_flags, readonly));
        }
    }
}

/// Asks for all lines of a slice, which begins and ends anywhere in one.
#[inline(always)]
fn all<const LEVEL: u32>(of: *const u8, bytes: usize) {
    if bytes > 0 {
        for at in (0..bytes).step_by(LINE) {
            ask::<LEVEL>(of.wrapping_add(at));
        }
        ask::<LEVEL>(of.wrapping_add(bytes - 1));
    }
}

/// The part of a side that is asked for line by line.
fn lines_of<'a>(side: &SideView<'a>) -> &'a [u8] {
    match side {
        SideView::Coded(v) => v.codes,
        // Long enough for the CPU to see where it goes.
        SideView::Tile { data } => bytemuck::cast_slice(&data[..data.len().min(512)]),
        SideView::Rows { .. } => &[],
    }
}

impl<'a> Ahead<'a> {
    /// Of the side that comes `next`, or else of the one at hand: what a CPU already has costs less to ask for than an address
    /// where nothing is.
    #[inline]
    pub fn of(next: Option<&SideView<'a>>, now: &SideView<'a>) -> Self {
        if let Some(SideView::Coded(v)) = next {
            let (scale, zero) = v.scales.map_or((&[][..], &[][..]), |s| (s.scale, s.zero));
            let [scale, zero] = [scale, zero].map(bytemuck::cast_slice);
            for few in [v.outliers.places, v.outliers.residuals.as_flattened(), scale, zero] {
                all::<1>(few.as_ptr(), few.len());
            }
        }
        let codes = next.map(lines_of).filter(|codes| !codes.is_empty()).unwrap_or_else(|| lines_of(now));
        Ahead { codes, at: 0 }
    }

    /// Asks for the lines where the i-th unit of B-bit codes from here on begins, if the next block is as this one is. It may lie
    /// beyond the codes: what lies there is asked for a little later.
    #[inline(always)]
    pub fn unit<const B: u32>(&self, i: usize) {
        let at = self.at + i * unit_bytes(B);
        if B > 0 {
            ask::<2>(self.codes.as_ptr().wrapping_add(at));
        }
        if B as usize * VECTOR > LINE {
            ask::<2>(self.codes.as_ptr().wrapping_add(at + LINE));
        }
    }

    /// As many units of B-bit codes were asked for.
    #[inline(always)]
    pub fn skip_units<const B: u32>(&mut self, n: usize) {
        self.at += n * unit_bytes(B);
    }

    /// Asks for all that is left.
    #[inline]
    pub fn rest(&mut self) {
        // A slice begins anywhere in a line: its last byte may lie in one more than its length says.
        let end = self.codes.len() + self.codes.as_ptr().addr() % LINE;
        while self.at < end {
            ask::<2>(self.codes.as_ptr().wrapping_add(self.at));
            self.at += LINE;
        }
    }
}

/// Asks for all of a slice, which may be long.
pub(super) fn prefetch_lines<T>(of: &[T]) {
    all::<2>(of.as_ptr().cast(), size_of_val(of));
}

/// Asks for all of a slice that is a few lines and read soon.
pub(super) fn prefetch_few<T>(of: &[T]) {
    all::<1>(of.as_ptr().cast(), size_of_val(of));
}
