//! Decode attention over a long history of one KV head: time, bytes and the ratio to an fp16 history in the same run.
//!
//! `cargo bench -p kvquant-kernels --bench attend`, or only some lines: `... --bench attend -- avx2 nuq3`

use std::hint::black_box;
use std::time::Instant;

use half::f16;
use kvquant_kernels::attend::{
    BLOCKS as AT_ONCE, BlockView, CodedView, HeadLut, Kernels, Outliers, Rows, SideView, State, TokenScales,
};
use kvquant_kernels::rope::Rope;
use kvquant_quant::pack::{BLOCK_TOKENS, unit_bytes};
use kvquant_quant::{TOP, Table};

const HEAD_DIM: usize = 64;
const GROUP: usize = 3;
/// 64 MB of fp16 keys and values: beyond any cache.
const BLOCKS: usize = 4096;
/// Blocks that stay in the first cache, to see what is not the memory's.
const HOT: usize = 2;

/// Codes of one side of all blocks, one after another.
struct History {
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
    fn new(widths: &[u8], token_scales: bool, outliers_a_unit: usize) -> Self {
        let units = HEAD_DIM / 4;
        let mix = |i: usize| (i as u32).wrapping_mul(0x9E37_79B9) ^ (i as u32) << 7;
        let widths: Vec<u8> = (0..units).map(|u| widths[u % widths.len()]).collect();
        let a_block: usize = widths.iter().map(|&b| unit_bytes(b as u32)).sum();
        let tables = if token_scales { 1 } else { HEAD_DIM };
        let low: Vec<i16> = (0..16).map(|i| (i % 13 - 6) * TOP / 12).collect();
        History {
            widths,
            codes: (0..BLOCKS * a_block).map(|i| (mix(i) >> 9) as u8).collect(),
            tables: vec![Table::new(&low, &[0, 1, 2, 3]); tables],
            steps: vec![1.0 / TOP as f32; tables],
            scale: if token_scales { vec![f16::ONE.to_bits(); BLOCK_TOKENS] } else { vec![] },
            counts: vec![outliers_a_unit as u8; units],
            places: (0..units * outliers_a_unit).map(|i| (mix(i) >> 5) as u8).collect(),
            residuals: vec![f16::from_f32(0.5).to_le_bytes(); units * outliers_a_unit],
        }
    }

    fn lut(&self) -> HeadLut<'_> {
        let group = (!self.scale.is_empty()).then_some(HEAD_DIM);
        HeadLut::new(&self.widths, &self.tables, &self.steps, &[], group).expect("sizes follow from the widths")
    }

    fn view<'a>(&'a self, lut: &'a HeadLut<'a>, block: usize) -> SideView<'a> {
        let bytes = self.codes.len() / BLOCKS;
        let scales = (!self.scale.is_empty()).then_some(TokenScales { scale: &self.scale, zero: &self.scale });
        let outliers = Outliers { counts: &self.counts, places: &self.places, residuals: &self.residuals };
        let codes = &self.codes[block * bytes..(block + 1) * bytes];
        SideView::Coded(CodedView::new(lut, codes, scales, outliers).expect("sizes follow from the widths"))
    }
}

/// Seconds a block, over `distinct` blocks again and again.
fn time<'a>(kernels: Kernels, distinct: usize, block: impl Fn(usize) -> (SideView<'a>, SideView<'a>)) -> f64 {
    let rope = Rope { inv_freq: (0..HEAD_DIM / 2).map(|i| 100_000f64.powf(-(i as f64) / 32.0)).collect() };
    let table = rope.block_table();
    let origin = rope.rotation(6400);
    let q: Vec<f32> = (0..GROUP * HEAD_DIM).map(|i| ((i * 37 % 101) as f32 / 101.0 - 0.5) * 0.1).collect();
    let rows = Rows { q: &q, group: GROUP, head_dim: HEAD_DIM, first_visible: BLOCK_TOKENS };
    let blocks = if kernels.name() == "scalar" { BLOCKS / 16 } else { BLOCKS };
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let mut state = State::empty(GROUP, HEAD_DIM);
        let start = Instant::now();
        let view = |b: usize| {
            let (k, v) = block(b % distinct);
            BlockView::new(k, v, BLOCK_TOKENS, Some(&origin)).expect("both sides are whole blocks")
        };
        let (mut now, mut next) = (Vec::new(), (0..AT_ONCE).map(view).collect::<Vec<_>>());
        for first in (0..blocks).step_by(AT_ONCE) {
            std::mem::swap(&mut now, &mut next);
            next.clear();
            for b in first + AT_ONCE..first + 2 * AT_ONCE {
                next.push(view(b));
            }
            kernels.attend_all(&rows, &now, &next, &table, &mut state);
        }
        black_box(&state);
        best = best.min(start.elapsed().as_secs_f64() / blocks as f64);
    }
    best
}

fn main() {
    // Every word given must occur in a line's first two columns.
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |kernels: Kernels, name: &str| {
        words.iter().all(|w| kernels.name().contains(w.as_str()) || name.contains(w.as_str()))
    };
    let half: Vec<u16> = (0..BLOCKS * HEAD_DIM * BLOCK_TOKENS)
        .map(|i| f16::from_f32((i * 7919 % 2003) as f32 / 1000.0 - 1.0).to_bits())
        .collect();
    let tile = |b: usize| SideView::Tile { data: &half[b * HEAD_DIM * 64..(b + 1) * HEAD_DIM * 64] };
    println!(
        "one thread, head_dim {HEAD_DIM}, {GROUP} query heads, 1 % outliers; times for a block of 64 tokens, keys and values"
    );
    println!(
        "{:8} {:12} {:>9} {:>9} {:>9} {:>11} {:>14}",
        "backend", "cache", "us/block", "us in L1", "GB/s", "elements/ns", "time to fp16's"
    );
    for kernels in Kernels::available().into_iter().rev() {
        let elements = (2 * HEAD_DIM * BLOCK_TOKENS) as f64;
        let names = ["nuq4-1%", "nuq3-1%", "nuq2-1%", "mixed 4", "mixed 3", "mixed 2"];
        if !names.iter().any(|n| wanted(kernels, n)) {
            continue;
        }
        let fp16 = [BLOCKS, HOT].map(|n| time(kernels, n, |b| (tile(b), tile(b))));
        let row = |name: &str, bits: f64, [t, hot]: [f64; 2]| {
            println!(
                "{:8} {name:12} {:9.3} {:9.3} {:9.2} {:11.2} {:14.2}",
                kernels.name(),
                t * 1e6,
                hot * 1e6,
                elements * bits / 8e9 / t,
                elements / t / 1e9,
                t / fp16[0]
            );
        };
        row("fp16", 16.0, fp16);
        for bits in [4, 3, 2] {
            let name = format!("nuq{bits}-1%");
            if !wanted(kernels, &name) {
                continue;
            }
            let (k, v) = (History::new(&[bits], false, 3), History::new(&[bits], true, 3));
            let (k_lut, v_lut) = (k.lut(), v.lut());
            let t = [BLOCKS, HOT].map(|n| time(kernels, n, |b| (k.view(&k_lut, b), v.view(&v_lut, b))));
            row(&name, bits as f64 + 0.36, t);
        }
        for (mean, widths) in [(4, [6u8, 4, 3, 3]), (3, [5, 3, 3, 1]), (2, [4, 2, 1, 1])] {
            let name = format!("mixed {mean}");
            if !wanted(kernels, &name) {
                continue;
            }
            let (k, v) = (History::new(&widths, false, 0), History::new(&widths, false, 0));
            let (k_lut, v_lut) = (k.lut(), v.lut());
            let t = [BLOCKS, HOT].map(|n| time(kernels, n, |b| (k.view(&k_lut, b), v.view(&v_lut, b))));
            row(&name, mean as f64, t);
        }
    }
}
