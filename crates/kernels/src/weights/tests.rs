use proptest::prelude::*;

use super::floats::{Kernel, Lanes};
use super::*;

/// |error| <= ATOL + RTOL * sum |w x|: f32 products and sums of a few thousand terms in any order.
const ATOL: f64 = 1e-6;
const RTOL: f64 = 1e-6;

struct Record {
    ty: WeightType,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

/// Blocks of every type, as the `gguf` Python package dequantizes them (tests/fixtures/make_weights.py).
fn records() -> Vec<Record> {
    let mut at: &[u8] = include_bytes!("../../tests/fixtures/weights.bin");
    let mut take = |n: usize| {
        let (head, rest) = at.split_at(n);
        at = rest;
        head
    };
    let mut out = Vec::new();
    for _ in WeightType::ALL {
        let head: Vec<usize> = take(12).as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as usize).collect();
        let bytes = take(head[1]).to_vec();
        let values = take(4 * head[2]).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        out.push(Record { ty: WeightType::from_ggml(head[0] as u32).unwrap(), bytes, values });
    }
    assert!(at.is_empty());
    out
}

/// Deterministic noise in (-1, 1).
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A matrix of random codes with scales from the fixture's blocks.
fn random(ty: WeightType, rows: usize, cols: usize, seed: u64) -> Weight {
    let record = records().into_iter().find(|r| r.ty == ty).unwrap();
    let (elements, size) = ty.block();
    let pick = noise(rows * cols / elements, seed);
    let mut data = Vec::new();
    for p in pick {
        let blocks = record.bytes.len() / size;
        let b = ((p + 1.0) * 0.5 * blocks as f32) as usize % blocks;
        data.extend_from_slice(&record.bytes[b * size..][..size]);
    }
    Weight::from_gguf(ty, rows, cols, data).unwrap()
}

/// Products in f64, and for each the sum of magnitudes.
fn exact(w: &Weight, x: &[f32], m: usize) -> Vec<(f64, f64)> {
    let dense = w.dequant();
    let of = |t: usize, r: usize| {
        let pairs = dense[r * w.cols()..][..w.cols()].iter().zip(&x[t * w.cols()..]);
        pairs.fold((0.0, 0.0), |(s, z), (a, b)| {
            let p = *a as f64 * *b as f64;
            (s + p, z + p.abs())
        })
    };
    (0..m * w.rows()).map(|i| of(i / w.rows(), i % w.rows())).collect()
}

fn assert_product(w: &Weight, x: &[f32], m: usize) {
    let mut y = vec![f32::NAN; m * w.rows()];
    w.matmul(Activations::F32, x, m, &mut y);
    for (i, ((want, size), got)) in exact(w, x, m).into_iter().zip(y).enumerate() {
        assert!(
            (got as f64 - want).abs() <= ATOL + RTOL * size,
            "{} {:?} m={m} [{}, {}] y[{i}] = {got}, expected {want}",
            w.ty().name(),
            w.isa,
            w.rows(),
            w.cols()
        );
    }
}

const INTEGERS: [(Activations, f64); 2] = [(Activations::Int8, 127.0), (Activations::Int15, 16256.0)];

fn assert_integer_product(w: &Weight, x: &[f32], m: usize) {
    INTEGERS.into_iter().for_each(|(a, most)| assert_integer_product_of(a, most, w, x, m));
}

/// What rounding activations may change at most: half a scale times |weight|, and the rounding of sums.
fn assert_integer_product_of(a: Activations, most: f64, w: &Weight, x: &[f32], m: usize) {
    let mut y = vec![f32::NAN; m * w.rows()];
    w.matmul(a, x, m, &mut y);
    let dense = w.dequant();
    for (i, ((want, size), got)) in exact(w, x, m).into_iter().zip(y).enumerate() {
        let (t, r) = (i / w.rows(), i % w.rows());
        let blocks = x[t * w.cols()..][..w.cols()].chunks(32).zip(dense[r * w.cols()..].chunks(32));
        let bound: f64 = blocks
            .map(|(x, w)| {
                let largest = x.iter().fold(0f64, |a, x| a.max(x.abs() as f64));
                largest / (2.0 * most) * w.iter().map(|w| w.abs() as f64).sum::<f64>()
            })
            .sum();
        assert!(
            (got as f64 - want).abs() <= 1.001 * bound + ATOL + RTOL * size,
            "{} {a:?} {:?} m={m} y[{i}] = {got}, expected {want} within {bound}",
            w.ty().name(),
            w.isa
        );
    }
}

fn on_every_isa(w: &Weight, check: impl Fn(&Weight)) {
    for isa in Isa::available() {
        check(&Weight { isa, ..w.clone() });
    }
}

/// A matrix whose every byte is `byte`, with scales of 1.
fn constant(ty: WeightType, rows: usize, cols: usize, byte: u8) -> Weight {
    let (elements, size) = ty.block();
    let mut block = vec![byte; size];
    let halves: &[usize] = match ty {
        WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4K | WeightType::Q5K => &[0, 2],
        WeightType::Q2K => &[80, 82],
        WeightType::Q3K => &[108],
        WeightType::Q6K => &[208],
        _ => &[0],
    };
    for &at in halves {
        block[at..at + 2].copy_from_slice(&0x3c00u16.to_le_bytes());
    }
    Weight::from_gguf(ty, rows, cols, block.repeat(rows * cols / elements)).unwrap()
}

fn coded() -> impl Iterator<Item = WeightType> {
    WeightType::ALL.into_iter().filter(|t| !t.is_float())
}

#[test]
fn decoding_is_the_reference_bit_for_bit() {
    for r in records() {
        let w = Weight::from_gguf(r.ty, 1, r.values.len(), r.bytes).unwrap();
        let mut got = vec![f32::NAN; w.cols()];
        w.dequant_row(0, &mut got);
        for (e, (got, want)) in got.iter().zip(&r.values).enumerate() {
            assert_eq!(got.to_bits(), want.to_bits(), "{} element {e}: {got} {want}", w.ty().name());
        }
    }
}

#[test]
fn panels_are_the_rows_bit_for_bit() {
    fn check<K: Kernel>(w: &Weight) {
        let rows = w.dequant();
        for first in [0, 256] {
            let mut panel = vec![Lanes::ZERO; w.cols() - first];
            // SAFETY: asked for below where the CPU has it.
            unsafe { K::dequant(w, 1, first, &mut panel) };
            for (c, lanes) in (first..).zip(&panel) {
                for r in 0..7 {
                    let want = rows[(16 + r) * w.cols() + c];
                    assert_eq!(lanes.0[r].to_bits(), want.to_bits(), "{} row {r} column {c}", w.ty().name());
                }
            }
        }
    }
    for ty in WeightType::ALL {
        let w = random(ty, 23, 512, 5);
        check::<floats::Plain>(&w);
        #[cfg(target_arch = "x86_64")]
        {
            if Isa::Avx2.is_available() {
                check::<avx2::Floats>(&w);
            }
            if Isa::Avx512.is_available() {
                check::<avx512::Floats>(&w);
            }
        }
    }
}

#[test]
fn products_of_every_type_and_width() {
    for ty in WeightType::ALL {
        let cols = if ty.block().0 == 1 { 37 } else { 3 * ty.block().0 };
        for rows in [1, 7, 33, 70] {
            let w = random(ty, rows, cols, rows as u64);
            for m in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40] {
                let x = noise(m * cols, m as u64);
                on_every_isa(&w, |w| {
                    assert_product(w, &x, m);
                    if !ty.is_float() {
                        assert_integer_product(w, &x, m);
                    }
                });
            }
        }
    }
}

/// Sums of integers are exact and sums over blocks have one order, so backends and batches agree bit for bit.
#[test]
fn integer_products_are_the_twins_bit_for_bit() {
    for ty in coded() {
        let cols = 3 * ty.block().0;
        let w = random(ty, 35, cols, 8);
        let x = noise(20 * cols, 4);
        for (a, _) in INTEGERS {
            let mut want = vec![f32::NAN; 20 * 35];
            Weight { isa: Isa::Scalar, ..w.clone() }.matmul(a, &x, 20, &mut want);
            on_every_isa(&w, |w| {
                for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 20] {
                    let mut y = vec![f32::NAN; m * 35];
                    w.matmul(a, &x[..m * cols], m, &mut y);
                    for (i, (got, want)) in y.iter().zip(&want).enumerate() {
                        assert_eq!(got.to_bits(), want.to_bits(), "{} {a:?} {:?} m={m} y[{i}]", ty.name(), w.isa);
                    }
                }
            });
        }
    }
}

/// The largest codes and activations of either sign: where sums in 16 bits would overflow.
#[test]
fn largest_codes_do_not_overflow() {
    for ty in coded() {
        for byte in [0x00, 0x7f, 0x80, 0xff] {
            let w = constant(ty, 17, 512, byte);
            for x in [1.0, -1.0] {
                on_every_isa(&w, |w| assert_integer_product(w, &[x; 512], 1));
            }
        }
    }
}

/// A broken activation breaks its token's products, and no other's.
#[test]
fn what_is_not_finite_stays_so() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for ty in coded() {
            let w = random(ty, 20, 512, 2);
            let mut x = noise(2 * 512, 1);
            x[512 + 77] = bad;
            on_every_isa(&w, |w| {
                for a in Activations::ALL {
                    let mut y = vec![0.0; 40];
                    w.matmul(a, &x, 2, &mut y);
                    assert!(y[..20].iter().all(|y| y.is_finite()), "{} {a:?} {:?}", ty.name(), w.isa);
                    assert!(y[20..].iter().all(|y| !y.is_finite()), "{} {a:?} {:?} {bad}", ty.name(), w.isa);
                }
            });
        }
    }
}

#[test]
fn smallest_and_largest_activations() {
    let w = random(WeightType::Q4_0, 16, 64, 2);
    for scale in [0.0, 1e-45, 1e-38, 1e-30, 1e30] {
        let x: Vec<f32> = noise(64, 3).iter().map(|x| x * scale).collect();
        on_every_isa(&w, |w| assert_integer_product(w, &x, 1));
    }
}

#[test]
fn long_rows_and_many_rows() {
    for (ty, rows, cols) in [(WeightType::Q4_1, 1100, 576), (WeightType::Q8_0, 300, 1536), (WeightType::F32, 65, 2049)]
    {
        let w = random(ty, rows, cols, 3);
        for m in [1, 6, 65, 300] {
            let x = noise(m * cols, 9);
            let w = &Weight { isa: *Isa::available().last().unwrap(), ..w.clone() };
            assert_product(w, &x, m);
            if !ty.is_float() {
                assert_integer_product(w, &x, m);
            }
        }
    }
}

#[test]
fn packed_weights_are_at_most_1_15_times_the_file() {
    for ty in WeightType::ALL {
        for (rows, cols) in [(576, 1536), (192, 512)] {
            let file = rows * cols / ty.block().0 * ty.block().1;
            let packed = random(ty, rows, cols, 1).bytes();
            assert!(packed as f64 <= 1.15 * file as f64, "{}: {packed} of {file}", ty.name());
        }
    }
}

#[test]
fn selected_rows_are_the_named_rows() {
    let (elements, size) = WeightType::Q4K.block();
    let bytes: Vec<u8> = records().into_iter().find(|r| r.ty == WeightType::Q4K).unwrap().bytes.repeat(2);
    let file = FileWeight::new(WeightType::Q4K, 4, elements, bytes[..4 * size].to_vec()).unwrap();
    let picked = file.select(&[2, 0, 3]);
    let (a, b) = (file.pack().unwrap().dequant(), picked.pack().unwrap().dequant());
    assert_eq!((picked.rows(), picked.cols()), (3, 256));
    assert_eq!(b[..256], a[512..768]);
    assert_eq!(b[256..512], a[..256]);
    assert_eq!(b[512..], a[768..]);
}

#[test]
fn wrong_shapes_are_refused() {
    let refuse = |ty, rows, cols, bytes| Weight::from_gguf(ty, rows, cols, vec![0; bytes]).unwrap_err();
    assert!(matches!(refuse(WeightType::Q4K, 2, 576, 0), WeightError::Columns { block: 256, .. }));
    assert!(matches!(refuse(WeightType::Q4_0, 2, 64, 71), WeightError::Length { expected: 72, got: 71, .. }));
    assert!(matches!(refuse(WeightType::Q8_0, usize::MAX / 16, 64, 8), WeightError::Length { .. }));
    assert!(matches!(refuse(WeightType::F32, 3, 0, 0), WeightError::Columns { .. }));
}

#[test]
fn empty_matrices_give_empty_products() {
    let none = Weight::from_gguf(WeightType::Q4_0, 0, 32, Vec::new()).unwrap();
    none.matmul(Activations::Int8, &[1.0; 64], 2, &mut []);
    none.matmul(Activations::F32, &[1.0; 64], 2, &mut []);
    assert!(none.dequant().is_empty());
    matmul_fused(Activations::Int8, &[], &[], 3, &mut []);
    let some = Weight::from_gguf(WeightType::Q4_0, 1, 32, vec![0; 18]).unwrap();
    some.matmul(Activations::Int8, &[], 0, &mut []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Fused outputs are those of single products, bit for bit.
    #[test]
    fn fusing_changes_nothing(m in 1usize..9, rows in prop::collection::vec(1usize..90, 1..4), blocks in 1usize..5, seed in 0u64..99) {
        let types = [WeightType::Q4_1, WeightType::Q6K, WeightType::F16];
        let cols = 256 * blocks;
        let weights: Vec<Weight> =
            rows.iter().enumerate().map(|(i, &r)| random(types[(i + seed as usize) % 3], r, cols, seed)).collect();
        let x = noise(m * cols, seed + 1);
        let mut fused: Vec<Vec<f32>> = rows.iter().map(|r| vec![f32::NAN; m * r]).collect();
        for activations in Activations::ALL {
        matmul_fused(
            activations,
            &weights.iter().collect::<Vec<_>>(),
            &x,
            m,
            &mut fused.iter_mut().map(|y| y.as_mut_slice()).collect::<Vec<_>>(),
        );
        for (w, got) in weights.iter().zip(&fused) {
            let mut want = vec![f32::NAN; m * w.rows()];
            w.matmul(activations, &x, m, &mut want);
            prop_assert_eq!(got, &want);
        }
        }
    }
}
