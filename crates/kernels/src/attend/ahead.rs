//! The block that comes next, asked for a few lines at a time: blocks lie apart, where no CPU looks ahead by itself, and a
//! burst of requests would wait for the ones before it.

use super::SideView;

const LINE: usize = 64;

/// Lines of one side that are still to be asked for.
pub(super) struct Ahead<'a> {
    parts: [&'a [u8]; 5],
    part: usize,
}

/// A prefetch changes nothing that a program can see, at any address.
#[inline(always)]
fn ask(byte: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: nothing is read or written. SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(byte.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: nothing is read or written; the instruction is part of aarch64.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) byte, options(nostack, preserves_flags, readonly));
    }
}

impl<'a> Ahead<'a> {
    pub fn of(next: Option<&SideView<'a>>) -> Self {
        let parts = match next {
            Some(SideView::Coded(v)) => {
                let (scale, zero) = v.scales.map_or((&[][..], &[][..]), |s| (s.scale, s.zero));
                let [scale, zero] = [scale, zero].map(bytemuck::cast_slice);
                [v.outliers.places, v.outliers.residuals.as_flattened(), scale, zero, v.codes]
            }
            // Long enough for the CPU to see where it goes.
            Some(SideView::Tile { data }) => [&[], &[], &[], &[], bytemuck::cast_slice(&data[..data.len().min(512)])],
            _ => [&[][..]; 5],
        };
        Ahead { parts, part: 0 }
    }

    /// Asks for the next `n` lines.
    #[inline(always)]
    pub fn lines(&mut self, n: usize) {
        for _ in 0..n {
            let Some(part) = self.parts.get_mut(self.part) else { return };
            match part {
                [first, .., last] => {
                    ask(first);
                    // A slice begins anywhere in a line: its last byte may lie in one more.
                    if part.len() <= LINE {
                        ask(last);
                        self.part += 1;
                    } else {
                        *part = &part[LINE..];
                    }
                }
                [] | [_] => {
                    part.first().inspect(|byte| ask(*byte));
                    self.part += 1;
                }
            }
        }
    }

    /// Asks for all that is left.
    pub fn rest(&mut self) {
        while self.part < self.parts.len() {
            self.lines(1);
        }
    }
}

/// Lines to ask for beside a unit of `bits`-bit codes: as many as such a unit has, and something for what is not codes.
pub(super) const fn lines_a_unit(bits: u32) -> usize {
    bits as usize / 2 + 1
}

/// Asks for all lines of a slice.
pub(super) fn prefetch_lines<T>(of: &[T]) {
    let (first, bytes) = (of.as_ptr().cast::<u8>(), size_of_val(of));
    // A slice begins anywhere in a line: its last byte may lie in one more than its length says.
    for at in (0..bytes).step_by(LINE).chain(bytes.checked_sub(1)) {
        ask(first.wrapping_add(at));
    }
}
