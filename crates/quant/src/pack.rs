//! The unit: 256 codes of 4 channels x 64 tokens, `b` bits each, in `b` vectors of 32 bytes.
//!
//! Every code of 32 tokens of a channel comes out of a vector by one shift and one mask into a byte of its own,
//! where a byte shuffle looks it up. Byte `i` of a vector belongs to the tokens `i` and `i + 32`:
//!
//! ```text
//! 4 bits   vector c          | token i+32 of channel c | token i of channel c |              c in 0..4
//! 3 bits   vector c          | x | token i+32 of c     | x | token i of c     |              c in 0..3
//!          x: bit c of channel 3's code of the same token
//! 2 bits   vector v          | 2v+1, i+32 | 2v+1, i | 2v, i+32 | 2v, i |                     v in 0..2
//! 1 bit    one vector        | 3, i+32 | 3, i | 2, i+32 | 2, i | 1, i+32 | 1, i | 0, i+32 | 0, i |
//! 5 to 7   the low 4 bits as a 4-bit unit, then the rest as a unit of 1 to 3 bits
//! 0        nothing: every code is 0
//! ```
//!
//! A 3-bit nibble's fourth bit is noise to its channel: tables of less than 16 signposts repeat.

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 64;
/// Channels in a unit.
pub const UNIT_CHANNELS: usize = 4;
/// Bytes of a vector of a unit, each for two tokens.
pub const VECTOR: usize = BLOCK_TOKENS / 2;
/// The widest code.
pub const MAX_BITS: u32 = 7;
/// Bits of a code that the first plane holds.
pub const LOW_BITS: u32 = 4;

/// Bytes of an outlier: its place in the unit, and an fp16 residual.
pub const OUTLIER_BYTES: usize = 3;

/// The sum of counts.
#[inline]
pub fn sum_of(counts: &[u8]) -> usize {
    // Most are few: sums of 16 bits in a word are shorter than vectors that have to be made and added up again.
    const LOW: u64 = 0x00ff_00ff_00ff_00ff;
    let (eights, rest) = counts.as_chunks::<8>();
    let mut sum: usize = rest.iter().map(|&n| n as usize).sum();
    for some in eights.chunks(32) {
        let words = some.iter().map(|eight| u64::from_le_bytes(*eight));
        let lanes = words.fold(0, |sum, word| sum + (word & LOW) + (word >> 8 & LOW));
        sum += (lanes.wrapping_mul(0x0001_0001_0001_0001) >> 48) as usize;
    }
    sum
}

/// Bytes of a unit of `bits`-bit codes.
pub const fn unit_bytes(bits: u32) -> usize {
    VECTOR * bits as usize
}

/// Calls `place(byte, shift, n, from)`: bits `from .. from + n` of the code lie at `shift` of that byte.
#[inline]
fn pieces(bits: u32, channel: usize, token: usize, mut place: impl FnMut(usize, u32, u32, u32)) {
    let (i, half) = (token % VECTOR, (token / VECTOR) as u32);
    let mut plane = |first: usize, bits: u32, from: u32| match bits {
        0 => {}
        1 => place(first + i, 2 * channel as u32 + half, 1, from),
        2 => place(first + channel / 2 * VECTOR + i, 4 * (channel as u32 % 2) + 2 * half, 2, from),
        3 if channel < 3 => place(first + channel * VECTOR + i, 4 * half, 3, from),
        3 => (0..3).for_each(|bit| place(first + bit as usize * VECTOR + i, 4 * half + 3, 1, from + bit)),
        _ => place(first + channel * VECTOR + i, 4 * half, 4, from),
    };
    plane(0, bits.min(LOW_BITS), 0);
    plane(unit_bytes(LOW_BITS), bits.saturating_sub(LOW_BITS), LOW_BITS);
}

/// Writes one code of a unit.
#[inline]
pub fn set_code(unit: &mut [u8], bits: u32, channel_in_unit: usize, token: usize, code: u8) {
    pieces(bits, channel_in_unit, token, |byte, shift, n, from| {
        let mask = ((1u8 << n) - 1) << shift;
        unit[byte] = unit[byte] & !mask | (code >> from) << shift & mask;
    });
}

/// Writes one token's codes of a unit.
#[inline]
pub fn set_codes(unit: &mut [u8], bits: u32, token: usize, codes: [u8; UNIT_CHANNELS]) {
    let (i, half) = (token % VECTOR, (token / VECTOR) as u32);
    let mut plane = |first: usize, bits: u32, from: u32| {
        let [a, b, c, d] = codes.map(|code| code >> from & ((1 << bits) - 1));
        let mut put = |vector: usize, mask: u8, field: u8, shift: u32| {
            let byte = &mut unit[first + vector * VECTOR + i];
            *byte = *byte & !(mask << shift) | field << shift;
        };
        match bits {
            0 => {}
            1 => put(0, 0b0101_0101, a | b << 2 | c << 4 | d << 6, half),
            2 => {
                put(0, 0b0011_0011, a | b << 4, 2 * half);
                put(1, 0b0011_0011, c | d << 4, 2 * half);
            }
            3 => {
                for (v, code) in [a, b, c].into_iter().enumerate() {
                    put(v, 15, code | (d >> v & 1) << 3, 4 * half);
                }
            }
            _ => {
                for (v, code) in [a, b, c, d].into_iter().enumerate() {
                    put(v, 15, code, 4 * half);
                }
            }
        }
    };
    plane(0, bits.min(LOW_BITS), 0);
    plane(unit_bytes(LOW_BITS), bits.saturating_sub(LOW_BITS), LOW_BITS);
}

/// Writes all codes of a unit, channel by channel.
pub fn pack_unit(bits: u32, codes: [&[u8; BLOCK_TOKENS]; UNIT_CHANNELS], unit: &mut [u8]) {
    let (low, high) = unit.split_at_mut(unit_bytes(bits.min(LOW_BITS)));
    pack_plane(bits.min(LOW_BITS), codes, 0, low);
    pack_plane(bits.saturating_sub(LOW_BITS), codes, LOW_BITS, high);
}

/// Bits `from .. from + bits` of all codes.
#[inline]
fn pack_plane(bits: u32, codes: [&[u8; BLOCK_TOKENS]; UNIT_CHANNELS], from: u32, plane: &mut [u8]) {
    let vectors = plane.as_chunks_mut::<VECTOR>().0;
    let mask = (1u8 << bits) - 1;
    let field = |c: usize, t: usize| codes[c][t] >> from & mask;
    // Fields of the tokens i and i + 32, side by side.
    let two = |c: usize, i: usize, width: u32| field(c, i) | field(c, i + VECTOR) << width;
    match bits {
        0 => {}
        1 => {
            for (i, byte) in vectors[0].iter_mut().enumerate() {
                *byte = two(0, i, 1) | two(1, i, 1) << 2 | two(2, i, 1) << 4 | two(3, i, 1) << 6;
            }
        }
        2 => {
            for (v, vector) in vectors.iter_mut().enumerate() {
                for (i, byte) in vector.iter_mut().enumerate() {
                    *byte = two(2 * v, i, 2) | two(2 * v + 1, i, 2) << 4;
                }
            }
        }
        3 => {
            for (c, vector) in vectors.iter_mut().enumerate() {
                for (i, byte) in vector.iter_mut().enumerate() {
                    let (first, second) = (field(3, i) >> c & 1, field(3, i + VECTOR) >> c & 1);
                    *byte = two(c, i, 4) | first << 3 | second << 7;
                }
            }
        }
        _ => {
            for (c, vector) in vectors.iter_mut().enumerate() {
                for (i, byte) in vector.iter_mut().enumerate() {
                    *byte = two(c, i, 4);
                }
            }
        }
    }
}

/// Reads one code of a unit.
#[inline]
pub fn get_code(unit: &[u8], bits: u32, channel_in_unit: usize, token: usize) -> u8 {
    let mut code = 0;
    pieces(bits, channel_in_unit, token, |byte, shift, n, from| {
        code |= (unit[byte] >> shift & ((1 << n) - 1)) << from;
    });
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_and_fill_their_unit() {
        for bits in 0..=MAX_BITS {
            let code = |c: usize, t: usize| ((c * 64 + t).wrapping_mul(0x9E37_79B1) >> 7) as u8 & ((1 << bits) - 1);
            let mut unit = vec![0u8; unit_bytes(bits)];
            let places = || (0..4).flat_map(|c| (0..64).map(move |t| (c, t)));
            for (c, t) in places() {
                set_code(&mut unit, bits, c, t, (1 << bits) - 1);
            }
            assert!(unit.iter().all(|b| *b == 0xff), "{bits} bits: every bit is used once");
            for (c, t) in places() {
                set_code(&mut unit, bits, c, t, code(c, t));
            }
            for (c, t) in places() {
                assert_eq!(get_code(&unit, bits, c, t), code(c, t), "{bits} bits, channel {c}, token {t}");
            }
            let rows: [[u8; 64]; 4] = std::array::from_fn(|c| std::array::from_fn(|t| code(c, t)));
            let mut whole = vec![0xaau8; unit_bytes(bits)];
            pack_unit(bits, rows.each_ref(), &mut whole);
            assert_eq!(whole, unit, "{bits} bits");
            let mut by_token = vec![0xaau8; unit_bytes(bits)];
            for t in 0..64 {
                set_codes(&mut by_token, bits, t, std::array::from_fn(|c| code(c, t)));
            }
            assert_eq!(by_token, unit, "{bits} bits, token by token");
        }
    }

    #[test]
    fn codes_lie_where_the_drawing_says() {
        let mut unit = [0u8; 128];
        set_code(&mut unit, 4, 2, 33, 0xb);
        assert_eq!(unit[2 * 32 + 1], 0xb0);
        let mut unit = [0u8; 96];
        set_code(&mut unit, 3, 3, 40, 0b101);
        assert_eq!([unit[8], unit[32 + 8], unit[64 + 8]], [0x80, 0, 0x80]);
        let mut unit = [0u8; 64];
        set_code(&mut unit, 2, 3, 5, 0b10);
        assert_eq!(unit[32 + 5], 0b10 << 4);
        let mut unit = [0u8; 192];
        set_code(&mut unit, 6, 1, 0, 0b11_0110);
        assert_eq!([unit[32], unit[128]], [0b0110, 0b11 << 4]);
    }
}
