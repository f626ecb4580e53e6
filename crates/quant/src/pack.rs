//! The unit: 256 codes of 4 channels x 64 tokens.
//!
//! ```text
//! A block holds 64 tokens of one layer, kv head and side: head_dim / 4 units, channel by channel.
//! A unit is 8 lanes x b words of 32 bits, word-major (one 256-bit load = one word of every lane):
//!   u32 words[w * 8 + lane],  w in 0..b
//! lane l holds a stream of 32*b bits: code n = channel_in_unit * 8 + m  of token  t = 8*m + l,  m in 0..8
//! at bits [n*b, n*b + b) of the stream, low bits first, crossing words where they fall.
//! ```
/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 64;
/// Channels in a unit.
pub const UNIT_CHANNELS: usize = 4;
/// Lanes of 32 bits in a unit.
pub const LANES: usize = 8;
/// Words of 32 bits in a unit of `bits`-bit codes.
pub const fn unit_words(bits: u32) -> usize {
    LANES * bits as usize
}
/// ORs one code into a zeroed place of a unit.
#[inline]
pub fn set_code(unit: &mut [u32], bits: u32, channel_in_unit: usize, token: usize, code: u8) {
    let (lane, m) = (token % LANES, token / LANES);
    let bit = (channel_in_unit * 8 + m) * bits as usize;
    let (w, s) = (bit / 32, bit % 32);
    unit[w * LANES + lane] |= (code as u32) << s;
    if s + bits as usize > 32 {
        unit[(w + 1) * LANES + lane] |= (code as u32) >> (32 - s);
    }
}
/// Reads one code.
#[inline]
pub fn get_code(unit: &[u32], bits: u32, channel_in_unit: usize, token: usize) -> u8 {
    let (lane, m) = (token % LANES, token / LANES);
    let bit = (channel_in_unit * 8 + m) * bits as usize;
    let (w, s) = (bit / 32, bit % 32);
    let mut v = unit[w * LANES + lane] >> s;
    if s + bits as usize > 32 {
        v |= unit[(w + 1) * LANES + lane] << (32 - s);
    }
    (v & ((1 << bits) - 1)) as u8
}
/// Clears one code, so that it can be set again (truncate).
#[inline]
pub fn clear_code(unit: &mut [u32], bits: u32, channel_in_unit: usize, token: usize) {
    let (lane, m) = (token % LANES, token / LANES);
    let bit = (channel_in_unit * 8 + m) * bits as usize;
    let (w, s) = (bit / 32, bit % 32);
    let mask = (1u32 << bits) - 1;
    unit[w * LANES + lane] &= !(mask << s);
    if s + bits as usize > 32 {
        unit[(w + 1) * LANES + lane] &= !(mask >> (32 - s));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_and_lie_where_the_drawing_says() {
        for bits in 1..=7u32 {
            let code = |c: usize, t: usize| ((c * 64 + t).wrapping_mul(0x9E37_79B1) >> 7) as u8 & ((1 << bits) - 1);
            let mut unit = vec![0u32; unit_words(bits)];
            for (c, t) in (0..4).flat_map(|c| (0..64).map(move |t| (c, t))) {
                set_code(&mut unit, bits, c, t, code(c, t));
            }
            for (c, t) in (0..4).flat_map(|c| (0..64).map(move |t| (c, t))) {
                assert_eq!(get_code(&unit, bits, c, t), code(c, t));
                // Bit by bit from the lane's stream.
                let first = (c * 8 + t / 8) * bits as usize;
                let read = (0..bits as usize).fold(0, |x, i| {
                    let bit = first + i;
                    x | (unit[bit / 32 * LANES + t % 8] >> (bit % 32) & 1) << i
                });
                assert_eq!(read as u8, code(c, t), "bits {bits} channel {c} token {t}");
            }
            clear_code(&mut unit, bits, 2, 37);
            assert_eq!(get_code(&unit, bits, 2, 37), 0);
            assert_eq!(get_code(&unit, bits, 2, 29), code(2, 29));
            assert_eq!(get_code(&unit, bits, 2, 45), code(2, 45));
        }
    }
}
