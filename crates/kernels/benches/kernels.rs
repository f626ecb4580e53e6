//! Every kernel of attention by itself, per width and backend: pack, dequant, scores, outputs, outliers.
//!
//! `cargo bench -p kvquant-kernels --bench kernels`, or only some: `... --bench kernels -- scores`. Results are compared with
//! the scalar twin's first. Each case names the bytes that one run of it reads (pack: writes); "item" is a code. Outliers are
//! added within scores and outputs: what they cost is the difference between a case with 1 % of them and one without. Blocks come from the second cache; how a long history does is what the bench `attend` shows.

mod history;

use std::fmt;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use history::{HEAD_DIM, History, Kind};
use kvquant_kernels::attend::{BLOCKS as AT_ONCE, BlockView, Kernels, Rows};
use kvquant_kernels::rope::{BlockTable, Rope, Rotation};
use kvquant_quant::pack::{BLOCK_TOKENS, UNIT_CHANNELS, get_code, pack_unit, set_codes, unit_bytes};

/// Query heads of the KV head.
const GROUP: usize = 3;
/// Blocks that take turns.
const BLOCKS: usize = 64;
const ELEMENTS: usize = HEAD_DIM * BLOCK_TOKENS;
/// Outliers of a thousand entries.
const OUTLIERS: usize = 10;

/// Widths of a head's units, in turns.
const WIDTHS: [&[u8]; 8] = [&[1], &[2], &[3], &[4], &[5], &[6], &[7], &[5, 3, 3, 1]];

/// A backend, and the widths of codes.
#[derive(Clone, Copy)]
struct Case {
    kernels: Kernels,
    widths: &'static [u8],
    outliers: usize,
    bytes: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, bytes) = (self.kernels.name(), self.bytes);
        let outliers = if self.outliers > 0 { "-1%" } else { "" };
        match self.widths {
            [bits] => write!(f, "{name}, {bits} bits{outliers}, {bytes} B"),
            _ => write!(f, "{name}, mixed 3 bits, {bytes} B"),
        }
    }
}

/// Sides of mixed widths hold their channels in another order.
fn kind(widths: &[u8], token_scales: bool, outliers: usize) -> Kind<'_> {
    Kind { widths, token_scales, reordered: widths.len() > 1, outliers: outliers as f64 }
}

/// Every width on every backend, for sides with or without scales of tokens; 2 to 4 bits with outliers too.
fn cases(token_scales: bool, blocks: usize) -> Vec<Case> {
    let widths = WIDTHS.into_iter().filter(|widths| !token_scales || widths.len() == 1 && widths[0] <= 4);
    let with_outliers = [&[2][..], &[3], &[4]].map(|widths| (widths, OUTLIERS));
    let of = |(widths, outliers)| {
        let bytes = blocks * History::new(1, kind(widths, token_scales, outliers)).block_bytes();
        Kernels::available().into_iter().rev().map(move |kernels| Case { kernels, widths, outliers, bytes })
    };
    widths.map(|widths| (widths, 0)).chain(with_outliers).flat_map(of).collect()
}

fn static_cases() -> Vec<Case> {
    cases(false, AT_ONCE)
}

fn dequant_cases() -> Vec<Case> {
    cases(false, 1)
}

fn scaled_cases() -> Vec<Case> {
    cases(true, AT_ONCE)
}

/// Keys and values of one kind, and queries.
struct Setup {
    keys: History,
    values: History,
    table: BlockTable,
    origin: Rotation,
    q: Vec<f32>,
    weights: Vec<[f32; BLOCK_TOKENS]>,
}

impl Setup {
    fn new(widths: &[u8], scaled: bool, outliers: usize) -> Self {
        let rope = Rope { inv_freq: (0..HEAD_DIM / 2).map(|i| 100_000f64.powf(-(i as f64) / 32.0)).collect() };
        let noise = |i: usize| (i * 37 % 101) as f32 / 101.0 - 0.5;
        Setup {
            keys: History::new(BLOCKS, kind(widths, false, outliers)),
            values: History::new(BLOCKS, Kind { reordered: false, ..kind(widths, scaled, outliers) }),
            table: rope.block_table(),
            origin: rope.rotation(6400),
            q: (0..GROUP * HEAD_DIM).map(noise).collect(),
            weights: (0..AT_ONCE * GROUP).map(|r| std::array::from_fn(|t| noise(64 * r + t) + 0.5)).collect(),
        }
    }

    /// Calls `then` with all blocks.
    fn with<R>(&self, then: impl FnOnce(&[BlockView<'_>], &Rows<'_>) -> R) -> R {
        let (k, v) = (self.keys.lut(), self.values.lut());
        let block =
            |b| BlockView::new(self.keys.view(&k, b), self.values.view(&v, b), BLOCK_TOKENS, Some(&self.origin));
        let blocks: Vec<_> = (0..BLOCKS).map(|b| block(b).expect("both sides are whole blocks")).collect();
        let rows = Rows { q: &self.q, group: GROUP, head_dim: HEAD_DIM, first_visible: BLOCK_TOKENS };
        then(&blocks, &rows)
    }

    fn scores(&self, kernels: Kernels, blocks: &[BlockView<'_>], rows: &Rows<'_>) -> Vec<f32> {
        let mut scores = vec![[0.0; BLOCK_TOKENS]; blocks.len() * GROUP];
        kernels.scores(rows, blocks, &self.table, &mut scores);
        scores.into_flattened()
    }

    fn outputs(&self, kernels: Kernels, blocks: &[BlockView<'_>]) -> Vec<f32> {
        let mut out = vec![0.0; GROUP * HEAD_DIM];
        kernels.outputs(&self.weights, blocks, &mut out);
        out
    }
}

/// Compares every case with the scalar twin; panics where one differs.
fn check() {
    let twin = Kernels::available()[0];
    let close = |what: &str, case: &Case, got: Vec<f32>, want: Vec<f32>| {
        let size = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let worst = got.iter().zip(&want).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
        assert!(worst <= 1e-3 * size, "{what}: {case} is off by {worst} of {size}");
    };
    let mut checked = 0;
    for (scaled, cases) in [(false, static_cases()), (true, scaled_cases())] {
        for case in &cases {
            let setup = Setup::new(case.widths, scaled, case.outliers);
            setup.with(|blocks, rows| {
                let some = &blocks[..AT_ONCE];
                if !scaled {
                    let scores = |kernels| setup.scores(kernels, some, rows);
                    close("scores", case, scores(case.kernels), scores(twin));
                    let lut = setup.keys.lut();
                    let tile = |kernels: Kernels| {
                        let mut tile = vec![0.0; ELEMENTS];
                        kernels.dequant(&setup.keys.view(&lut, 0), BLOCK_TOKENS, &mut tile);
                        tile
                    };
                    assert_eq!(tile(case.kernels), tile(twin), "dequant: {case}");
                }
                close("outputs", case, setup.outputs(case.kernels, some), setup.outputs(twin, some));
            });
            checked += 1;
        }
    }
    for bits in 1..=7 {
        let (codes, mut unit) = (codes(bits), vec![0; unit_bytes(bits)]);
        pack_unit(bits, codes.each_ref(), &mut unit);
        for (c, t) in (0..UNIT_CHANNELS).flat_map(|c| (0..BLOCK_TOKENS).map(move |t| (c, t))) {
            assert_eq!(get_code(&unit, bits, c, t), codes[c][t], "pack: {bits} bits");
        }
    }
    println!("checked {checked} cases against the scalar twin; head_dim {HEAD_DIM}, {GROUP} query heads, one thread");
}

/// Codes of a unit.
fn codes(bits: u32) -> [[u8; BLOCK_TOKENS]; UNIT_CHANNELS] {
    std::array::from_fn(|c| std::array::from_fn(|t| (((c * 64 + t) * 2_654_435) >> 9) as u8 & ((1 << bits) - 1)))
}

fn main() {
    check();
    divan::main();
}

/// A unit of 4 channels x 64 tokens.
#[divan::bench(args = 1..=7, max_time = 0.2)]
fn pack_block(bencher: Bencher<'_, '_>, bits: u32) {
    let (codes, mut unit) = (codes(bits), vec![0; unit_bytes(bits)]);
    let counted = bencher.counter(BytesCount::new(unit.len())).counter(ItemsCount::new(UNIT_CHANNELS * BLOCK_TOKENS));
    counted.bench_local(|| pack_unit(bits, black_box(codes.each_ref()), black_box(&mut unit)));
}

/// The same, token by token.
#[divan::bench(args = 1..=7, max_time = 0.2)]
fn pack_tokens(bencher: Bencher<'_, '_>, bits: u32) {
    let (codes, mut unit) = (codes(bits), vec![0; unit_bytes(bits)]);
    let counted = bencher.counter(BytesCount::new(unit.len())).counter(ItemsCount::new(UNIT_CHANNELS * BLOCK_TOKENS));
    counted.bench_local(|| {
        for t in 0..BLOCK_TOKENS {
            set_codes(black_box(&mut unit), bits, t, black_box(std::array::from_fn(|c| codes[c][t])));
        }
    });
}

/// Codes of a block to f32.
#[divan::bench(args = dequant_cases(), max_time = 0.2)]
fn dequant(bencher: Bencher<'_, '_>, case: &Case) {
    let setup = Setup::new(case.widths, false, case.outliers);
    let lut = setup.keys.lut();
    let (mut tile, mut turn) = (vec![0.0; ELEMENTS], 0);
    let counted = bencher.counter(BytesCount::new(case.bytes)).counter(ItemsCount::new(ELEMENTS));
    counted.bench_local(|| {
        turn = (turn + 1) % BLOCKS;
        case.kernels.dequant(black_box(&setup.keys.view(&lut, turn)), BLOCK_TOKENS, &mut tile);
    });
}

/// Scores of four blocks.
#[divan::bench(args = static_cases(), max_time = 0.2)]
fn scores(bencher: Bencher<'_, '_>, case: &Case) {
    let setup = Setup::new(case.widths, false, case.outliers);
    setup.with(|blocks, rows| {
        let (mut scores, mut turn) = (vec![[0.0; BLOCK_TOKENS]; AT_ONCE * GROUP], 0);
        let counted = bencher.counter(BytesCount::new(case.bytes)).counter(ItemsCount::new(AT_ONCE * ELEMENTS));
        counted.bench_local(|| {
            turn = (turn + AT_ONCE) % BLOCKS;
            case.kernels.scores(rows, black_box(&blocks[turn..][..AT_ONCE]), &setup.table, &mut scores);
        });
    });
}

fn time_outputs(bencher: Bencher<'_, '_>, case: &Case, scaled: bool) {
    let setup = Setup::new(case.widths, scaled, case.outliers);
    setup.with(|blocks, _| {
        let (mut out, mut turn) = (vec![0.0; GROUP * HEAD_DIM], 0);
        let counted = bencher.counter(BytesCount::new(case.bytes)).counter(ItemsCount::new(AT_ONCE * ELEMENTS));
        counted.bench_local(|| {
            turn = (turn + AT_ONCE) % BLOCKS;
            case.kernels.outputs(&setup.weights, black_box(&blocks[turn..][..AT_ONCE]), &mut out);
        });
    });
}

/// Outputs of four blocks, a table a channel.
#[divan::bench(args = static_cases(), max_time = 0.2)]
fn outputs(bencher: Bencher<'_, '_>, case: &Case) {
    time_outputs(bencher, case, false);
}

/// Outputs of four blocks, scales and zero points of tokens.
#[divan::bench(args = scaled_cases(), max_time = 0.2)]
fn outputs_scaled(bencher: Bencher<'_, '_>, case: &Case) {
    time_outputs(bencher, case, true);
}
