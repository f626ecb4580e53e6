//! Caches that take their tables from their own tokens.

use std::sync::Arc;

use kvquant_cache::{
    Cache, CacheError, CacheShape, LayerAttention, Prefill, SessionError, SessionIdentity, SessionInfo, save_session,
};
use kvquant_kernels::rope::Rope;
use rand::{Rng, SeedableRng};

const SHAPE: CacheShape = CacheShape { layers: 1, heads: 4, kv_heads: 2, head_dim: 16 };
const WIDE: usize = 64;
const NARROW: usize = 32;

fn cache(spec: &str, window: Option<usize>) -> Cache {
    let rope = Arc::new(Rope { inv_freq: (0..8).map(|i| 1e4f64.powf(-f64::from(i) / 8.0)).collect() });
    Cache::with_attention(SHAPE, &spec.parse().unwrap(), None, &[LayerAttention { rope, window }]).unwrap()
}

/// q, k, v; from token `shift` on, keys and values are four times as large and lie elsewhere.
fn tokens(n: usize, shift: usize) -> [Vec<f32>; 3] {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let q = (0..n * WIDE).map(|_| rng.random_range(-0.5f32..0.5)).collect();
    let [k, v] = [0, 1].map(|_| {
        let at = |i: usize| if i / NARROW < shift { (1.0, 0.3) } else { (4.0, -1.0) };
        (0..n * NARROW).map(|i| at(i).0 * rng.random_range(-1.0f32..1.0) + at(i).1).collect()
    });
    [q, k, v]
}

fn feed(c: &mut Cache, t: &[Vec<f32>; 3], calls: &[usize], prefill: Prefill) -> Vec<f32> {
    let mut all = vec![];
    for &n in calls {
        let at = c.len();
        let (wide, narrow) = (at * WIDE..(at + n) * WIDE, at * NARROW..(at + n) * NARROW);
        let mut out = vec![0.0; n * WIDE];
        c.extend(0, &t[0][wide], &t[1][narrow.clone()], &t[2][narrow], prefill, &mut out).unwrap();
        c.commit(n).unwrap();
        all.extend(out);
    }
    all
}

/// sqrt(sum (a - b)^2 / sum b^2)
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(a, b)| f(f64::from(*a), f64::from(*b))).sum::<f64>();
    (sum(&|a, b| (a - b).powi(2)) / sum(&|_, b| b * b)).sqrt()
}

#[test]
fn codes_follow_a_shift_within_a_context() {
    let n = 3000;
    let t = tokens(n, 1200);
    for window in [None, Some(700)] {
        let want = feed(&mut cache("fp16", window), &t, &[n], Prefill::Quantized);
        let mut c = cache("nuq4-1%+sink1+online", window);
        let got = feed(&mut c, &t, &[n], Prefill::Quantized);
        // Nothing is quantized before the first thresholds are there.
        assert!(apart(&got[..250 * WIDE], &want[..250 * WIDE]) < 2e-3);
        let error = |tokens: std::ops::Range<usize>| {
            let part = tokens.start * WIDE..tokens.end * WIDE;
            apart(&got[part.clone()], &want[part])
        };
        let (before, after) = (error(900..1200), error(2700..3000));
        assert!(before < 0.08 && after < 0.08, "{before} {after}");
        assert!(c.bits_per_element() < if window.is_some() { 12.0 } else { 8.0 }, "{}", c.bits_per_element());
    }
}

#[test]
fn what_is_stored_does_not_depend_on_calls() {
    let n = 700;
    let t = tokens(n, 400);
    for spec in ["nuq3-1%+sink1+online", "nuq3-1%+recent70+online", "int4+vchannel+online", "nuq2+postrope+online"] {
        let mut one = cache(spec, None);
        feed(&mut one, &t, &[n], Prefill::Exact);
        let mut many = cache(spec, None);
        feed(&mut many, &t, &[1, 250, 1, 1, 65, 100, 64, 218], Prefill::Quantized);
        let mut singles = cache(spec, None);
        feed(&mut singles, &t, &[1; 700], Prefill::Quantized);
        assert_eq!(one.bytes(), many.bytes(), "{spec}");
        assert_eq!(one.bytes(), singles.bytes(), "{spec}");
        let next = tokens(n + 1, 400);
        let rest = [&next[0][n * WIDE..], &next[1][n * NARROW..], &next[2][n * NARROW..]];
        let outputs = [one, many, singles].map(|mut c| {
            let mut out = vec![0.0; WIDE];
            c.extend(0, rest[0], rest[1], rest[2], Prefill::Quantized, &mut out).unwrap();
            out
        });
        assert!(outputs.iter().all(|o| *o == outputs[0]), "{spec}");
    }
}

#[test]
fn a_shorter_history_goes_on() {
    let t = tokens(1500, 600);
    let want = feed(&mut cache("fp16", None), &t, &[1500], Prefill::Quantized);
    let mut c = cache("nuq4-1%+sink1+online", None);
    feed(&mut c, &t, &[1500], Prefill::Quantized);
    for keep in [1000, 333, 100, 0] {
        let mut c = c.fork();
        c.truncate(keep).unwrap();
        let got = feed(&mut c, &t, &[1400 - keep], Prefill::Quantized);
        assert!(apart(&got[got.len() - 100 * WIDE..], &want[1300 * WIDE..1400 * WIDE]) < 0.08, "{keep}");
    }
    // Copies of blocks are read with the tables of the last ones.
    c.repeat_to(3000).unwrap();
    assert!(c.len() >= 3000);
    let mut out = vec![0.0; WIDE];
    c.extend(0, &t[0][..WIDE], &t[1][..NARROW], &t[2][..NARROW], Prefill::Quantized, &mut out).unwrap();
    assert!(out.iter().all(|x| x.is_finite()));
}

#[test]
fn what_only_one_cache_can_read_is_not_given_away() {
    let t = tokens(400, 400);
    let mut c = cache("nuq3-1%+sink1+online", None);
    feed(&mut c, &t, &[400], Prefill::Quantized);
    assert!(c.segment(0).is_some() && c.segment(1).is_none());
    let identity =
        SessionIdentity { weights_sha256: String::new(), quantizer_sha256: String::new(), spec: c.spec().to_string() };
    let info =
        SessionInfo { identity, model: "m".into(), prefill_chunk: 128, after: String::new(), tokens: 400, created: 0 };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let e = save_session(&path, &c, &vec![0; 400], &info).unwrap_err();
    assert!(matches!(e, SessionError::Cache(CacheError::Online { .. })), "{e}");
    assert!(!path.exists());
}
