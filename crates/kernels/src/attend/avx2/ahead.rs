//! The block that comes next, asked for a few lines at a time: blocks lie apart, where no CPU looks ahead by itself, and a
//! burst of requests would wait for the ones before it.

use std::arch::x86_64::*;

use super::super::SideView;

const LINE: usize = 64;

/// Lines of one side that are still to be asked for.
pub(in super::super) struct Ahead<'a> {
    parts: [&'a [u8]; 5],
    part: usize,
}

fn ask(byte: &u8) {
    // SAFETY: a prefetch changes nothing that a program can see. SSE is part of x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(byte).cast()) };
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
                    part.first().inspect(|byte| ask(byte));
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
pub(in super::super) const fn lines_a_unit(bits: u32) -> usize {
    bits as usize / 2 + 1
}
