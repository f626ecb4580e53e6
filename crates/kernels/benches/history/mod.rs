//! Made-up codes of a long history of one KV head.

use half::f16;
use kvquant_kernels::attend::{CodedView, HeadLut, Outliers, SideView, TokenScales};
use kvquant_quant::pack::{BLOCK_TOKENS, UNIT_CHANNELS, unit_bytes};
use kvquant_quant::{TOP, Table};

pub const HEAD_DIM: usize = 64;
/// What a side of a cache is like.
#[derive(Clone, Copy)]
pub struct Kind<'a> {
    /// Widths of units, over and over.
    pub widths: &'a [u8],
    /// Tokens have scales; otherwise channels have tables.
    pub token_scales: bool,
    /// Places hold the head's channels in another order.
    pub reordered: bool,
    /// Outliers of a thousand entries.
    pub outliers: f64,
}

/// Codes of one side of all blocks, one after another.
pub struct History {
    blocks: usize,
    widths: Vec<u8>,
    codes: Vec<u8>,
    tables: Vec<Table>,
    steps: Vec<f32>,
    order: Vec<u16>,
    scale: Vec<u16>,
    /// `[blocks, units]`
    counts: Vec<u8>,
    /// Of all blocks; those of block b begin at `starts[b]`.
    starts: Vec<usize>,
    places: Vec<u8>,
    residuals: Vec<[u8; 2]>,
}

/// The same numbers each time, which no branch predictor learns.
fn mix(i: usize) -> u32 {
    let x = (i as u32).wrapping_mul(0x9E37_79B9) ^ (i as u32) << 7;
    (x ^ x >> 15).wrapping_mul(0x85EB_CA6B)
}

/// Half of the RoPE pairs together, as in fits of real models.
fn order() -> Vec<u16> {
    let pairs = |of: usize| (0..HEAD_DIM / 2).filter(move |p| p % 2 == of).map(|p| 2 * p);
    let whole = pairs(0).flat_map(|c| [c, c + 1]);
    let order: Vec<usize> = whole.chain(pairs(1)).chain(pairs(1).map(|c| c + 1)).collect();
    // Both kinds in all runs.
    let units = order.as_chunks::<UNIT_CHANNELS>().0;
    let turns = (0..units.len()).map(|u| units[u / 2 + u % 2 * units.len() / 2]);
    turns.flatten().map(|c| c as u16).collect()
}

impl History {
    pub fn new(blocks: usize, kind: Kind<'_>) -> Self {
        let units = HEAD_DIM / 4;
        let widths: Vec<u8> = (0..units).map(|u| kind.widths[u % kind.widths.len()]).collect();
        let a_block: usize = widths.iter().map(|&b| unit_bytes(b as u32)).sum();
        let table = |place: usize| {
            let entries = Table::entries(widths[place / UNIT_CHANNELS] as u32) as i16;
            // Low and high entries add up.
            let size = if entries > 16 { TOP / 2 } else { TOP };
            Table::from_entries(&(0..entries).map(|i| (i % 13 - 6) * (size / 6)).collect::<Vec<_>>())
        };
        let tables: Vec<_> = (0..if kind.token_scales { 1 } else { HEAD_DIM }).map(table).collect();
        // Sixteen draws for each unit.
        let share = kind.outliers / 1000.0 * (UNIT_CHANNELS * BLOCK_TOKENS) as f64 / 16.0;
        let drawn = |unit: usize| (0..16).filter(|d| (mix(unit * 16 + d) as f64) < share * 2f64.powi(32)).count() as u8;
        let counts: Vec<u8> = (0..blocks * units).map(drawn).collect();
        let mut starts = vec![0];
        for counts in counts.chunks_exact(units) {
            starts.push(starts[starts.len() - 1] + counts.iter().map(|&n| n as usize).sum::<usize>());
        }
        let outliers = starts[blocks];
        History {
            blocks,
            codes: (0..blocks * a_block).map(|i| (mix(i) >> 9) as u8).collect(),
            widths,
            steps: vec![1.0 / TOP as f32; tables.len()],
            tables,
            order: if kind.reordered { order() } else { vec![] },
            scale: if kind.token_scales { vec![f16::ONE.to_bits(); BLOCK_TOKENS] } else { vec![] },
            counts,
            starts,
            places: (0..outliers).map(|i| (mix(i) >> 5) as u8).collect(),
            residuals: vec![f16::from_f32(0.5).to_le_bytes(); outliers],
        }
    }

    /// Bytes of a block: codes, scales, outliers.
    #[allow(dead_code)]
    pub fn block_bytes(&self) -> usize {
        let of_all = self.codes.len() + self.counts.len() + 3 * self.places.len();
        of_all / self.blocks + 4 * self.scale.len()
    }

    pub fn lut(&self) -> HeadLut<'_> {
        let group = (!self.scale.is_empty()).then_some(HEAD_DIM);
        HeadLut::new(&self.widths, &self.tables, &self.steps, &self.order, group).expect("sizes follow from the widths")
    }

    pub fn view<'a>(&'a self, lut: &'a HeadLut<'a>, block: usize) -> SideView<'a> {
        let (bytes, units) = (self.codes.len() / self.blocks, self.widths.len());
        let scales = (!self.scale.is_empty()).then_some(TokenScales { scale: &self.scale, zero: &self.scale });
        let listed = self.starts[block]..self.starts[block + 1];
        let outliers = Outliers {
            counts: &self.counts[block * units..(block + 1) * units],
            places: &self.places[listed.clone()],
            residuals: &self.residuals[listed],
        };
        let codes = &self.codes[block * bytes..(block + 1) * bytes];
        SideView::Coded(CodedView::new(lut, codes, scales, outliers).expect("sizes follow from the widths"))
    }
}
