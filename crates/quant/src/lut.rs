//! What codes decode to: signposts as 16-bit steps, in the forms that shuffles of bytes and of words read.

use crate::mixed::MixedFit;
use crate::pack::{LOW_BITS, UNIT_CHANNELS};

/// The largest signpost in steps. Keys keep room for a rotation, which grows a channel by at most sqrt(2), and sums
/// of 256 products of steps and 16-bit queries still fit 32 bits at a fine scale.
pub const TOP: i16 = 8191;

/// Signposts of one channel, in steps: two parts of 16 entries, low bytes first, that repeat where they have fewer.
///
/// ```text
/// 0 to 4 bits   value(code) = low[code]
/// 5 bits        value(code) = low[code] below 16, high[code - 16] from there on
/// 6, 7 bits     value(code) = low[code % 16] + high[code / 16]
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Table {
    /// Low bytes of 16 entries, then their high bytes.
    pub low: [u8; 32],
    /// For 5 bits and more.
    pub high: [u8; 32],
    /// Both parts once more, word by word; the low part twice where there is no high one.
    pub words: [[i16; 16]; 2],
}

impl Table {
    /// A table of up to 16 low and up to 16 high entries, each a power of two in number.
    pub fn new(low: &[i16], high: &[i16]) -> Self {
        let full = |entries: &[i16]| -> [i16; 16] {
            std::array::from_fn(|i| if entries.is_empty() { 0 } else { entries[i % entries.len()] })
        };
        let split = |entries: [i16; 16]| {
            let mut bytes = [0; 32];
            for (i, entry) in entries.into_iter().enumerate() {
                [bytes[i], bytes[16 + i]] = entry.to_le_bytes();
            }
            bytes
        };
        let parts = [full(low), full(high)];
        let words = if high.is_empty() { [parts[0]; 2] } else { parts };
        Table { low: split(parts[0]), high: split(parts[1]), words }
    }

    /// How many entries signposts of so many bits take.
    pub const fn entries(bits: u32) -> usize {
        if bits <= LOW_BITS + 1 { 1 << bits } else { (1 << LOW_BITS) + (1 << (bits - LOW_BITS)) }
    }

    /// A table from its entries, the low ones first.
    pub fn from_entries(entries: &[i16]) -> Self {
        let (low, high) = entries.split_at(entries.len().min(1 << LOW_BITS));
        Table::new(low, high)
    }

    /// The signpost of a code of so many bits, in steps.
    pub fn value(&self, bits: u32, code: u8) -> i16 {
        let entry = |part: &[u8; 32], i: u8| i16::from_le_bytes([part[i as usize], part[16 + i as usize]]);
        let (low, high) = (code % (1 << LOW_BITS), code >> LOW_BITS);
        match bits {
            0..=LOW_BITS => entry(&self.low, low),
            5 if high > 0 => entry(&self.high, low),
            5 => entry(&self.low, low),
            _ => entry(&self.low, low).wrapping_add(entry(&self.high, high)),
        }
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
    /// The channel in its head that each place holds `[C]`; empty where they are the same.
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
        let widths = vec![bits as u8; channels.div_ceil(UNIT_CHANNELS)];
        Lut { per_channel, widths, tables, steps, order: Vec::new() }
    }

    /// Tables by place with widths that differ.
    pub(crate) fn mixed(fit: &MixedFit, head_dim: usize) -> Self {
        let mut rest = &fit.posts[..];
        let tables = (0..fit.steps.len()).map(|place| {
            let (entries, next) = rest.split_at(Table::entries(fit.widths[place / UNIT_CHANNELS] as u32));
            rest = next;
            Table::from_entries(entries)
        });
        let tables = tables.collect();
        let in_order = fit.order.iter().enumerate().all(|(place, c)| place % head_dim == *c as usize);
        let order = if in_order { Vec::new() } else { fit.order.clone() };
        Lut { per_channel: true, widths: fit.widths.clone(), tables, steps: fit.steps.clone(), order }
    }

    /// The dense value of a code at a place, before any per-token scale.
    pub fn dense(&self, place: usize, code: u8) -> f32 {
        let i = if self.per_channel { place } else { 0 };
        self.tables[i].value(self.widths[place / UNIT_CHANNELS] as u32, code) as f32 * self.steps[i]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_repeat_and_add() {
        let t = Table::new(&[-300, 5, 7, 8191], &[]);
        assert_eq!([t.value(2, 0), t.value(2, 3)], [-300, 8191]);
        assert_eq!(t.low[..4], t.low[4..8], "noise in the upper bits of a code does not matter");
        let low: Vec<i16> = (0..16).map(|i| i * 10).collect();
        let t = Table::new(&low, &[-1000, -500, 500, 1000]);
        assert_eq!([t.value(6, 0), t.value(6, 15), t.value(6, 16), t.value(6, 63)], [-1000, -850, -500, 1150]);
        let entries: Vec<i16> = (0..32).map(|i| i * i).collect();
        let t = Table::from_entries(&entries);
        assert!((0..32).all(|i| t.value(5, i) == entries[i as usize]));
        assert_eq!([0, 4, 5, 6, 7].map(Table::entries), [1, 16, 32, 20, 24]);
    }

    #[test]
    fn a_pair_shares_its_step() {
        let lut = Lut::uniform(&[vec![-1.0, 2.0], vec![0.0, 0.5], vec![0.0, 0.0], vec![0.0, 0.0]], true, 4, 1);
        assert_eq!(lut.steps[0], lut.steps[1]);
        assert!((lut.dense(0, 1) - 2.0).abs() < 1e-6 && (lut.dense(1, 1) - 0.5).abs() < 2e-4);
        assert_eq!((lut.dense(2, 1), lut.steps[2]), (0.0, 1.0));
    }
}
