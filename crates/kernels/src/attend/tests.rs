//! One suite over every backend that this CPU has: decoding is compared bit for bit with the scalar twin,
//! attention with an f64 reference that shares no code with the kernels.

use std::io::Write;

use half::f16;
use kvquant_quant::pack::{BLOCK_TOKENS, get_code, set_code, unit_bytes};
use kvquant_quant::{TOP, Table};

use super::*;
use crate::rope::Rope;

mod hard;

/// Attention agrees with f64 to ATOL * size + RTOL * |reference|, where size is the largest key or value. Integer
/// kernels round signposts' rotations to 1/8191 of their table's largest and queries to 11 bits or more.
const ATOL: f64 = 4e-4;
const RTOL: f64 = 4e-4;

/// A small generator, so that failures repeat.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }
    fn vec(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * size).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Rows,
    Tile,
    /// Tables by channel, one width.
    Static(u32),
    /// Tables by channel, widths that change from unit to unit, channels in another order.
    Mixed,
    /// One table; bits, channels of a scale group (0: the whole head), zero points
    Token(u32, usize, bool),
}

const FORMS: [Form; 18] = [
    Form::Rows,
    Form::Tile,
    Form::Static(0),
    Form::Static(1),
    Form::Static(2),
    Form::Static(3),
    Form::Static(4),
    Form::Static(5),
    Form::Static(6),
    Form::Static(7),
    Form::Mixed,
    Form::Token(2, 0, true),
    Form::Token(3, 0, true),
    Form::Token(4, 0, true),
    Form::Token(3, 4, false),
    Form::Token(4, 4, true),
    Form::Token(2, 4, true),
    Form::Token(4, 0, false),
];

/// One side with everything that its view borrows.
struct Owned {
    form: Form,
    d: usize,
    codes: Vec<u8>,
    widths: Vec<u8>,
    tables: Vec<Table>,
    steps: Vec<f32>,
    order: Vec<u16>,
    halves: Vec<u16>,
    zero: Vec<u16>,
    group: usize,
    counts: Vec<u8>,
    places: Vec<u8>,
    residuals: Vec<[u8; 2]>,
    /// Channel by channel, from what was put in.
    exact: Vec<f64>,
}

impl Owned {
    fn new(n: &mut Noise, form: Form, d: usize, len: usize, size: f32, outliers: usize) -> Self {
        let mut o = Owned {
            form,
            d,
            codes: vec![],
            widths: vec![],
            tables: vec![],
            steps: vec![],
            order: vec![],
            halves: vec![],
            zero: vec![],
            group: 0,
            counts: vec![],
            places: vec![],
            residuals: vec![],
            exact: vec![0.0; d * BLOCK_TOKENS],
        };
        let half = |n: &mut Noise| f16::from_f32(n.unit() * size).to_bits();
        let wide = |bits: u16| f16::from_bits(bits).to_f64();
        match form {
            Form::Rows | Form::Tile => {
                o.halves = (0..d * BLOCK_TOKENS).map(|_| half(n)).collect();
                for (c, t) in (0..d).flat_map(|c| (0..len).map(move |t| (c, t))) {
                    let at = if form == Form::Rows { t * d + c } else { c * BLOCK_TOKENS + t };
                    o.exact[c * BLOCK_TOKENS + t] = wide(o.halves[at]);
                }
                return o;
            }
            Form::Static(b) => o.widths = vec![b as u8; d / 4],
            Form::Mixed => {
                o.widths = (0..d / 4).map(|_| n.below(8) as u8).collect();
                // Pairs in any order; from some place on channels in any order.
                let mut pairs: Vec<[u16; 2]> = (0..d as u16 / 2).map(|p| [2 * p, 2 * p + 1]).collect();
                (1..pairs.len()).rev().for_each(|i| pairs.swap(i, n.below(i + 1)));
                o.order = pairs.into_flattened();
                let apart = &mut o.order[n.below(d + 1)..];
                (1..apart.len()).rev().for_each(|i| apart.swap(i, n.below(i + 1)));
            }
            Form::Token(b, g, zero) => {
                o.widths = vec![b as u8; d / 4];
                o.group = if g == 0 { d } else { g };
                o.halves = (0..d / o.group * BLOCK_TOKENS).map(|_| half(n)).collect();
                if zero {
                    o.zero = (0..o.halves.len()).map(|_| half(n)).collect();
                }
            }
        }
        // Steps are shared by a pair; the largest value of a table is its size.
        let by_channel = o.group == 0;
        let of_pairs: Vec<f32> = (0..d / 2)
            .map(|_| (0.2 + 0.8 * n.unit().abs()) * if by_channel { size } else { 1.0 } / TOP as f32)
            .collect();
        for i in 0..if by_channel { d } else { 1 } {
            o.steps.push(of_pairs[o.order.get(i).map_or(i, |c| *c as usize) / 2]);
            let bits = o.widths[i / 4] as u32;
            let mut posts =
                |bits: u32, top: i16| -> Vec<i16> { (0..1 << bits).map(|_| (n.unit() * top as f32) as i16).collect() };
            let (low, high) = match bits {
                0..=4 => (posts(bits, TOP), vec![]),
                5 => (posts(4, TOP), posts(4, TOP)),
                _ => (posts(4, TOP / 8), posts(bits - 4, TOP / 8 * 7)),
            };
            o.tables.push(Table::new(&low, &high));
        }
        for u in 0..d / 4 {
            let bits = o.widths[u] as u32;
            let mut unit = vec![0; unit_bytes(bits)];
            let mut places: Vec<u8> =
                (0..n.below(outliers + 1)).map(|_| (n.below(4) * 64 + n.below(len)) as u8).collect();
            places.sort();
            places.dedup();
            for (i, t) in (0..4).flat_map(|i| (0..len).map(move |t| (i, t))) {
                let code = n.below(1 << bits) as u8;
                set_code(&mut unit, bits, i, t, code);
                assert_eq!(get_code(&unit, bits, i, t), code);
                let place = 4 * u + i;
                let c = o.order.get(place).map_or(place, |c| *c as usize);
                let table = if by_channel { place } else { 0 };
                let mut x = o.steps[table] as f64 * o.tables[table].value(bits, code) as f64;
                if !by_channel {
                    let at = c / o.group * BLOCK_TOKENS + t;
                    x = wide(o.halves[at]) * x + o.zero.get(at).map_or(0.0, |z| wide(*z));
                }
                o.exact[c * BLOCK_TOKENS + t] = x;
            }
            o.codes.extend(unit);
            o.counts.push(places.len() as u8);
            for p in places {
                let (place, residual) = (4 * u + p as usize / 64, half(n));
                let c = o.order.get(place).map_or(place, |c| *c as usize);
                o.exact[c * BLOCK_TOKENS + p as usize % 64] += wide(residual);
                o.places.push(p);
                o.residuals.push(residual.to_le_bytes());
            }
        }
        o
    }

    fn view<'a>(&'a self, lut: &'a Option<HeadLut<'a>>) -> SideView<'a> {
        let scales = (self.group > 0).then_some(TokenScales { scale: &self.halves, zero: &self.zero });
        match self.form {
            Form::Rows => SideView::Rows { data: &self.halves, stride: self.d, head_dim: self.d },
            Form::Tile => SideView::Tile { data: &self.halves },
            _ => {
                let lut = lut.as_ref().expect("coded");
                SideView::Coded(CodedView::new(lut, &self.codes, scales, self.outliers()).unwrap())
            }
        }
    }

    /// None for fp16.
    fn lut(&self) -> Option<HeadLut<'_>> {
        (!self.widths.is_empty()).then(|| self.checked_lut().unwrap())
    }

    fn checked_lut(&self) -> Result<HeadLut<'_>, ViewError> {
        let group = (self.group > 0).then_some(self.group);
        HeadLut::new(&self.widths, &self.tables, &self.steps, &self.order, group)
    }

    fn outliers(&self) -> Outliers<'_> {
        Outliers { counts: &self.counts, places: &self.places, residuals: &self.residuals }
    }

    fn at(&self, c: usize, t: usize) -> f64 {
        self.exact[c * BLOCK_TOKENS + t]
    }
}

#[test]
fn dequant_is_bit_exact_and_follows_the_layout() {
    let mut n = Noise(7);
    for form in FORMS {
        for (d, len) in [(4, 1), (64, 64), (80, 63), (96, 9), (128, 8), (256, 31)] {
            let side = Owned::new(&mut n, form, d, len, 3.0, 9);
            let mut want = vec![0.0; d * 64];
            let lut = side.lut();
            Kernels::available()[0].dequant(&side.view(&lut), len, &mut want);
            for c in 0..d {
                for t in 0..64 {
                    let exact = if t < len { side.at(c, t) } else { 0.0 };
                    let got = want[c * 64 + t] as f64;
                    assert!((got - exact).abs() <= 2e-6 * exact.abs().max(1.0), "{form:?} c{c} t{t}: {got} {exact}");
                }
            }
            for kernels in Kernels::available() {
                let mut got = vec![f32::NAN; d * 64];
                kernels.dequant(&side.view(&lut), len, &mut got);
                let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits() || (*a == 0.0 && *b == 0.0));
                assert!(same, "{} {form:?} head_dim {d} len {len}", kernels.name());
            }
        }
    }
}

/// Attention in f64 with absolute angles.
fn reference(
    q: &[f32],
    group: usize,
    visible: usize,
    key: &Owned,
    value: &Owned,
    len: usize,
    rope: Option<(&Rope, usize)>,
) -> Vec<f64> {
    let d = key.d;
    let keys: Vec<Vec<f64>> = (0..len)
        .map(|t| {
            let turned = |i: usize| {
                let (x, y) = (key.at(2 * i, t), key.at(2 * i + 1, t));
                let Some((rope, origin)) = rope else { return [x, y] };
                let (sin, cos) = ((origin + t) as f64 * rope.inv_freq[i]).sin_cos();
                [x * cos - y * sin, x * sin + y * cos]
            };
            (0..d / 2).flat_map(turned).collect()
        })
        .collect();
    let mut out = vec![];
    for (r, q) in q.chunks_exact(d).enumerate() {
        let n = (visible + r / group).min(len);
        let score = |k: &Vec<f64>| q.iter().zip(k).map(|(q, k)| *q as f64 * k).sum();
        let scores: Vec<f64> = keys[..n].iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        out.extend(
            (0..d).map(|c| if n == 0 { 0.0 } else { (0..n).map(|t| weights[t] * value.at(c, t)).sum::<f64>() / sum }),
        );
    }
    out
}

fn rope(d: usize) -> Rope {
    Rope { inv_freq: (0..d / 2).map(|i| 100_000f64.powf(-2.0 * i as f64 / d as f64)).collect() }
}

/// Queries against one block.
struct Case<'a> {
    q: &'a [f32],
    group: usize,
    visible: usize,
    key: &'a Owned,
    value: &'a Owned,
    len: usize,
    /// The block's first position, where keys are kept before RoPE.
    origin: Option<usize>,
    /// The largest key or value, by which the tolerance grows.
    size: f32,
}

impl Case<'_> {
    /// Attention by every backend agrees with f64.
    fn check(&self, what: &dyn std::fmt::Debug) {
        let d = self.key.d;
        let (rope, rows) = (rope(d), self.q.len() / d);
        let (table, rotation) = (rope.block_table(), rope.rotation(self.origin.unwrap_or(0)));
        let luts = (self.key.lut(), self.value.lut());
        let (key, value) = (self.key.view(&luts.0), self.value.view(&luts.1));
        let block = BlockView::new(key, value, self.len, self.origin.map(|_| &rotation)).unwrap();
        let turn = self.origin.map(|origin| (&rope, origin));
        let want = reference(self.q, self.group, self.visible, self.key, self.value, self.len, turn);
        let query = Rows { q: self.q, group: self.group, head_dim: d, first_visible: self.visible };
        for kernels in Kernels::available() {
            let mut state = State::empty(rows, d);
            kernels.attend(&query, &block, &table, &mut state);
            let mut got = vec![0.0; d];
            for r in 0..rows {
                state.finish(r, &mut got);
                for c in 0..d {
                    let (g, w) = (got[c] as f64, want[r * d + c]);
                    let tolerance = ATOL * self.size.max(1.0) as f64 + RTOL * w.abs();
                    assert!(
                        (g - w).abs() <= tolerance,
                        "{} {what:?} keys {:?} values {:?} head_dim {d} len {} rows {rows} group {} visible {} origin {:?} row {r} channel {c}: {g} {w}",
                        kernels.name(),
                        self.key.form,
                        self.value.form,
                        self.len,
                        self.group,
                        self.visible,
                        self.origin,
                    );
                }
            }
        }
    }
}

/// Random sides and queries.
fn check(
    n: &mut Noise,
    forms: (Form, Form),
    d: usize,
    len: usize,
    rows: usize,
    group: usize,
    size: f32,
    origin: usize,
) {
    let (key, value) = (Owned::new(n, forms.0, d, len, size, 5), Owned::new(n, forms.1, d, len, 2.0, 5));
    let q = n.vec(rows * d, 1.0 / (d as f32).sqrt());
    let visible = n.below(len + 1);
    let origin = (n.below(4) > 0).then_some(origin);
    Case { q: &q, group, visible, key: &key, value: &value, len, origin, size }.check(&"random");
}

#[test]
fn attention_agrees_with_f64() {
    let mut n = Noise(11);
    for (i, key) in FORMS.into_iter().enumerate() {
        let value = FORMS[(i * 5 + 3) % FORMS.len()];
        for (d, len, rows, group) in [
            (64, 64, 3, 3),
            (64, 63, 1, 1),
            (80, 1, 7, 7),
            (96, 8, 16, 4),
            (128, 65 - 8, 17, 1),
            (256, 31, 4, 4),
            (4, 9, 2, 1),
            (64, 64, 100, 3),
            (20, 33, 49, 7),
        ] {
            check(&mut n, (key, value), d, len, rows, group, 1.0, 640);
            check(&mut n, (value, key), d, len, rows, group, 1.0, 12_345);
        }
    }
}

#[test]
fn backends_that_this_cpu_lacks_are_named() {
    let here: Vec<_> = Kernels::available().into_iter().map(Kernels::name).collect();
    assert!(here.iter().all(|name| Kernels::NAMES.contains(name)), "{here:?}");
    if std::env::var_os("KVQUANT_KERNEL").is_none() {
        assert_eq!(Kernels::detect().map(Kernels::name).ok(), here.last().copied(), "the best is taken");
    }
    for name in Kernels::NAMES.into_iter().filter(|name| !here.contains(name)) {
        // Written past the capture of test output, so that it is seen where tests pass.
        writeln!(std::io::stderr(), "skipped: attention kernels for {name}, which this CPU lacks").unwrap();
    }
}

#[test]
fn states_of_parts_merge_to_the_whole() {
    for kernels in Kernels::available() {
        let mut n = Noise(3);
        let rope = Rope { inv_freq: vec![0.1; 32] };
        let table = rope.block_table();
        let sides: Vec<_> = (0..3)
            .map(|_| {
                (
                    Owned::new(&mut n, Form::Static(3), 64, 64, 2.0, 3),
                    Owned::new(&mut n, Form::Static(4), 64, 64, 2.0, 3),
                )
            })
            .collect();
        let q = n.vec(3 * 64, 0.3);
        let rows = Rows { q: &q, group: 3, head_dim: 64, first_visible: 64 };
        let (mut whole, mut merged) = (State::empty(3, 64), State::empty(3, 64));
        for (k, v) in sides.iter().rev() {
            let luts = (k.lut(), v.lut());
            let block = BlockView::new(k.view(&luts.0), v.view(&luts.1), 64, None).unwrap();
            kernels.attend(&rows, &block, &table, &mut whole);
            let mut part = State::empty(3, 64);
            kernels.attend(&rows, &block, &table, &mut part);
            part.merge(&merged);
            merged = part;
        }
        let (mut a, mut b) = ([0.0; 64], [0.0; 64]);
        for r in 0..3 {
            whole.finish(r, &mut a);
            merged.finish(r, &mut b);
            assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-5), "{}", kernels.name());
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let mut n = Noise(1);
    let good = Owned::new(&mut n, Form::Mixed, 8, 64, 1.0, 3);
    let refused = |change: fn(&mut Owned), part: &str| {
        let mut o = Owned::new(&mut Noise(1), Form::Mixed, 8, 64, 1.0, 3);
        change(&mut o);
        let e = o.checked_lut().and_then(|lut| CodedView::new(&lut, &o.codes, None, o.outliers()).map(|_| ()));
        assert_eq!(e.unwrap_err().part, part);
    };
    let lut = good.lut().unwrap();
    assert!(CodedView::new(&lut, &good.codes, None, good.outliers()).is_ok());
    refused(|o| o.codes.push(0), "codes");
    refused(|o| o.widths[0] = 8, "bits (0 to 7)");
    refused(|o| o.widths.truncate(1), "tables");
    refused(|o| o.counts.truncate(1), "outlier counts");
    refused(|o| o.tables.truncate(7), "tables");
    refused(|o| o.order[0] = 8, "order (channels of the head)");
    refused(|o| o.order[0] = o.order[1], "order (channels of the head)");
    refused(|o| o.counts[0] += 1, "outliers");
    refused(|o| o.residuals.push([0; 2]), "residuals");
    let scaled = |group| HeadLut::new(&good.widths, &good.tables[..1], &good.steps[..1], &[], Some(group));
    assert_eq!(scaled(6).unwrap_err().part, "channels of a scale group");
    let lut = scaled(8).unwrap();
    for (scale, zero, part) in [(63, 0, "scale"), (64, 63, "zero")] {
        let scales = TokenScales { scale: &[0; 64][..scale], zero: &[0; 64][..zero] };
        let e = CodedView::new(&lut, &good.codes, Some(scales), good.outliers()).unwrap_err();
        assert_eq!(e.part, part);
    }
    assert_eq!(CodedView::new(&lut, &good.codes, None, good.outliers()).unwrap_err().part, "scale");
    let tile = [0u16; 8 * 64];
    let (a, b) = (SideView::Tile { data: &tile }, SideView::Tile { data: &tile[..4 * 64] });
    assert!(BlockView::new(a, b, 64, None).is_err());
    assert!(BlockView::new(a, a, 65, None).is_err());
}

#[test]
fn blocks_together_are_blocks_one_by_one() {
    for kernels in Kernels::available() {
        let mut n = Noise(9);
        let rope = Rope { inv_freq: (0..32).map(|i| 100_000f64.powf(-(i as f64) / 32.0)).collect() };
        let table = rope.block_table();
        // Runs of the very same tables (one side's views, again and again), other tables and other forms between them.
        let forms = [Form::Token(3, 0, true), Form::Token(3, 16, true), Form::Static(4), Form::Mixed, Form::Tile];
        let keys: Vec<_> = forms.map(|_| Owned::new(&mut n, Form::Static(3), 64, 64, 2.0, 6)).into();
        let values: Vec<_> = forms.map(|form| Owned::new(&mut n, form, 64, 64, 2.0, 6)).into();
        let luts: Vec<_> = keys.iter().map(Owned::lut).zip(values.iter().map(Owned::lut)).collect();
        for rows in [1, 3, 7, 16] {
            let q = n.vec(rows * 64, 0.3);
            let rows = Rows { q: &q, group: rows, head_dim: 64, first_visible: 64 };
            let order = [0, 0, 0, 1, 1, 0, 2, 2, 2, 2, 2, 3, 4, 4, 3, 0];
            let rotations: Vec<_> = (0..order.len()).map(|b| rope.rotation(64 * b)).collect();
            let block = |(b, rotation)| {
                let b: usize = b;
                let (key, value) = (keys[b].view(&luts[b].0), values[b].view(&luts[b].1));
                BlockView::new(key, value, 64, Some(rotation)).unwrap()
            };
            let blocks: Vec<_> = order.into_iter().zip(&rotations).map(block).collect();
            let (mut one_by_one, mut together) = (State::empty(rows.len(), 64), State::empty(rows.len(), 64));
            blocks.iter().for_each(|b| kernels.attend(&rows, b, &table, &mut one_by_one));
            let mut room = RowsRoom::default();
            let mut prepared = PreparedRows::new(rows, &mut room);
            blocks.chunks(BLOCKS).for_each(|some| {
                kernels.attend_all(&mut prepared, some, &blocks[..2], &table, &mut together);
            });
            let (mut a, mut b) = ([0.0; 64], [0.0; 64]);
            for r in 0..rows.len() {
                one_by_one.finish(r, &mut a);
                together.finish(r, &mut b);
                for (x, y) in a.iter().zip(&b) {
                    assert!((x - y).abs() < 4e-4, "{}, {} rows: {x} {y}", kernels.name(), rows.len());
                }
            }
        }
    }
}
