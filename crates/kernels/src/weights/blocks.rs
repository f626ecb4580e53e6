//! The block formats of GGUF, dequantized by plain loops. Every format: a block of weights shares a scale d (fp16),
//! some also a minimum m; the k-quants have super-blocks of 256 with scales of 6 bits or less inside.

use half::{bf16, f16};

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum WeightType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

use WeightType::*;

impl WeightType {
    /// All types.
    pub const ALL: [WeightType; 13] = [F32, F16, Bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K];

    /// The type of a GGUF type number.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Some(match id {
            0 => F32,
            1 => F16,
            2 => Q4_0,
            3 => Q4_1,
            6 => Q5_0,
            7 => Q5_1,
            8 => Q8_0,
            10 => Q2K,
            11 => Q3K,
            12 => Q4K,
            13 => Q5K,
            14 => Q6K,
            30 => Bf16,
            _ => return None,
        })
    }

    /// The name that GGUF tools use.
    pub fn name(self) -> &'static str {
        match self {
            F32 => "F32",
            F16 => "F16",
            Bf16 => "BF16",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q2K => "Q2_K",
            Q3K => "Q3_K",
            Q4K => "Q4_K",
            Q5K => "Q5_K",
            Q6K => "Q6_K",
        }
    }

    /// Weights and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            F32 => (1, 4),
            F16 | Bf16 => (1, 2),
            Q4_0 => (32, 18),
            Q4_1 => (32, 20),
            Q5_0 => (32, 22),
            Q5_1 => (32, 24),
            Q8_0 => (32, 34),
            Q2K => (256, 84),
            Q3K => (256, 110),
            Q4K => (256, 144),
            Q5K => (256, 176),
            Q6K => (256, 210),
        }
    }
}

/// Dequantizes whole blocks: `bytes` and `out` have as many.
#[inline(always)]
pub(super) fn dequant(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    match ty {
        F32 => each::<1, 4>(bytes, out, |b, o| o[0] = f32::from_le_bytes(*b)),
        F16 => each::<1, 2>(bytes, out, |b, o| o[0] = half(b[0], b[1])),
        Bf16 => each::<1, 2>(bytes, out, |b, o| o[0] = bf16::from_le_bytes(*b).to_f32()),
        Q4_0 => each::<32, 18>(bytes, out, |b, o| {
            let d = half(b[0], b[1]);
            for j in 0..16 {
                o[j] = d * ((b[2 + j] & 15) as i32 - 8) as f32;
                o[j + 16] = d * ((b[2 + j] >> 4) as i32 - 8) as f32;
            }
        }),
        Q4_1 => each::<32, 20>(bytes, out, |b, o| {
            let (d, m) = (half(b[0], b[1]), half(b[2], b[3]));
            for j in 0..16 {
                o[j] = d * (b[4 + j] & 15) as f32 + m;
                o[j + 16] = d * (b[4 + j] >> 4) as f32 + m;
            }
        }),
        Q5_0 => each::<32, 22>(bytes, out, |b, o| {
            let (d, high) = (half(b[0], b[1]), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
            for j in 0..16 {
                let (lo, hi) = ((high >> j & 1) << 4, (high >> (j + 16) & 1) << 4);
                o[j] = d * (((b[6 + j] & 15) as u32 | lo) as i32 - 16) as f32;
                o[j + 16] = d * (((b[6 + j] >> 4) as u32 | hi) as i32 - 16) as f32;
            }
        }),
        Q5_1 => each::<32, 24>(bytes, out, |b, o| {
            let (d, m, high) = (half(b[0], b[1]), half(b[2], b[3]), u32::from_le_bytes([b[4], b[5], b[6], b[7]]));
            for j in 0..16 {
                let (lo, hi) = ((high >> j & 1) << 4, (high >> (j + 16) & 1) << 4);
                o[j] = d * ((b[8 + j] & 15) as u32 | lo) as f32 + m;
                o[j + 16] = d * ((b[8 + j] >> 4) as u32 | hi) as f32 + m;
            }
        }),
        Q8_0 => each::<32, 34>(bytes, out, |b, o| {
            let d = half(b[0], b[1]);
            for j in 0..32 {
                o[j] = d * b[2 + j] as i8 as f32;
            }
        }),
        Q2K => each::<256, 84>(bytes, out, q2k),
        Q3K => each::<256, 110>(bytes, out, q3k),
        Q4K => each::<256, 144>(bytes, out, |b, o| {
            let (d, m) = (half(b[0], b[1]), half(b[2], b[3]));
            for g in 0..8 {
                let (scale, min) = six_bits(&b[4..16], g);
                let (d, m) = (d * scale, m * min);
                let codes = &b[16 + g / 2 * 32..][..32];
                let shift = g % 2 * 4;
                for (o, c) in o[g * 32..][..32].iter_mut().zip(codes) {
                    *o = d * (c >> shift & 15) as f32 - m;
                }
            }
        }),
        Q5K => each::<256, 176>(bytes, out, |b, o| {
            let (d, m) = (half(b[0], b[1]), half(b[2], b[3]));
            for g in 0..8 {
                let (scale, min) = six_bits(&b[4..16], g);
                let (d, m) = (d * scale, m * min);
                let (high, codes) = (&b[16..48], &b[48 + g / 2 * 32..][..32]);
                let shift = g % 2 * 4;
                for ((o, c), h) in o[g * 32..][..32].iter_mut().zip(codes).zip(high) {
                    *o = d * ((c >> shift & 15) | (h >> g & 1) << 4) as f32 - m;
                }
            }
        }),
        Q6K => each::<256, 210>(bytes, out, |b, o| {
            let d = half(b[208], b[209]);
            for n in 0..2 {
                let (low, high, scales) = (&b[n * 64..][..64], &b[128 + n * 32..][..32], &b[192 + n * 8..][..8]);
                for q in 0..4 {
                    for l in 0..32 {
                        let c = (low[q % 2 * 32 + l] >> (q / 2 * 4) & 15) | (high[l] >> (2 * q) & 3) << 4;
                        o[n * 128 + q * 32 + l] = d * scales[q * 2 + l / 16] as i8 as f32 * (c as i32 - 32) as f32;
                    }
                }
            }
        }),
    }
}

#[inline(always)]
fn each<const N: usize, const B: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn(&[u8; B], &mut [f32; N])) {
    for (b, o) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        f(b, o);
    }
}

#[inline(always)]
fn half(a: u8, b: u8) -> f32 {
    f16::from_le_bytes([a, b]).to_f32()
}

/// Scale and minimum of group g of a Q4_K or Q5_K super-block: 6 bits each in 12 bytes.
#[inline(always)]
fn six_bits(s: &[u8], g: usize) -> (f32, f32) {
    let (scale, min) = if g < 4 {
        (s[g] & 63, s[g + 4] & 63)
    } else {
        (s[g + 4] & 15 | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4)
    };
    (scale as f32, min as f32)
}

#[inline(always)]
fn q2k(b: &[u8; 84], o: &mut [f32; 256]) {
    let (d, m) = (half(b[80], b[81]), half(b[82], b[83]));
    for n in 0..2 {
        for q in 0..4 {
            for l in 0..32 {
                let scale = b[n * 8 + q * 2 + l / 16];
                let code = b[16 + n * 32 + l] >> (2 * q) & 3;
                o[n * 128 + q * 32 + l] = d * (scale & 15) as f32 * code as f32 - m * (scale >> 4) as f32;
            }
        }
    }
}

#[inline(always)]
fn q3k(b: &[u8; 110], o: &mut [f32; 256]) {
    let d = half(b[108], b[109]);
    let (high, low, s) = (&b[..32], &b[32..96], b[96..].first_chunk().expect("12 of 14 bytes"));
    for n in 0..2 {
        for q in 0..4 {
            for l in 0..32 {
                let i = n * 8 + q * 2 + l / 16;
                let code =
                    (low[n * 32 + l] >> (2 * q) & 3) as i32 - if high[l] >> (n * 4 + q) & 1 == 0 { 4 } else { 0 };
                o[n * 128 + q * 32 + l] = d * scale_q3k(s, i) * code as f32;
            }
        }
    }
}

/// Scale i of a Q3_K super-block: 16 of 6 bits, the low nibbles in 8 bytes, then 2 high bits each in 4 bytes.
#[inline(always)]
pub(super) fn scale_q3k(s: &[u8; 12], i: usize) -> f32 {
    let nibble = if i < 8 { s[i] & 15 } else { s[i - 8] >> 4 };
    (nibble | (s[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) as f32 - 32.0
}
