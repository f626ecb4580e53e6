//! The cache through its public face: against dense attention in f64, and against itself by other ways.

use std::sync::Arc;

use kvquant_cache::{Bytes, Cache, CacheError, CacheShape, Prefill};
use kvquant_kernels::rope::Rope;
use kvquant_quant::{Fingerprint, Fit, LayerFit, MixedFit, Provenance, Quantizer, SideFit, Spec};
use rand::{Rng, SeedableRng};

const SHAPE: CacheShape = CacheShape { layers: 2, heads: 6, kv_heads: 2, head_dim: 32 };

fn rope() -> Arc<Rope> {
    Arc::new(Rope { inv_freq: (0..16).map(|i| 10_000f64.powf(-(i as f64) / 16.0)).collect() })
}

/// Uniform signposts over fixed ranges: what a fit looks like, without a calibration.
fn quantizer(spec: &Spec) -> Quantizer {
    let channels = SHAPE.kv_heads * SHAPE.head_dim;
    let Spec::Coded(coded) = spec else { panic!("a coded spec") };
    let n = 1 << coded.bits;
    let signposts: Vec<f32> = (0..n).map(|i| -1.0 + 2.0 * i as f32 / (n - 1) as f32).collect();
    let layer = || LayerFit {
        keys: SideFit {
            lower: vec![-0.97; channels],
            upper: vec![0.97; channels],
            encode: signposts.clone(),
            decode: signposts.clone(),
            mixed: None,
        },
        values: SideFit {
            lower: vec![],
            upper: vec![],
            encode: signposts.clone(),
            decode: signposts.clone(),
            mixed: None,
        },
    };
    Quantizer {
        model: Fingerprint {
            architecture: "test".into(),
            layers: SHAPE.layers,
            kv_heads: SHAPE.kv_heads,
            head_dim: SHAPE.head_dim,
            norms_sha256: "0".repeat(64),
        },
        provenance: Provenance { text: "none".into(), windows: 1, ctx: 1, tool: "test".into() },
        fits: vec![Fit { spec: spec.clone(), layers: vec![layer(), layer()] }],
    }
}

fn cache(spec: &str) -> Cache {
    let spec: Spec = spec.parse().unwrap();
    let q = spec.needs_fit().then(|| quantizer(&spec));
    Cache::new(SHAPE, &spec, q.as_ref(), rope()).unwrap()
}

/// q, k, v of `n` tokens of a layer, the same for the same position.
struct Tokens {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn tokens(n: usize) -> Vec<Tokens> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut fill = |n: usize| (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
    (0..SHAPE.layers).map(|_| Tokens { q: fill(n * 192), k: fill(n * 64), v: fill(n * 64) }).collect()
}

/// Feeds `n` tokens in calls of the given sizes, from position `from` on; returns the outputs of layer 0.
fn feed(c: &mut Cache, t: &[Tokens], from: usize, calls: &[usize], prefill: Prefill) -> Vec<f32> {
    let mut all = vec![];
    let mut at = from;
    for &n in calls {
        for (layer, t) in t.iter().enumerate() {
            let mut out = vec![0.0; n * 192];
            let (wide, narrow) = (at * 192..(at + n) * 192, at * 64..(at + n) * 64);
            c.extend(layer, &t.q[wide], &t.k[narrow.clone()], &t.v[narrow], prefill, &mut out).unwrap();
            if layer == 0 {
                all.extend(out);
            }
        }
        c.commit(n).unwrap();
        at += n;
    }
    all
}

/// Dense causal attention over exact keys and values, absolute angles, f64.
fn dense(t: &Tokens, n: usize) -> Vec<f64> {
    let rope = rope();
    let turn = |x: &[f32], p: usize| -> Vec<f64> {
        (0..16)
            .flat_map(|i| {
                let (s, c) = (p as f64 * rope.inv_freq[i]).sin_cos();
                let (a, b) = (x[2 * i] as f64, x[2 * i + 1] as f64);
                [a * c - b * s, a * s + b * c]
            })
            .collect()
    };
    let mut out = vec![];
    for p in 0..n {
        for h in 0..6 {
            let q = turn(&t.q[(p * 6 + h) * 32..][..32], p);
            let scores: Vec<f64> = (0..=p)
                .map(|j| {
                    let k = turn(&t.k[(j * 2 + h / 3) * 32..][..32], j);
                    q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / 32f64.sqrt()
                })
                .collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            for c in 0..32 {
                out.push((0..=p).map(|j| scores[j].exp() / sum * t.v[(j * 2 + h / 3) * 32 + c] as f64).sum());
            }
        }
    }
    out
}

fn apart(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (*x as f64 - y).abs()).fold(0.0, f64::max)
}

fn wide(a: &[f32]) -> Vec<f64> {
    a.iter().map(|&x| x as f64).collect()
}

const SPECS: [&str; 9] = [
    "fp16",
    "nuq3-1%",
    "nuq4-1%+sink1",
    "nuq2-1%+sink3+recent5",
    "nuq3+recent70",
    "nuq3-1%+postrope+sink1",
    "int4-g32",
    "int3-g16+asym+recent64",
    "nuq3-1%+ktoken",
];

#[test]
fn an_fp16_cache_is_dense_attention() {
    let t = tokens(150);
    let want = dense(&t[0], 150);
    for calls in [&[150][..], &[64, 64, 22], &[1, 70, 79]] {
        for prefill in [Prefill::Quantized, Prefill::Exact] {
            let off = apart(&feed(&mut cache("fp16"), &t, 0, calls, prefill), &want);
            assert!(off < 2e-3, "fp16 rounding only: {off}");
        }
    }
}

#[test]
fn what_is_stored_does_not_depend_on_how_tokens_came() {
    let t = tokens(200);
    for spec in SPECS {
        let (mut whole, mut pieces, mut single) = (cache(spec), cache(spec), cache(spec));
        let a = feed(&mut whole, &t, 0, &[200], Prefill::Quantized);
        let b = feed(&mut pieces, &t, 0, &[3, 64, 1, 90, 42], Prefill::Quantized);
        let c = feed(&mut single, &t, 0, &[1; 200], Prefill::Quantized);
        assert_eq!(whole.bytes(), pieces.bytes(), "{spec}");
        assert_eq!(whole.bytes(), single.bytes(), "{spec}");
        assert!(apart(&b, &wide(&a)) < 1e-4, "{spec}: {}", apart(&b, &wide(&a)));
        assert!(apart(&c, &wide(&a)) < 1e-4, "{spec}: {}", apart(&c, &wide(&a)));
    }
}

#[test]
fn quantization_changes_the_output_but_not_much() {
    let t = tokens(200);
    let want = dense(&t[0], 200);
    for (spec, low, high) in [("nuq4-1%", 1e-3, 0.12), ("nuq3-1%+sink1", 1e-3, 0.25), ("int4-g32", 1e-3, 0.15)] {
        let off = apart(&feed(&mut cache(spec), &t, 0, &[200], Prefill::Quantized), &want);
        assert!((low..high).contains(&off), "{spec}: {off}");
    }
}

#[test]
fn exact_prefill_sees_its_own_chunk_exactly_and_the_history_in_codes() {
    let t = tokens(200);
    let want = dense(&t[0], 200);
    for spec in ["nuq2-1%", "nuq3-1%+sink2+recent9", "nuq3-1%+postrope"] {
        let mut c = cache(spec);
        let first = feed(&mut c, &t, 0, &[130], Prefill::Exact);
        assert!(apart(&first, &want[..130 * 192]) < 2e-3, "{spec}");
        let second = feed(&mut c, &t, 130, &[70], Prefill::Exact);
        assert!(apart(&second, &want[130 * 192..]) > 2e-3, "{spec}: the history is compressed");
        let mut q = cache(spec);
        feed(&mut q, &t, 0, &[200], Prefill::Quantized);
        assert_eq!(c.bytes(), q.bytes(), "{spec}: the same is stored either way");
    }
}

#[test]
fn a_recent_window_is_exact() {
    let t = tokens(100);
    let want = dense(&t[0], 100);
    let off = apart(&feed(&mut cache("nuq2-1%+recent100"), &t, 0, &[100], Prefill::Quantized), &want);
    assert!(off < 2e-3, "all positions lie in the window: {off}");
}

#[test]
fn a_truncated_cache_continues_as_if_nothing_had_followed() {
    let t = tokens(200);
    for spec in SPECS.into_iter().filter(|s| !s.contains("recent")) {
        for keep in [0, 1, 63, 64, 65, 130] {
            let mut straight = cache(spec);
            feed(&mut straight, &t, 0, &[keep], Prefill::Quantized);
            let a = feed(&mut straight, &t, keep, &[200 - keep], Prefill::Quantized);
            let mut back = cache(spec);
            feed(&mut back, &t, 0, &[200], Prefill::Quantized);
            back.truncate(keep).unwrap();
            assert_eq!(back.len(), keep);
            let b = feed(&mut back, &t, keep, &[200 - keep], Prefill::Quantized);
            assert_eq!(a, b, "{spec} cut to {keep}");
        }
    }
    assert!(matches!(cache("fp16").truncate(1), Err(CacheError::Length { .. })));
}

#[test]
fn a_window_cache_can_be_truncated_and_goes_on() {
    let t = tokens(200);
    let mut c = cache("nuq3-1%+sink1+recent5");
    feed(&mut c, &t, 0, &[200], Prefill::Quantized);
    c.truncate(100).unwrap();
    let out = feed(&mut c, &t, 100, &[100], Prefill::Quantized);
    assert!(apart(&out, &dense(&t[0], 200)[100 * 192..]) < 0.25);
}

#[test]
fn every_stored_byte_is_counted() {
    // 1 sink, 2 full blocks; C = 64 channels, 2 layers; no outliers in a range of +-0.97 without a share.
    let t = tokens(129);
    let mut c = cache("nuq3+sink1");
    feed(&mut c, &t, 0, &[129], Prefill::Quantized);
    let b = c.bytes();
    assert_eq!(b.codes, 2 * 2 * (64 * 64 * 3 / 8) * 2);
    assert_eq!(b.scales, 2 * 2 * (64 * 2 * 2));
    assert_eq!(b.exact, 2 * 2 * 64 * 2);
    // Counts of the units and the token count, to whole words.
    assert_eq!(b.outliers, 2 * 2 * (2 * (64 / 4) + 4));
    assert!(b.index > 0);
    let elements = (2 * 2 * 64 * 129) as f64;
    assert!((c.bits_per_element() - 8.0 * b.total() as f64 / elements).abs() < 1e-12);
    assert_eq!(cache("fp16").bits_per_element(), 0.0);
}

#[test]
fn the_bits_of_an_endless_context_leave_out_what_does_not_grow() {
    let t = tokens(200);
    // One full block: codes, two scales and zero points a token, counts, and what finds the block.
    let mut c = cache("nuq3+sink1+recent32");
    feed(&mut c, &t, 0, &[64], Prefill::Quantized);
    assert_eq!(c.bits_at_infinity(), None, "all tokens are in the recent window");
    feed(&mut c, &t, 64, &[136], Prefill::Quantized);
    let b = c.bytes();
    let header = 2.0 * (8.0 * (b.index as f64 / (2.0 * 64.0 * 64.0 * 2.0)));
    let bits = c.bits_at_infinity().unwrap();
    let fixed = 3.0 + 8.0 * (64 * 2 * 2 + 2 * (64 / 4) + 4) as f64 / (2 * 64 * 64) as f64;
    assert!(bits > fixed && bits < fixed + header, "{bits} {fixed} {header}");
    // What follows is more of the same.
    let mut plain = cache("nuq3");
    feed(&mut plain, &t, 0, &[200], Prefill::Quantized);
    assert!((plain.bits_at_infinity().unwrap() - bits).abs() < 1e-12);
    assert!(bits < c.bits_per_element() && bits < plain.bits_per_element());
    let mut exact = cache("fp16");
    feed(&mut exact, &t, 0, &[200], Prefill::Quantized);
    assert!((16.0..16.2).contains(&exact.bits_at_infinity().unwrap()));
}

#[test]
fn broken_activations_are_refused_and_leave_the_cache_as_it_was() {
    let t = tokens(80);
    for spec in SPECS {
        let mut c = cache(spec);
        feed(&mut c, &t, 0, &[70], Prefill::Quantized);
        let before = c.bytes();
        for (bad, side) in [(f32::NAN, 0), (f32::INFINITY, 1), (1e6, 0)] {
            let (mut k, mut v) = (t[1].k[..640].to_vec(), t[1].v[..640].to_vec());
            [&mut k, &mut v][side][5 * 64 + 7] = bad;
            let mut out = vec![0.0; 1920];
            c.extend(0, &t[0].q[..1920], &t[0].k[..640], &t[0].v[..640], Prefill::Quantized, &mut out).unwrap();
            let e = c.extend(1, &t[1].q[..1920], &k, &v, Prefill::Quantized, &mut out).unwrap_err();
            assert!(matches!(e, CacheError::Token { layer: 1, position: 75, .. }), "{spec}: {e}");
            c.rollback();
            assert_eq!(c.len(), 70);
            if !spec.contains("recent") {
                // Lists of outliers keep the room that they grew to.
                let outliers = c.bytes().outliers;
                assert_eq!(c.bytes(), Bytes { outliers, ..before }, "{spec}");
            }
        }
        feed(&mut c, &t, 70, &[10], Prefill::Quantized);
    }
}

#[test]
fn misuse_has_names() {
    let spec: Spec = "nuq3-1%".parse().unwrap();
    let e = Cache::new(SHAPE, &spec, None, rope()).unwrap_err();
    assert!(e.to_string().contains("kvquant calibrate"), "{e}");
    let e = Cache::new(CacheShape { heads: 5, ..SHAPE }, &Spec::Fp16, None, rope()).unwrap_err();
    assert!(e.to_string().contains("query heads"), "{e}");
    let many: Spec = "nuq3-1%+sink65".parse().unwrap();
    assert!(Cache::new(SHAPE, &many, Some(&quantizer(&many)), rope()).unwrap_err().to_string().contains("sinks"));
    let mut c = cache("fp16");
    let mut out = vec![0.0; 192];
    let e = c.extend(0, &[0.0; 192], &[0.0; 64], &[0.0; 63], Prefill::Quantized, &mut out).unwrap_err();
    assert!(matches!(e, CacheError::Length { what: "v", .. }));
    c.extend(0, &[0.0; 192], &[0.0; 64], &[0.0; 64], Prefill::Quantized, &mut out).unwrap();
    assert!(matches!(c.commit(1), Err(CacheError::Uneven { layer: 1, .. })));
}

/// Wide codes in turned channels, packed in another order, come out where they belong: what queries, keys, values and
/// outputs go through cancels.
#[test]
fn transforms_and_orders_cancel() {
    let channels = SHAPE.kv_heads * SHAPE.head_dim;
    // 128 signposts from -2 to 2: coarse ones in the high part, fine ones in the low.
    let entries = || (0..16).map(|i| 128 * i).chain((0..8).map(|i| -8128 + 2048 * i));
    let mut basis = vec![0.0f32; 32 * 32];
    (0..32).for_each(|i| basis[i * 33] = 1.0);
    for i in 0..31 {
        let (s, c) = (0.4 + 0.3 * i as f32).sin_cos();
        for j in 0..32 {
            let (a, b) = (basis[i * 32 + j], basis[(i + 1) * 32 + j]);
            (basis[i * 32 + j], basis[(i + 1) * 32 + j]) = (c * a - s * b, s * a + c * b);
        }
    }
    let side = |transform: Vec<f32>| SideFit {
        lower: vec![-2.0; channels],
        upper: vec![2.0; channels],
        encode: vec![],
        decode: vec![],
        mixed: Some(MixedFit {
            widths: vec![7; channels / 4],
            order: (0..channels as u16).map(|place| 31 - place % 32).collect(),
            steps: vec![2.0 / 8128.0; channels],
            posts: (0..channels).flat_map(|_| entries()).collect(),
            transform,
        }),
    };
    let keys = || side((0..channels / 2).map(|i| 0.7 * i as f32).collect());
    let values = || side([basis.clone(), basis.iter().map(|x| -x).collect()].concat());
    let n = 150;
    let t = tokens(n);
    let want = dense(&t[0], n);
    for spec in ["mix7", "mix7+sink3", "mix7+sink1+recent32"] {
        let spec: Spec = spec.parse().unwrap();
        let mut q = quantizer(&"nuq3".parse().unwrap());
        q.fits = vec![Fit {
            spec: spec.clone(),
            layers: (0..2).map(|_| LayerFit { keys: keys(), values: values() }).collect(),
        }];
        for (calls, prefill) in
            [(vec![n], Prefill::Quantized), (vec![100, 1, 49], Prefill::Exact), (vec![1; n], Prefill::Quantized)]
        {
            let mut cache = Cache::new(SHAPE, &spec, Some(&q), rope()).unwrap();
            let got = feed(&mut cache, &t, 0, &calls, prefill);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((f64::from(*g) - w).abs() < 0.03, "{spec} {prefill:?} token {} : {g} {w}", i / 192);
            }
        }
    }
}
