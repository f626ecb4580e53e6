//! Caches on disk: they continue bit for bit, and nothing that is damaged or of another kind is taken.

use std::path::Path;
use std::sync::Arc;

use kvquant_cache::{
    Cache, CacheShape, LayerAttention, Prefill, SessionError, SessionFile, SessionIdentity, SessionInfo, save_session,
};
use kvquant_kernels::rope::Rope;
use kvquant_quant::Spec;
use rand::{Rng, SeedableRng};

const SHAPE: CacheShape = CacheShape { layers: 2, heads: 4, kv_heads: 2, head_dim: 16 };
const SPECS: [&str; 4] = ["fp16", "int4-g16+sink3", "int3-1%+ktoken+sink1", "int4-g16+sink1+recent40"];

fn cache(spec: &str, window: Option<usize>) -> Cache {
    let rope = Arc::new(Rope { inv_freq: (0..8).map(|i| 1e4f64.powf(-(i as f64) / 8.0)).collect() });
    let layer = |window| LayerAttention { rope: rope.clone(), window };
    Cache::with_attention(SHAPE, &spec.parse::<Spec>().unwrap(), None, &[layer(None), layer(window)]).unwrap()
}

fn feed(c: &mut Cache, n: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut all = vec![];
    for layer in 0..SHAPE.layers {
        let mut fill = |w: usize| (0..n * w).map(|_| rng.random_range(-1.5f32..1.5)).collect::<Vec<_>>();
        let (q, k, v, mut out) = (fill(64), fill(32), fill(32), vec![0.0; n * 64]);
        c.extend(layer, &q, &k, &v, Prefill::Exact, &mut out).unwrap();
        all.extend(out);
    }
    c.commit(n).unwrap();
    all
}

fn info(spec: &str, tokens: usize) -> SessionInfo {
    SessionInfo {
        identity: SessionIdentity {
            weights_sha256: "ab".repeat(32),
            quantizer_sha256: String::new(),
            spec: spec.into(),
        },
        model: "test".into(),
        prefill_chunk: 128,
        after: "<end>".into(),
        tokens,
        created: 1,
    }
}

fn saved(path: &Path, spec: &str, window: Option<usize>, n: usize) -> Cache {
    let mut c = cache(spec, window);
    feed(&mut c, n, 1);
    let tokens: Vec<u32> = (0..n as u32).collect();
    save_session(path, &c, &tokens, &info(spec, n)).unwrap();
    c
}

#[test]
fn a_restored_cache_continues_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kvs");
    for spec in SPECS {
        for window in [None, Some(70)] {
            for n in [1, 3, 64, 67, 200, 300] {
                let mut first = saved(&path, spec, window, n);
                let file = SessionFile::open(&path).unwrap();
                assert_eq!(file.info(), &info(spec, n));
                assert_eq!(file.tokens().unwrap(), (0..n as u32).collect::<Vec<_>>());
                let mut second = file.cache(&cache(spec, window)).unwrap();
                assert_eq!((second.len(), second.bytes().codes), (n, first.bytes().codes));
                for (n, seed) in [(1, 2), (70, 3), (1, 4)] {
                    assert_eq!(feed(&mut first, n, seed), feed(&mut second, n, seed), "{spec} {window:?} {n}");
                }
                let cut = first.keepable(first.len() - 5);
                first.truncate(cut).unwrap();
                second.truncate(cut).unwrap();
                assert_eq!(feed(&mut first, 9, 5), feed(&mut second, 9, 5), "{spec} {window:?} {n}: after a cut");
            }
        }
    }
}

#[test]
fn segments_are_read_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kvs");
    for spec in SPECS {
        let first = saved(&path, spec, None, 300);
        let (file, empty) = (SessionFile::open(&path).unwrap(), cache(spec, None));
        let mut segments = vec![];
        while let Some(s) = file.segment(&empty, segments.len()).unwrap() {
            assert_eq!(Some(s.bytes()), first.segment(segments.len()).map(|s| s.bytes()), "{spec}");
            segments.push(s);
        }
        assert!(first.segment(segments.len()).is_none(), "{spec}: all that can be shared was there");
        assert!(segments.len() > 3);
        let (mut a, mut b) = (empty.resume(&segments).unwrap(), first.fork());
        b.truncate(a.len()).unwrap();
        if !spec.contains("recent") {
            assert_eq!(feed(&mut a, 5, 9), feed(&mut b, 5, 9), "{spec}");
        }
        assert!(file.segment(&empty, 99).unwrap().is_none());
    }
}

/// Reads everything that a file has.
fn read(path: &Path, spec: &str) -> Result<(), SessionError> {
    let file = SessionFile::open(path)?;
    file.check(&info(spec, 0).identity)?;
    file.tokens()?;
    file.cache(&cache(spec, None)).map(|_| ())
}

#[test]
fn every_flipped_bit_and_every_cut_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kvs");
    let spec = "int3-1%+ktoken+sink1";
    saved(&path, spec, None, 100);
    let whole = std::fs::read(&path).unwrap();
    read(&path, spec).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let mut places: Vec<usize> = (0..400).map(|_| rng.random_range(0..whole.len())).collect();
    places.extend([0, 7, 8, whole.len() - 1, whole.len() - 9, whole.len() - 48, whole.len() - 41]);
    for at in places {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bytes).unwrap();
        let e = read(&path, spec).unwrap_err();
        assert!(matches!(e, SessionError::Damaged { .. } | SessionError::Other { .. }), "byte {at}: {e}");
    }
    for len in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(read(&path, spec).unwrap_err(), SessionError::Damaged { .. }), "{len} bytes");
    }
    let mut longer = whole.clone();
    longer.push(0);
    std::fs::write(&path, &longer).unwrap();
    assert!(read(&path, spec).is_err());
}

#[test]
fn other_models_specs_and_shapes_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kvs");
    let spec = "int4-g16+sink3";
    saved(&path, spec, None, 100);
    let file = SessionFile::open(&path).unwrap();
    let mine = info(spec, 0).identity;
    file.check(&mine).unwrap();
    for (what, other) in [
        ("model", SessionIdentity { weights_sha256: "cd".repeat(32), ..mine.clone() }),
        ("quantizer", SessionIdentity { quantizer_sha256: "ef".repeat(32), ..mine.clone() }),
        ("spec", SessionIdentity { spec: "fp16".into(), ..mine }),
    ] {
        let e = file.check(&other).unwrap_err().to_string();
        assert!(e.contains(what) && e.contains("a.kvs"), "{e}");
    }
    // Whoever does not ask gets no cache of another kind either.
    for other in ["fp16", "int4-g16+sink1", "int3-1%+ktoken+sink3", "int4-g8+sink3"] {
        assert!(file.cache(&cache(other, None)).is_err(), "{other}");
        assert!(file.segment(&cache(other, None), 1).is_err(), "{other}");
    }
}

#[test]
fn a_save_that_fails_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.kvs");
    let c = saved(&path, "fp16", None, 10);
    let before = std::fs::read(&path).unwrap();
    assert!(save_session(&path, &c, &[1, 2], &info("fp16", 10)).is_err(), "tokens of another text");
    assert!(save_session(&folder.path().join("none/a.kvs"), &c, &[0; 10], &info("fp16", 10)).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // A process that died on the way leaves a partial file, which is not the session.
    std::fs::write(folder.path().join("a.kvs.1.partial"), &before[..20]).unwrap();
    read(&path, "fp16").unwrap();
}
