//! What codes decode to: signposts as 16-bit steps, in the form that a byte shuffle reads.

use crate::pack::LOW_BITS;

/// The largest signpost in steps. Keys keep room for a rotation, which grows a channel by at most sqrt(2), and sums
/// of 256 products of steps and 16-bit queries still fit 32 bits at a fine scale.
pub const TOP: i16 = 8191;

/// Signposts of one channel: `value(code) = low[code % 16] + high[code / 16]`, in steps. The high part is 0 up to
/// 4 bits. Each part holds 16 entries, low bytes first, and repeats where it has fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Table {
    /// Low bytes of 16 entries, then their high bytes.
    pub low: [u8; 32],
    /// The same for the bits above the fourth.
    pub high: [u8; 32],
}

impl Table {
    /// A table of up to 16 low and up to 8 high entries, each a power of two in number.
    pub fn new(low: &[i16], high: &[i16]) -> Self {
        let split = |entries: &[i16]| {
            let mut bytes = [0; 32];
            for i in 0..if entries.is_empty() { 0 } else { 16 } {
                [bytes[i], bytes[16 + i]] = entries[i % entries.len()].to_le_bytes();
            }
            bytes
        };
        Table { low: split(low), high: split(high) }
    }

    /// The signpost of a code, in steps.
    pub fn value(&self, code: u8) -> i16 {
        let entry = |part: &[u8; 32], i: usize| i16::from_le_bytes([part[i], part[16 + i]]);
        entry(&self.low, (code % (1 << LOW_BITS)) as usize) + entry(&self.high, (code >> LOW_BITS) as usize)
    }
}

/// How one side of a layer decodes: `dense = step * value(code)`, times the token's scale plus its zero point where the
/// side has those. Products and sums are rounded one by one, in f32.
#[derive(Debug, Clone)]
pub struct Lut {
    /// Whether every channel has a table of its own; otherwise one serves all.
    pub per_channel: bool,
    /// Bits of the codes of each unit of 4 places `[C / 4]`.
    pub widths: Vec<u8>,
    /// `[C]`, or one; by place.
    pub tables: Vec<Table>,
    /// `[C]`, or one; by place. Both channels of a RoPE pair share a step.
    pub steps: Vec<f32>,
    /// The channel in its head that each place holds `[C]`; empty where they are the same. Pairs (2i, 2i + 1) of keys
    /// stay neighbours.
    pub order: Vec<u16>,
}

impl Lut {
    /// Tables from signposts per channel (or one list for all), with one width for all units.
    pub(crate) fn uniform(signposts: &[Vec<f32>], per_channel: bool, channels: usize, bits: u32) -> Self {
        let mut tables = Vec::with_capacity(signposts.len());
        let mut steps = Vec::with_capacity(signposts.len());
        // Two by two: a pair shares its step.
        for pair in signposts.chunks(2) {
            let top = pair.iter().flatten().fold(0.0f32, |m, x| m.max(x.abs()));
            let step = if top > 0.0 { (top / TOP as f32).max(f32::MIN_POSITIVE) } else { 1.0 };
            for posts in pair {
                let low: Vec<i16> = posts.iter().map(|x| (x / step).round() as i16).collect();
                tables.push(Table::new(&low, &[]));
                steps.push(step);
            }
        }
        let widths = vec![bits as u8; channels.div_ceil(crate::pack::UNIT_CHANNELS)];
        Lut { per_channel, widths, tables, steps, order: Vec::new() }
    }

    /// The dense value of a code at a place, before any per-token scale.
    pub fn dense(&self, place: usize, code: u8) -> f32 {
        let i = if self.per_channel { place } else { 0 };
        self.tables[i].value(code) as f32 * self.steps[i]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_repeat_and_add() {
        let t = Table::new(&[-300, 5, 7, 8191], &[]);
        assert_eq!([t.value(0), t.value(3), t.value(4), t.value(7)], [-300, 8191, -300, 8191]);
        let low: Vec<i16> = (0..16).map(|i| i * 10).collect();
        let t = Table::new(&low, &[-1000, 1000]);
        assert_eq!([t.value(0), t.value(15), t.value(16), t.value(31)], [-1000, -850, 1000, 1150]);
    }

    #[test]
    fn a_pair_shares_its_step() {
        let lut = Lut::uniform(&[vec![-1.0, 2.0], vec![0.0, 0.5], vec![0.0, 0.0], vec![0.0, 0.0]], true, 4, 1);
        assert_eq!(lut.steps[0], lut.steps[1]);
        assert!((lut.dense(0, 1) - 2.0).abs() < 1e-6 && (lut.dense(1, 1) - 0.5).abs() < 2e-4);
        assert_eq!((lut.dense(2, 1), lut.steps[2]), (0.0, 1.0));
    }
}
