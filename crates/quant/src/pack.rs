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
pub const fn unit_words(bits: u32) -> usize { LANES * bits as usize }
/// ORs one code into a zeroed place of a unit.
#[inline] pub fn set_code(unit: &mut [u32], bits: u32, channel_in_unit: usize, token: usize, code: u8) {
    let (lane, m) = (token % LANES, token / LANES);
    let bit = (channel_in_unit * 8 + m) * bits as usize;
    let (w, s) = (bit / 32, bit % 32);
    unit[w * LANES + lane] |= (code as u32) << s;
    if s + bits as usize > 32 { unit[(w + 1) * LANES + lane] |= (code as u32) >> (32 - s); }
}
/// Reads one code.
#[inline] pub fn get_code(unit: &[u32], bits: u32, channel_in_unit: usize, token: usize) -> u8 {
    let (lane, m) = (token % LANES, token / LANES);
    let bit = (channel_in_unit * 8 + m) * bits as usize;
    let (w, s) = (bit / 32, bit % 32);
    let mut v = unit[w * LANES + lane] >> s;
    if s + bits as usize > 32 { v |= unit[(w + 1) * LANES + lane] << (32 - s); }
    (v & ((1 << bits) - 1)) as u8
}
/// Clears one code, so that it can be set again (truncate).
#[inline] pub fn clear_code(unit: &mut [u32], bits: u32, channel_in_unit: usize, token: usize) {
    let (lane, m) = (token % LANES, token / LANES);
    let bit = (channel_in_unit * 8 + m) * bits as usize;
    let (w, s) = (bit / 32, bit % 32);
    let mask = (1u32 << bits) - 1;
    unit[w * LANES + lane] &= !(mask << s);
    if s + bits as usize > 32 { unit[(w + 1) * LANES + lane] &= !(mask >> (32 - s)); }
}
