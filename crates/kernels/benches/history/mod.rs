//! Made-up codes of a long history of one KV head.

use half::f16;
use kvquant_kernels::attend::{CodedView, HeadLut, Outliers, SideView, TokenScales};
use kvquant_quant::pack::{BLOCK_TOKENS, UNIT_CHANNELS, unit_bytes};
use kvquant_quant::{TOP, Table};

pub const HEAD_DIM: usize = 64;
/// Codes of one side of all blocks, one after another.
pub struct History {
    blocks: usize,
    widths: Vec<u8>,
    codes: Vec<u8>,
    tables: Vec<Table>,
    steps: Vec<f32>,
    scale: Vec<u16>,
    counts: Vec<u8>,
    places: Vec<u8>,
    residuals: Vec<[u8; 2]>,
}

impl History {
    pub fn new(blocks: usize, widths: &[u8], token_scales: bool, outliers_a_unit: usize) -> Self {
        let units = HEAD_DIM / 4;
        let mix = |i: usize| (i as u32).wrapping_mul(0x9E37_79B9) ^ (i as u32) << 7;
        let widths: Vec<u8> = (0..units).map(|u| widths[u % widths.len()]).collect();
        let a_block: usize = widths.iter().map(|&b| unit_bytes(b as u32)).sum();
        let table = |place: usize| {
            let entries = Table::entries(widths[place / UNIT_CHANNELS] as u32) as i16;
            // Low and high entries add up.
            let size = if entries > 16 { TOP / 2 } else { TOP };
            Table::from_entries(&(0..entries).map(|i| (i % 13 - 6) * (size / 6)).collect::<Vec<_>>())
        };
        let tables: Vec<_> = (0..if token_scales { 1 } else { HEAD_DIM }).map(table).collect();
        History {
            blocks,
            codes: (0..blocks * a_block).map(|i| (mix(i) >> 9) as u8).collect(),
            widths,
            steps: vec![1.0 / TOP as f32; tables.len()],
            tables,
            scale: if token_scales { vec![f16::ONE.to_bits(); BLOCK_TOKENS] } else { vec![] },
            counts: vec![outliers_a_unit as u8; units],
            places: (0..units * outliers_a_unit).map(|i| (mix(i) >> 5) as u8).collect(),
            residuals: vec![f16::from_f32(0.5).to_le_bytes(); units * outliers_a_unit],
        }
    }

    /// Bytes of a block: codes, scales, outliers.
    #[allow(dead_code)]
    pub fn block_bytes(&self) -> usize {
        self.codes.len() / self.blocks + 4 * self.scale.len() + self.counts.len() + 3 * self.places.len()
    }

    pub fn lut(&self) -> HeadLut<'_> {
        let group = (!self.scale.is_empty()).then_some(HEAD_DIM);
        HeadLut::new(&self.widths, &self.tables, &self.steps, &[], group).expect("sizes follow from the widths")
    }

    pub fn view<'a>(&'a self, lut: &'a HeadLut<'a>, block: usize) -> SideView<'a> {
        let bytes = self.codes.len() / self.blocks;
        let scales = (!self.scale.is_empty()).then_some(TokenScales { scale: &self.scale, zero: &self.scale });
        let outliers = Outliers { counts: &self.counts, places: &self.places, residuals: &self.residuals };
        let codes = &self.codes[block * bytes..(block + 1) * bytes];
        SideView::Coded(CodedView::new(lut, codes, scales, outliers).expect("sizes follow from the widths"))
    }
}
