use proptest::prelude::*;

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

fn assert_product(w: &Weight, x: &[f32], m: usize, y: &[f32]) {
    let dense = w.dequant();
    for t in 0..m {
        for r in 0..w.rows() {
            let pairs = dense[r * w.cols()..][..w.cols()].iter().zip(&x[t * w.cols()..]);
            let (want, size) = pairs.fold((0f64, 0f64), |(s, z), (a, b)| {
                let p = *a as f64 * *b as f64;
                (s + p, z + p.abs())
            });
            let got = y[t * w.rows() + r] as f64;
            assert!(
                (got - want).abs() <= ATOL + RTOL * size,
                "{} {:?} m={m} [{}, {}] y[{t}, {r}] = {got}, expected {want}",
                w.ty().name(),
                w.isa,
                w.rows(),
                w.cols()
            );
        }
    }
}

fn on_every_isa(w: &Weight, check: impl Fn(&Weight)) {
    for isa in Isa::available() {
        check(&Weight { isa, ..w.clone() });
    }
}

#[test]
fn decoding_is_the_reference_bit_for_bit() {
    for r in records() {
        let w = Weight::from_gguf(r.ty, 1, r.values.len(), r.bytes).unwrap();
        on_every_isa(&w, |w| {
            let mut got = vec![f32::NAN; w.cols()];
            w.dequant_row(0, &mut got);
            for (e, (got, want)) in got.iter().zip(&r.values).enumerate() {
                assert_eq!(got.to_bits(), want.to_bits(), "{} {:?} element {e}: {got} {want}", w.ty().name(), w.isa);
            }
        });
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
                    let mut y = vec![f32::NAN; m * rows];
                    w.matmul(&x, m, &mut y);
                    assert_product(w, &x, m, &y);
                });
            }
        }
    }
}

#[test]
fn long_rows_and_many_rows() {
    for (ty, rows, cols) in [(WeightType::Q4_1, 1100, 576), (WeightType::Q8_0, 300, 1536), (WeightType::F32, 65, 2049)]
    {
        let w = random(ty, rows, cols, 3);
        for m in [1, 6, 65] {
            let x = noise(m * cols, 9);
            on_every_isa(&w, |w| {
                let mut y = vec![f32::NAN; m * rows];
                w.matmul(&x, m, &mut y);
                assert_product(w, &x, m, &y);
            });
        }
    }
}

#[test]
fn permuted_rows_are_the_named_rows() {
    let w = random(WeightType::Q4K, 4, 256, 1);
    let p = w.permute_rows(&[2, 0, 3]);
    let (a, b) = (w.dequant(), p.dequant());
    assert_eq!((p.rows(), p.cols(), p.bytes()), (3, 256, 3 * 144));
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
    none.matmul(&[1.0; 64], 2, &mut []);
    assert!(none.dequant().is_empty());
    matmul_fused(&[], &[], 3, &mut []);
    let some = Weight::from_gguf(WeightType::Q4_0, 1, 32, vec![0; 18]).unwrap();
    some.matmul(&[], 0, &mut []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Fused outputs are those of single products, bit for bit.
    #[test]
    fn fusing_changes_nothing(m in 1usize..9, rows in prop::collection::vec(1usize..90, 1..4), blocks in 1usize..5, seed in 0u64..99) {
        let types = [WeightType::Q4_1, WeightType::Q6K, WeightType::Q8_0];
        let cols = 256 * blocks;
        let weights: Vec<Weight> =
            rows.iter().enumerate().map(|(i, &r)| random(types[(i + seed as usize) % 3], r, cols, seed)).collect();
        let x = noise(m * cols, seed + 1);
        let mut fused: Vec<Vec<f32>> = rows.iter().map(|r| vec![f32::NAN; m * r]).collect();
        matmul_fused(
            &weights.iter().collect::<Vec<_>>(),
            &x,
            m,
            &mut fused.iter_mut().map(|y| y.as_mut_slice()).collect::<Vec<_>>(),
        );
        for (w, got) in weights.iter().zip(&fused) {
            let mut want = vec![f32::NAN; m * w.rows()];
            w.matmul(&x, m, &mut want);
            prop_assert_eq!(got, &want);
        }
    }
}
