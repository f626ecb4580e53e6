//! Activations as integers: 32 of them share a scale, the largest magnitude / 127, or / 16,256.
//!
//! An integer of 8 bits is one byte part; one of 15 bits is two, `128 * upper + lower`, so that the same instructions
//! multiply both, at half the rate. A value is off by at most half a scale, so a product with a row w by at most
//! `sum over blocks of scale / 2 * sum |w|`.
//!
//! Tokens are taken up to 8 at a time (a strip of M); a strip lies in the order in which kernels read it:
//!
//! ```text
//! per block   per part: M x 8 words of 4 bytes | M scales | M x 3 sums of integers (all, first 16, last 16)
//!             | M x 3 of these, scaled
//! ```

use std::ops::Range;

use super::layout::BLOCK;
use crate::dispatch::Isa;
use crate::threads;

/// Tokens of a strip, at most.
pub(super) const STRIP: usize = 8;
/// Words of 4 bytes that a token has in a block, for each part.
pub(super) const WORDS: usize = BLOCK / 4;
/// Bits of the lower part of two.
pub(super) const LOWER: i32 = 7;

/// Words of a token in a block, all told.
pub(super) const fn stride(parts: usize) -> usize {
    parts * WORDS + 7
}
/// Elements from which threads pay.
const PARALLEL_FROM: usize = 1 << 15;

/// Quantized activations of some tokens.
#[derive(Default)]
pub(super) struct Quantized {
    words: Vec<u32>,
    parts: usize,
    tokens: usize,
    blocks: usize,
}

/// 0..m in strips of at most `most` whose lengths differ by at most one.
pub(super) fn strips(m: usize, most: usize) -> impl ExactSizeIterator<Item = Range<usize>> + Clone {
    let n = m.div_ceil(most);
    (0..n).map(move |i| i * m / n..(i + 1) * m / n)
}

impl Quantized {
    /// Takes x `[m, cols]`, cols a multiple of 32, as integers of one or two parts.
    pub fn fill(&mut self, isa: Isa, parts: usize, x: &[f32], cols: usize) {
        (self.parts, self.tokens, self.blocks) = (parts, x.len() / cols, cols / BLOCK);
        let stride = self.blocks * stride(parts);
        // Every word is written below.
        self.words.resize(self.tokens * stride, 0);
        let mut rest = self.words.as_mut_slice();
        let strips = strips(self.tokens, STRIP).map(|s| {
            let (strip, more) = std::mem::take(&mut rest).split_at_mut(s.len() * stride);
            rest = more;
            (&x[s.start * cols..s.end * cols], strip)
        });
        if x.len() < PARALLEL_FROM {
            strips.for_each(|(x, words)| quantize(isa, parts, x, cols, words));
        } else {
            let mut strips: Vec<_> = strips.collect();
            threads::for_each_mut(&mut strips, |_, (x, words)| quantize(isa, parts, x, cols, words));
        }
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn parts(&self) -> usize {
        self.parts
    }

    /// First token, tokens and words of strip i.
    pub fn strip(&self, i: usize) -> (usize, usize, &[u32]) {
        let n = self.tokens.div_ceil(STRIP);
        let (start, end) = (i * self.tokens / n, (i + 1) * self.tokens / n);
        let stride = self.blocks * stride(self.parts);
        (start, end - start, &self.words[start * stride..end * stride])
    }
}

/// One strip.
fn quantize(isa: Isa, parts: usize, x: &[f32], cols: usize, words: &mut [u32]) {
    match (isa, parts) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Weight's instruction set is one that the CPU has.
        (Isa::Avx512 | Isa::Avx2, 1) => unsafe { quantize_avx2::<1>(x, cols, words) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Isa::Avx512 | Isa::Avx2, _) => unsafe { quantize_avx2::<2>(x, cols, words) },
        (_, 1) => quantize_plain::<1>(x, cols, words),
        _ => quantize_plain::<2>(x, cols, words),
    }
}

/// # Safety
/// AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn quantize_avx2<const PARTS: usize>(x: &[f32], cols: usize, words: &mut [u32]) {
    quantize_plain::<PARTS>(x, cols, words);
}

/// The compiler makes vectors of it; results are the same on every CPU.
#[inline(always)]
fn quantize_plain<const PARTS: usize>(x: &[f32], cols: usize, words: &mut [u32]) {
    let m = x.len() / cols;
    let most = if PARTS == 1 { 127.0 } else { (127 << LOWER) as f32 };
    for (b, to) in words.chunks_exact_mut(m * stride(PARTS)).enumerate() {
        let (bytes, rest) = to.split_at_mut(m * PARTS * WORDS);
        for t in 0..m {
            let x: &[f32; BLOCK] = x[t * cols + b * BLOCK..].first_chunk().expect("whole blocks");
            // Of bits, so that what is not finite is the largest, and its scale is not finite.
            let mut largest = 0u32;
            for x in x {
                largest = largest.max(x.to_bits() & 0x7fff_ffff);
            }
            let largest = f32::from_bits(largest);
            let scale = largest / most;
            // What is as small as this is 0: its inverse would overflow.
            let inverse = if largest < 1e-33 { 0.0 } else { most / largest };
            let mut q = [0i32; BLOCK];
            for i in 0..BLOCK {
                // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number, ties to even; the low bits of
                // the sum are that number.
                q[i] = ((x[i] * inverse + 12_582_912.0).to_bits() as i32).wrapping_sub(0x4b40_0000);
            }
            let (mut a, mut z) = (0i32, 0i32);
            for i in 0..BLOCK / 2 {
                a = a.wrapping_add(q[i]);
                z = z.wrapping_add(q[i + BLOCK / 2]);
            }
            let sums = [a.wrapping_add(z), a, z];
            rest[t] = scale.to_bits();
            for (i, s) in sums.into_iter().enumerate() {
                rest[(1 + i) * m + t] = s as u32;
                rest[(4 + i) * m + t] = (scale * s as f32).to_bits();
            }
            for part in 0..PARTS {
                let mut of = q;
                if PARTS == 2 {
                    for q in &mut of {
                        let upper = q.wrapping_add(1 << (LOWER - 1)) >> LOWER;
                        *q = if part == 0 { upper } else { q.wrapping_sub(upper << LOWER) };
                    }
                }
                for k in 0..WORDS {
                    let four = [of[4 * k], of[4 * k + 1], of[4 * k + 2], of[4 * k + 3]];
                    bytes[(part * m + t) * WORDS + k] = u32::from_le_bytes(four.map(|q| q as u8));
                }
            }
        }
    }
}
