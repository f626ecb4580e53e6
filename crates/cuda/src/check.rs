//! Every kernel against the CPU, on fresh random input; outputs are no numbers before they are written.
//!
//! Codes, scales and outliers must decode to the CPU quantizer's dense values bit for bit. Attention is compared with the
//! same sums in f64, by the greatest relative error of a head's output.

use half::f16;
use kvquant_quant::TokenCodes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::CudaError;
use crate::dense::{DenseOut, dense};
use crate::device::{Buffer, Device, Queue};
use crate::exact::{ExactCache, ExactDecode};
use crate::layer::{BLOCK, Batch, History, Out, Pool, Tables, Turns, append, append_exact, turn_queries};
use crate::prefill::Prefill;
use crate::synthetic::{frequencies, normal, quantizers};

/// Attention in fp16 products with f32 sums.
const ATTENTION: f64 = 4e-3;

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Which kernel.
    pub kernel: &'static str,
    /// Of which case.
    pub case: String,
    /// Greatest relative error, or the share of values that differ.
    pub error: f64,
    /// What it may be.
    pub tolerance: f64,
}

impl Outcome {
    /// Within tolerance; never for NaN.
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// A case.
#[derive(Debug, Clone)]
struct Case {
    bits: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    exact: usize,
    chunks: Vec<usize>,
    /// Rows of the prefill check; 0: none.
    queries: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Case { bits, kv_heads, group, dim, exact, chunks, .. } = self;
        let tokens = chunks.iter().sum::<usize>();
        write!(f, "{bits} bits, {kv_heads} x {dim}, G {group}, {exact}+{tokens} tokens")
    }
}

fn cases(quick: bool) -> Vec<Case> {
    let mut all = Vec::new();
    let edges = vec![150, 1, 1, 1, 40, 63, 64, 65, 130];
    for bits in [2, 3, 4] {
        let mut add = |kv_heads, group, dim, exact, chunks: &[usize], queries| {
            all.push(Case { bits, kv_heads, group, dim, exact, chunks: chunks.to_vec(), queries });
        };
        add(2, 1, 128, 3, &edges, 150);
        add(2, 4, 128, 0, &edges, 130);
        add(3, 3, 64, 1, &edges, 70);
        add(1, 4, 256, 2, &[64, 1, 62], 33);
        add(2, 7, 64, 5, &[1], 20);
        if !quick {
            add(1, 16, 128, 1, &[63, 2], 0);
            add(32, 1, 128, 1, &[700], 0);
            add(8, 4, 128, 1, &[1000, 1], 0);
            add(2, 4, 128, 4, &[8000, 1, 8000, 7], 0);
        }
    }
    all
}

/// Runs all cases; `seen` hears of each outcome.
///
/// # Errors
/// The card fails; a wrong result is an outcome.
pub fn run(device: &Device, seed: u64, quick: bool, seen: &mut dyn FnMut(&Outcome)) -> Result<Vec<Outcome>, CudaError> {
    let mut all = Vec::new();
    for (i, case) in cases(quick).iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(i as u64));
        check(device, case, &mut rng, &mut |kernel, error, tolerance| {
            let o = Outcome { kernel, case: case.to_string(), error, tolerance };
            seen(&o);
            all.push(o);
        })?;
    }
    Ok(all)
}

/// Keys as attention sees them, and values, in f64: `[tokens][kv_heads][dim]`.
struct Reference {
    keys: Vec<f64>,
    values: Vec<f64>,
    kv_heads: usize,
    group: usize,
    dim: usize,
}

fn half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

fn turned(x: &[f32], dim: usize, frequencies: &[f64], position: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for (i, p) in x.chunks_exact(2).enumerate() {
        let (s, c) = (position as f64 * frequencies[i % (dim / 2)]).sin_cos();
        let (x, y) = (p[0] as f64, p[1] as f64);
        out.extend([x * c - y * s, x * s + y * c]);
    }
    out
}

impl Reference {
    /// Attention of one token's queries `[heads][dim]`, turned, over the first `tokens`.
    fn attend(&self, q: &[f64], tokens: usize) -> Vec<f64> {
        let (d, c) = (self.dim, self.kv_heads * self.dim);
        let mut out = Vec::with_capacity(q.len());
        for (h, q) in q.chunks_exact(d).enumerate() {
            let at = h / self.group * d;
            let row = |x: &'_ [f64], t: usize| -> Vec<f64> { x[t * c + at..t * c + at + d].to_vec() };
            let scores: Vec<f64> = (0..tokens)
                .map(|t| row(&self.keys, t).iter().zip(q).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt())
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut o = vec![0.0; d];
            for (t, w) in weights.iter().enumerate() {
                let v = &self.values[t * c + at..t * c + at + d];
                o.iter_mut().zip(v).for_each(|(o, v)| *o += w / sum * v);
            }
            out.extend(o);
        }
        out
    }
}

/// The greatest relative error of a head; infinite for NaN.
fn error(got: &[f32], expected: &[f64], dim: usize) -> f64 {
    let of = |(g, e): (&[f32], &[f64])| {
        let off: f64 = g.iter().zip(e).map(|(g, e)| (*g as f64 - e).powi(2)).sum();
        let size: f64 = e.iter().map(|e| e * e).sum();
        let r = (off / size).sqrt();
        if r.is_nan() { f64::INFINITY } else { r }
    };
    got.chunks_exact(dim).zip(expected.chunks_exact(dim)).map(of).fold(0.0, f64::max)
}

fn check(
    device: &Device,
    case: &Case,
    rng: &mut ChaCha8Rng,
    tell: &mut dyn FnMut(&'static str, f64, f64),
) -> Result<(), CudaError> {
    let Case { bits, kv_heads, group, dim, exact, ref chunks, queries } = *case;
    let (channels, heads) = (kv_heads * dim, kv_heads * group);
    let coded: usize = chunks.iter().sum();
    let tokens = exact + coded;
    let frequencies = frequencies(dim);
    let row = channels;

    // Channels differ in place and size; some entries are far out.
    let place: Vec<(f32, f32)> = (0..channels).map(|_| (normal(rng) * 0.7, 0.3 + rng.random::<f32>())).collect();
    let mut draw = |n: usize, keys: bool| -> Vec<f32> {
        (0..n * channels)
            .map(|i| {
                let x = normal(rng) * if rng.random::<f32>() < 0.002 { 5.0 } else { 1.0 };
                if keys { place[i % channels].0 + place[i % channels].1 * x } else { x }
            })
            .collect()
    };
    let (keys, values) = (draw(tokens + queries, true), draw(tokens + queries, false));
    let lower = place.iter().map(|(m, s)| m - 2.6 * s).collect();
    let upper = place.iter().map(|(m, s)| m + 2.6 * s).collect();
    let (key_side, value_side) = quantizers(bits, kv_heads, dim, lower, upper)?;

    let decode = |x: &[f32], q: &kvquant_quant::SideQuantizer| -> Result<Vec<f32>, CudaError> {
        let mut out = vec![0.0; x.len()];
        let mut codes = TokenCodes::default();
        for (x, out) in x.chunks_exact(row).zip(out.chunks_exact_mut(row)) {
            q.quantize(x, &mut codes)?;
            q.dequantize(&codes, out);
        }
        Ok(out)
    };
    let of_blocks = exact * row..tokens * row;
    let dense_keys = decode(&keys[of_blocks.clone()], &key_side)?;
    let dense_values = decode(&values[of_blocks], &value_side)?;

    // Two sequences whose blocks alternate.
    let tables = Tables::new(device, &key_side, &value_side, kv_heads, dim)?;
    let blocks = coded.div_ceil(BLOCK);
    let turns = Turns::new(device, &frequencies, exact, blocks + 4)?;
    let short = coded.min(65);
    let mut pool = Pool::new(device, &tables, blocks + 3, 4 * (coded + 192) * channels / 16 + 4096, coded.max(65))?;
    let mut long_history = History::new(device, &tables, exact, blocks + 1)?;
    let mut short_history = History::new(device, &tables, exact, 2)?;
    let part = |x: &[f32], from: usize, n: usize| device.upload(&x[from * row..(from + n) * row]);
    for h in [&mut long_history, &mut short_history] {
        let angles = turns.angles(device, 0, exact)?;
        if exact > 0 {
            append_exact(device, &tables, h, &part(&keys, 0, exact)?, &part(&values, 0, exact)?, &angles, exact)?;
        }
    }
    let mut from = exact;
    for (i, &n) in chunks.iter().enumerate() {
        append(device, &tables, &mut pool, &mut long_history, &part(&keys, from, n)?, &part(&values, from, n)?, n)?;
        from += n;
        if i == 0 {
            let (k, v) = (part(&keys, exact, short)?, part(&values, exact, short)?);
            append(device, &tables, &mut pool, &mut short_history, &k, &v, short)?;
        }
    }
    pool.check(device)?;

    // append: every value, bit for bit
    let capacity = blocks * BLOCK;
    let floats = device.poisoned(2 * channels * capacity * 4)?;
    let record = device.upload(&long_history.record(&pool))?;
    let out = DenseOut::Floats(&floats, 0);
    dense(device, Queue::Main, &tables, &pool, (&long_history, &record), &turns, out, 0, blocks, capacity)?;
    let got = device.read::<f32>(&floats, 2 * channels * capacity)?;
    let mut wrong = 0usize;
    for (side, expected) in [&dense_keys, &dense_values].into_iter().enumerate() {
        for (i, e) in expected.iter().enumerate() {
            let (t, h, c) = (i / row, i % row / dim, i % dim);
            wrong += (got[((side * kv_heads + h) * capacity + t) * dim + c].to_bits() != e.to_bits()) as usize;
        }
    }
    tell("append, dense", wrong as f64 / (2 * dense_keys.len()) as f64, 0.0);

    // decode: a query of each sequence, at the place of its last token
    let exact_rows = |reference: &mut Reference, exact: usize| {
        for t in 0..exact {
            let k = turned(&keys[t * row..(t + 1) * row], dim, &frequencies, t);
            reference.keys.extend(k.iter().map(|x| half(*x as f32) as f64));
            reference.values.extend(values[t * row..(t + 1) * row].iter().map(|x| half(*x) as f64));
        }
    };
    let mut reference = Reference { keys: Vec::new(), values: Vec::new(), kv_heads, group, dim };
    exact_rows(&mut reference, exact);
    for (t, k) in dense_keys.chunks_exact(row).enumerate() {
        reference.keys.extend(turned(k, dim, &frequencies, exact + t));
    }
    reference.values.extend(dense_values.iter().map(|x| *x as f64));
    let q: Vec<f32> = (0..(2 + queries) * heads * dim).map(|_| normal(rng)).collect();
    let q_row = heads * dim;
    let lengths = [tokens, exact + short];
    let positions = lengths.map(|n| n - 1);
    let angles: Vec<[f32; 2]> = positions.iter().flat_map(|p| crate::tables::angles(&frequencies, *p as f64)).collect();
    let turned_q = device.poisoned(2 * q_row * 4)?;
    turn_queries(device, &device.upload(&q[..2 * q_row])?, &device.upload(&angles)?, &turned_q, dim, heads, 2)?;
    let expect: Vec<f64> = (0..2)
        .flat_map(|i| {
            let q = turned(&q[i * q_row..(i + 1) * q_row], dim, &frequencies, positions[i]);
            reference.attend(&q, lengths[i])
        })
        .collect();
    let batch = Batch::new(device, &tables, &pool, &turns, &[&long_history, &short_history], heads)?;
    let out = device.poisoned(2 * q_row * 4)?;
    batch.decode(device, &tables, &pool, &turns, &turned_q, &out)?;
    tell("decode", error(&device.read::<f32>(&out, 2 * q_row)?, &expect, dim), ATTENTION);

    // the fp16 base line
    let mut fp16 = Reference { keys: Vec::new(), values: Vec::new(), kv_heads, group, dim };
    exact_rows(&mut fp16, tokens);
    let mut cache = ExactCache::new(device, kv_heads, dim, tokens + 5)?;
    let first = tokens / 2 + 1;
    for (from, n) in [(0, first), (first, tokens - first)] {
        if n > 0 {
            let angles = turns.angles(device, from, n)?;
            cache.append(device, &part(&keys, from, n)?, &part(&values, from, n)?, &angles, n, None)?;
        }
    }
    let out = device.poisoned(q_row * 4)?;
    ExactDecode::new(device, &cache, heads)?.decode(device, &cache, &turned_q, Out::Floats(&out), None)?;
    let expect = fp16.attend(&turned(&q[..q_row], dim, &frequencies, positions[0]), tokens);
    tell("fp16 decode", error(&device.read::<f32>(&out, q_row)?, &expect, dim), ATTENTION / 4.0);

    if queries > 0 {
        let new_q = device.upload(&q[2 * q_row..])?;
        let angles = turns.angles(device, tokens, queries)?;
        let mut own = ExactCache::new(device, kv_heads, dim, queries)?;
        let new = |x: &[f32]| device.upload(&x[tokens * row..]);
        own.append(device, &new(&keys)?, &new(&values)?, &angles, queries, None)?;
        for t in tokens..tokens + queries {
            let k = turned(&keys[t * row..(t + 1) * row], dim, &frequencies, t);
            for r in [&mut reference, &mut fp16] {
                r.keys.extend(k.iter().map(|x| half(*x as f32) as f64));
                r.values.extend(values[t * row..(t + 1) * row].iter().map(|x| half(*x) as f64));
            }
        }
        let by_head = |r: &Reference| -> Vec<f64> {
            let rows: Vec<Vec<f64>> = (0..queries)
                .map(|i| {
                    let q = &q[(2 + i) * q_row..(3 + i) * q_row];
                    // The kernel has its queries in fp16.
                    r.attend(&turned(q, dim, &frequencies, tokens + i), tokens + i + 1)
                })
                .collect();
            (0..heads).flat_map(|h| rows.iter().flat_map(move |r| r[h * dim..(h + 1) * dim].to_vec())).collect()
        };
        let mut step = Prefill::new(device, &new_q, &angles, queries, heads, kv_heads, dim)?;
        let rows = device.poisoned(2 * channels * 2 * BLOCK * 2)?;
        step.attend_coded(device, &tables, &pool, &long_history, &turns, &rows, 2, false)?;
        step.attend_exact(device, &own, true, true)?;
        let got = read_all(device, step.out())?;
        tell("prefill", error(&got, &by_head(&reference), dim), ATTENTION);

        let mut whole = ExactCache::new(device, kv_heads, dim, tokens + queries)?;
        let angles_all = turns.angles(device, 0, tokens + queries)?;
        whole.append(device, &device.upload(&keys)?, &device.upload(&values)?, &angles_all, tokens + queries, None)?;
        let mut step = Prefill::new(device, &new_q, &angles, queries, heads, kv_heads, dim)?;
        step.attend_exact(device, &whole, true, true)?;
        let got = read_all(device, step.out())?;
        tell("fp16 prefill", error(&got, &by_head(&fp16), dim), ATTENTION);
    }
    Ok(())
}

fn read_all(device: &Device, b: &Buffer) -> Result<Vec<f32>, CudaError> {
    device.read::<f32>(b, b.bytes() / 4)
}
