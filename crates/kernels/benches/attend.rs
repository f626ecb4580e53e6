//! Decode attention over a long history of one KV head: time, bytes and the ratio to an fp16 history in the same run.
//!
//! `cargo bench -p kvquant-kernels --bench attend`, or only some lines: `... --bench attend -- avx2 nuq3`

mod history;

use std::hint::black_box;
use std::time::Instant;

use half::f16;
use history::{HEAD_DIM, History, Kind};
use kvquant_kernels::attend::{BLOCKS as AT_ONCE, BlockView, Kernels, PreparedRows, Rows, RowsRoom, SideView, State};
use kvquant_kernels::rope::Rope;
use kvquant_quant::pack::BLOCK_TOKENS;

const GROUP: usize = 3;
/// 64 MB of fp16 keys and values: beyond any cache.
const BLOCKS: usize = 4096;
/// Blocks that stay in the first cache, to see what is not the memory's.
const HOT: usize = 2;

/// Seconds a block, over `distinct` blocks again and again.
fn time<'a>(kernels: Kernels, distinct: usize, block: impl Fn(usize) -> (SideView<'a>, SideView<'a>)) -> f64 {
    let rope = Rope { inv_freq: (0..HEAD_DIM / 2).map(|i| 100_000f64.powf(-(i as f64) / 32.0)).collect() };
    let table = rope.block_table();
    let origin = rope.rotation(6400);
    let q: Vec<f32> = (0..GROUP * HEAD_DIM).map(|i| ((i * 37 % 101) as f32 / 101.0 - 0.5) * 0.1).collect();
    let rows = Rows { q: &q, group: GROUP, head_dim: HEAD_DIM, first_visible: BLOCK_TOKENS };
    let mut room = RowsRoom::default();
    let blocks = if kernels.name() == "scalar" { BLOCKS / 16 } else { BLOCKS };
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let mut state = State::empty(GROUP, HEAD_DIM);
        let mut prepared = PreparedRows::new(rows, &mut room);
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
            kernels.attend_all(&mut prepared, &now, &next, &table, &mut state);
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
    println!("one thread, head_dim {HEAD_DIM}, {GROUP} query heads; times for a block of 64 tokens, keys and values");
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
            let kind = Kind { widths: &[bits], token_scales: false, reordered: false, outliers: 10.0 };
            let (k, v) = (History::new(BLOCKS, kind), History::new(BLOCKS, Kind { token_scales: true, ..kind }));
            let (k_lut, v_lut) = (k.lut(), v.lut());
            let t = [BLOCKS, HOT].map(|n| time(kernels, n, |b| (k.view(&k_lut, b), v.view(&v_lut, b))));
            row(&name, bits as f64 + 0.36, t);
        }
        // Widths of about as many units as fits of real models have.
        let widths = [
            (4, [7u8, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 2]),
            (3, [5, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 1]),
            (2, [4, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0]),
        ];
        for (mean, widths) in widths {
            let name = format!("mixed {mean}");
            if !wanted(kernels, &name) {
                continue;
            }
            let kind = Kind { widths: &widths, token_scales: false, reordered: true, outliers: 3.0 };
            let (k, v) = (History::new(BLOCKS, kind), History::new(BLOCKS, Kind { reordered: false, ..kind }));
            let (k_lut, v_lut) = (k.lut(), v.lut());
            let t = [BLOCKS, HOT].map(|n| time(kernels, n, |b| (k.view(&k_lut, b), v.view(&v_lut, b))));
            row(&name, mean as f64 + 0.13, t);
        }
    }
}
