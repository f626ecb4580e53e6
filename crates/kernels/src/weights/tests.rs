use super::*;

/// Products agree with f64 to RTOL * sum |x w|.
const RTOL: f64 = 1e-6;

/// (type, bytes, weights) of every type, as the `gguf` Python package dequantizes them (tests/fixtures/make_weights.py).
fn fixture() -> Vec<(WeightType, Vec<u8>, Vec<f32>)> {
    let mut at: &[u8] = include_bytes!("../../tests/fixtures/weights.bin");
    let mut take = |n: usize| {
        let (head, rest) = at.split_at(n);
        at = rest;
        head.to_vec()
    };
    WeightType::ALL
        .iter()
        .map(|_| {
            let head: Vec<u32> = take(12).as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            let bytes = take(head[1] as usize);
            let weights = take(4 * head[2] as usize).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            (WeightType::from_ggml(head[0]).unwrap(), bytes, weights)
        })
        .collect()
}

#[test]
fn every_type_dequantizes_as_an_independent_implementation_does() {
    for (ty, bytes, want) in fixture() {
        let w = Weight::from_gguf(ty, 1, want.len(), bytes).unwrap();
        for (i, (got, want)) in w.dequant().iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= 1e-6 * want.abs(), "{} {i}: {got} {want}", ty.name());
        }
    }
}

#[test]
fn products_agree_with_f64_for_every_type_and_number_of_rows() {
    for (ty, bytes, _) in fixture() {
        let (weights, size) = ty.block();
        let blocks = bytes.len() / size;
        // 131 rows of one to a few blocks, cut from the fixture in turns.
        let a_row = if weights == 1 { 24 } else { 2 };
        let rows = 131;
        let data: Vec<u8> =
            (0..rows * a_row).flat_map(|i| bytes[(i * 7 + i / 5) % blocks * size..][..size].to_vec()).collect();
        let w = Weight::from_gguf(ty, rows, a_row * weights, data).unwrap();
        let (dense, k) = (w.dequant(), w.cols());
        for m in [1, 2, 3, 4, 5, 7, 17, 70] {
            let x: Vec<f32> = (0..m * k).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect();
            let (mut y, mut z) = (vec![f32::NAN; m * rows], vec![f32::NAN; m * rows]);
            matmul_fused(&[&w, &w], &x, m, &mut [&mut y, &mut z]);
            assert_eq!(y, z);
            for (i, got) in y.iter().enumerate() {
                let (x, w) = (&x[i / rows * k..][..k], &dense[i % rows * k..][..k]);
                let want: f64 = x.iter().zip(w).map(|(a, b)| *a as f64 * *b as f64).sum();
                let size: f64 = x.iter().zip(w).map(|(a, b)| (*a as f64 * *b as f64).abs()).sum();
                assert!((*got as f64 - want).abs() <= RTOL * size.max(1e-3), "{} m {m} entry {i}: {got} {want}", ty.name());
            }
        }
    }
}

#[test]
fn rows_move_and_sizes_are_checked() {
    let data: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let w = Weight::from_gguf(WeightType::F32, 3, 2, data.clone()).unwrap();
    assert_eq!(w.permute_rows(&[2, 0, 1]).dequant(), [4.0, 5.0, 0.0, 1.0, 2.0, 3.0]);
    assert!(matches!(Weight::from_gguf(WeightType::F32, 2, 2, data.clone()), Err(WeightError::Length { expected: 16, got: 24, .. })));
    assert!(matches!(Weight::from_gguf(WeightType::Q4_0, 1, 24, data), Err(WeightError::Columns { block: 32, .. })));
}
