//! Layers that see a window: against dense attention in f64, and what they hold.

use std::sync::Arc;

use kvquant_cache::{Cache, CacheError, CacheShape, LayerAttention, Prefill};
use kvquant_kernels::rope::Rope;
use kvquant_quant::Spec;
use rand::{Rng, SeedableRng};

const SHAPE: CacheShape = CacheShape { layers: 3, heads: 4, kv_heads: 2, head_dim: 16 };
const WIDE: usize = 64;
const NARROW: usize = 32;

/// Layer 0 sees all; 1 and 2 see windows, with a rope of their own.
fn attention(windows: [usize; 2]) -> Vec<LayerAttention> {
    let rope = |base: f64| Arc::new(Rope { inv_freq: (0..8).map(|i| base.powf(-(i as f64) / 8.0)).collect() });
    let (global, local) = (rope(1e6), rope(1e4));
    let near = |w| LayerAttention { rope: local.clone(), window: Some(w) };
    vec![LayerAttention { rope: global, window: None }, near(windows[0]), near(windows[1])]
}

fn cache(spec: &str, windows: [usize; 2]) -> Cache {
    Cache::with_attention(SHAPE, &spec.parse::<Spec>().unwrap(), None, &attention(windows)).unwrap()
}

/// q, k, v of `n` tokens, the same in every layer.
fn tokens(n: usize) -> [Vec<f32>; 3] {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    [WIDE, NARROW, NARROW].map(|c| (0..n * c).map(|_| rng.random_range(-1.5f32..1.5)).collect())
}

/// Feeds calls of the given sizes; returns the outputs of every layer.
fn feed(c: &mut Cache, t: &[Vec<f32>; 3], calls: &[usize], prefill: Prefill) -> Vec<Vec<f32>> {
    let mut all = vec![vec![]; SHAPE.layers];
    for &n in calls {
        let at = c.len();
        let (wide, narrow) = (at * WIDE..(at + n) * WIDE, at * NARROW..(at + n) * NARROW);
        for (layer, all) in all.iter_mut().enumerate() {
            let mut out = vec![0.0; n * WIDE];
            c.extend(layer, &t[0][wide.clone()], &t[1][narrow.clone()], &t[2][narrow.clone()], prefill, &mut out)
                .unwrap();
            all.extend(out);
        }
        c.commit(n).unwrap();
    }
    all
}

fn dense(t: &[Vec<f32>; 3], n: usize, a: &LayerAttention) -> Vec<f64> {
    let turn = |x: &[f32], p: usize| -> Vec<f64> {
        let pair = |i: usize| {
            let (s, c) = (p as f64 * a.rope.inv_freq[i]).sin_cos();
            let (x, y) = (x[2 * i] as f64, x[2 * i + 1] as f64);
            [x * c - y * s, x * s + y * c]
        };
        (0..8).flat_map(pair).collect()
    };
    let mut out = vec![];
    for p in 0..n {
        let seen = a.window.map_or(0, |w| (p + 1).saturating_sub(w))..p + 1;
        for h in 0..SHAPE.heads {
            let q = turn(&t[0][p * WIDE + h * 16..][..16], p);
            let weights: Vec<f64> = seen
                .clone()
                .map(|j| {
                    let k = turn(&t[1][j * NARROW + h / 2 * 16..][..16], j);
                    (q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / 4.0).exp()
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            for c in 0..16 {
                let v = |j: usize| t[2][j * NARROW + h / 2 * 16 + c] as f64;
                out.push(seen.clone().zip(&weights).map(|(j, w)| w / sum * v(j)).sum());
            }
        }
    }
    out
}

fn apart(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (*x as f64 - y).abs()).fold(0.0, f64::max)
}

#[test]
fn a_window_is_what_its_definition_says() {
    let t = tokens(330);
    for windows in [[1, 2], [63, 64], [65, 100], [129, 1000]] {
        let want: Vec<_> = attention(windows).iter().map(|a| dense(&t, 330, a)).collect();
        for (calls, prefill) in [
            (vec![330], Prefill::Quantized),
            (vec![1; 330], Prefill::Quantized),
            (vec![7, 100, 1, 1, 150, 71], Prefill::Quantized),
            (vec![330], Prefill::Exact),
            (vec![100, 130, 1, 99], Prefill::Exact),
        ] {
            for (spec, tolerance) in
                [("fp16", 2e-3), ("int4-g16+asym+sink3", 0.4), ("int4-g16+asym+recent70+sink1", 0.4)]
            {
                let got = feed(&mut cache(spec, windows), &t, &calls, prefill);
                for (layer, (got, want)) in got.iter().zip(&want).enumerate() {
                    let off = apart(got, want);
                    assert!(
                        off < tolerance,
                        "{spec} {windows:?} {prefill:?} {} calls, layer {layer}: {off}",
                        calls.len()
                    );
                }
            }
        }
    }
}

#[test]
fn what_a_query_sees_does_not_depend_on_the_calls() {
    let t = tokens(300);
    for spec in ["int4-g16+asym+sink3", "int3-g8+recent70"] {
        let whole = feed(&mut cache(spec, [70, 130]), &t, &[300], Prefill::Quantized);
        let single = feed(&mut cache(spec, [70, 130]), &t, &[1; 300], Prefill::Quantized);
        for (a, b) in whole.iter().zip(&single) {
            assert!(apart(a, &b.iter().map(|x| *x as f64).collect::<Vec<_>>()) < 1e-4, "{spec}");
        }
    }
}

#[test]
fn a_window_holds_its_blocks_only() {
    let t = tokens(1200);
    let mut c = cache("fp16", [100, 100]);
    let full = 2 * NARROW * 2;
    for call in [500, 200, 1, 1, 1, 297, 200] {
        feed(&mut c, &t, &[call], Prefill::Quantized);
        // The window, what is open, and the two blocks at its front: one that it begins in, one to spare.
        let most = full * (c.len() + 64) + 2 * full * (100 + 3 * 64);
        assert!(c.bytes().exact < most, "{} tokens: {} of {most}", c.len(), c.bytes().exact);
        let bits = c.bits_per_element();
        assert!((16.0..17.5).contains(&bits), "{bits}");
    }
}

#[test]
fn the_last_tokens_can_be_taken_back_and_all_of_them() {
    let t = tokens(700);
    for spec in ["fp16", "int4-g16+asym+sink3"] {
        let want = feed(&mut cache(spec, [100, 300]), &t, &[700], Prefill::Quantized);
        let mut c = cache(spec, [100, 300]);
        feed(&mut c, &t, &[600], Prefill::Quantized);
        assert_eq!((c.keepable(600), c.keepable(9999), c.keepable(540), c.keepable(0)), (600, 600, 540, 0));
        assert_eq!(c.keepable(300), 0);
        let e = c.truncate(300).unwrap_err();
        assert!(matches!(e, CacheError::Window { layer: 1, len: 300, first: 384..=387 }), "{e}");
        assert_eq!(c.len(), 600);
        c.truncate(540).unwrap();
        for calls in [vec![160], vec![700]] {
            let from = c.len();
            let got = feed(&mut c, &t, &calls, Prefill::Quantized);
            for (got, want) in got.iter().zip(&want) {
                let want: Vec<f64> = want[from * WIDE..].iter().map(|x| *x as f64).collect();
                assert!(apart(got, &want) < 2e-3, "{spec} from {from}");
            }
            c.truncate(0).unwrap();
            assert!(c.is_empty());
        }
    }
}

#[test]
fn a_failed_pass_leaves_a_window_as_it_was() {
    let t = tokens(400);
    let want = feed(&mut cache("fp16", [70, 90]), &t, &[400], Prefill::Quantized);
    let mut c = cache("fp16", [70, 90]);
    feed(&mut c, &t, &[200], Prefill::Quantized);
    let mut bad = t[1][200 * NARROW..300 * NARROW].to_vec();
    bad[50 * NARROW] = f32::NAN;
    let mut out = vec![0.0; 100 * WIDE];
    let (q, v) = (&t[0][200 * WIDE..300 * WIDE], &t[2][200 * NARROW..300 * NARROW]);
    c.extend(1, q, &bad, v, Prefill::Quantized, &mut out).unwrap_err();
    c.rollback();
    let got = feed(&mut c, &t, &[200], Prefill::Quantized);
    for (got, want) in got.iter().zip(&want) {
        assert!(apart(got, &want[200 * WIDE..].iter().map(|x| *x as f64).collect::<Vec<_>>()) < 1e-4);
    }
}

#[test]
fn misuse_has_names() {
    let none = attention([0, 1]);
    let e = Cache::with_attention(SHAPE, &Spec::Fp16, None, &none).unwrap_err().to_string();
    assert!(e.contains("window is 0"), "{e}");
    assert!(Cache::with_attention(SHAPE, &Spec::Fp16, None, &none[..2]).is_err());
}
