//! Blocks of the cache: parts that do not fit are refused; whatever fits is decoded alike by every backend, bit for bit, and
//! attended to without reading past its end.
#![no_main]

use kvquant_kernels::attend::{
    BlockView, CodedView, HeadLut, Kernels, Outliers, PreparedRows, Rows, RowsRoom, SideView, State, TokenScales,
    ViewError,
};
use kvquant_kernels::rope::Rope;
use kvquant_quant::Table;
use kvquant_quant::pack::{BLOCK_TOKENS, MAX_BITS, UNIT_CHANNELS, unit_bytes};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;

/// Everything that a coded side borrows.
struct Side {
    widths: Vec<u8>,
    tables: Vec<Table>,
    steps: Vec<f32>,
    order: Vec<u16>,
    group: Option<usize>,
    codes: Vec<u8>,
    scale: Vec<u16>,
    zero: Vec<u16>,
    counts: Vec<u8>,
    places: Vec<u8>,
    residuals: Vec<[u8; 2]>,
}

/// `n` entries, now and then one more or less.
fn some<T>(
    u: &mut Unstructured<'_>,
    n: usize,
    mut each: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let n = match u.arbitrary::<u8>()? {
        0 => n + 1,
        1 => n.saturating_sub(1),
        _ => n,
    };
    (0..n).map(|_| each(u)).collect()
}

/// Bytes, of which the input may give as few as it likes: what it gives comes again.
fn bytes(u: &mut Unstructured<'_>, n: usize) -> Result<Vec<u8>> {
    let given = u.arbitrary_len::<u8>()?.clamp(1, 64).min(u.len());
    let given = if given == 0 { vec![0] } else { u.bytes(given)?.to_vec() };
    some(u, n, |_| Ok(0))
        .map(|all| (0..all.len()).map(|i| given[i % given.len()].wrapping_add((i / given.len()) as u8)).collect())
}

impl Side {
    fn new(u: &mut Unstructured<'_>, units: usize) -> Result<Self> {
        let head_dim = units * UNIT_CHANNELS;
        // Where tokens have scales one table serves all, so that all have its width.
        let group = match u.arbitrary::<u8>()? % 4 {
            0 => Some(head_dim),
            1 => Some(u.int_in_range(0..=head_dim)?),
            _ => None,
        };
        let one: u8 = u.int_in_range(0..=MAX_BITS as u8 + 1)?;
        let widths =
            some(u, units, |u| if group.is_some() { Ok(one) } else { u.int_in_range(0..=MAX_BITS as u8 + 1) })?;
        let places = if group.is_some() { 1 } else { head_dim };
        let mut place = 0;
        let tables = some(u, places, |u| {
            let bits = widths.get(place / UNIT_CHANNELS).map_or(0, |&b| b as u32).min(MAX_BITS);
            place += 1;
            let seed: i16 = u.arbitrary()?;
            let entries: Vec<i16> =
                (0..Table::entries(bits) as i16).map(|i| seed.wrapping_mul(i.wrapping_add(3))).collect();
            Ok(Table::from_entries(&entries))
        })?;
        let steps = some(u, places, |u| u.arbitrary())?;
        let mut order = vec![];
        if u.arbitrary::<bool>()? {
            let turn: usize = u.int_in_range(0..=head_dim)?;
            order = some(u, head_dim, |_| Ok(0))?;
            order.iter_mut().enumerate().for_each(|(i, c)| *c = ((i + turn) % head_dim) as u16);
        }
        let codes = bytes(u, widths.iter().map(|&b| unit_bytes(b as u32)).sum())?;
        let groups = group.filter(|g| *g > 0).map_or(0, |g| head_dim / g);
        let scale = some(u, groups * BLOCK_TOKENS, |u| u.arbitrary())?;
        let zero = if u.arbitrary()? { some(u, scale.len(), |u| u.arbitrary())? } else { vec![] };
        let most: u8 = u.arbitrary()?;
        let counts = some(u, units, |u| u.int_in_range(0..=most))?;
        let outliers = counts.iter().map(|&n| n as usize).sum();
        let places = bytes(u, outliers)?;
        let residual: [u8; 2] = u.arbitrary()?;
        let residuals = some(u, places.len(), |_| Ok(residual))?;
        Ok(Side { widths, tables, steps, order, group, codes, scale, zero, counts, places, residuals })
    }

    fn lut(&self) -> std::result::Result<HeadLut<'_>, ViewError> {
        HeadLut::new(&self.widths, &self.tables, &self.steps, &self.order, self.group)
    }

    fn view<'a>(&'a self, lut: &'a HeadLut<'a>) -> std::result::Result<SideView<'a>, ViewError> {
        let scales = self.group.map(|_| TokenScales { scale: &self.scale, zero: &self.zero });
        let outliers = Outliers { counts: &self.counts, places: &self.places, residuals: &self.residuals };
        Ok(SideView::Coded(CodedView::new(lut, &self.codes, scales, outliers)?))
    }
}

fn attend(u: &mut Unstructured<'_>) -> Result<()> {
    let units = u.int_in_range(1..=64)?;
    let (key, value) = (Side::new(u, units)?, Side::new(u, units)?);
    let len = u.int_in_range(0..=BLOCK_TOKENS + 1)?;
    let head_dim = units * UNIT_CHANNELS;
    let rope = Rope { inv_freq: (0..head_dim / 2).map(|i| 1.0 / (1.0 + i as f64)).collect() };
    let origin = if u.arbitrary()? { Some(rope.rotation(u.int_in_range(0..=10_000_000)?)) } else { None };
    let (Ok(key_lut), Ok(value_lut)) = (key.lut(), value.lut()) else { return Ok(()) };
    let (Ok(key), Ok(value)) = (key.view(&key_lut), value.view(&value_lut)) else { return Ok(()) };
    let Ok(block) = BlockView::new(key, value, len, origin.as_ref()) else { return Ok(()) };
    let mut want = vec![0.0; head_dim * BLOCK_TOKENS];
    let mut got = want.clone();
    for side in [key, value] {
        Kernels::available()[0].dequant(&side, len, &mut want);
        for kernels in Kernels::available() {
            kernels.dequant(&side, len, &mut got);
            for (i, (x, y)) in got.iter().zip(&want).enumerate() {
                assert!(x == y || x.is_nan() && y.is_nan(), "{}: {x} for {y} at {i}", kernels.name());
            }
        }
    }
    let n: usize = u.int_in_range(1..=20)?;
    let size: f32 = u.arbitrary()?;
    let q: Vec<f32> = (0..n * head_dim).map(|i| (i % 7) as f32 * size).collect();
    let rows = Rows { q: &q, group: n, head_dim, first_visible: u.int_in_range(0..=BLOCK_TOKENS)? };
    let table = rope.block_table();
    for kernels in Kernels::available() {
        let mut state = State::empty(n, head_dim);
        let mut room = RowsRoom::default();
        kernels.attend_all(&mut PreparedRows::new(rows, &mut room), &[block, block], &[block], &table, &mut state);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    // Input that ends early made no block.
    let _ = attend(&mut Unstructured::new(data));
});
