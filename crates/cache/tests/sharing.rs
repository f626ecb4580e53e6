//! Sequences that share blocks: the same answers as alone, and nobody writes into what others hold.

use std::sync::Arc;

use kvquant_cache::{Cache, CacheShape, LayerAttention, Prefill, Segment};
use kvquant_kernels::rope::Rope;
use kvquant_quant::Spec;
use rand::{Rng, SeedableRng};

const SHAPE: CacheShape = CacheShape { layers: 2, heads: 4, kv_heads: 2, head_dim: 16 };
const WIDE: usize = 64;
const NARROW: usize = 32;
const SPECS: [&str; 4] = ["fp16", "int4-g16+sink3", "int3-1%+ktoken+sink1", "int4-g16+sink1+recent40"];

fn cache(spec: &str, window: Option<usize>) -> Cache {
    let rope = Arc::new(Rope { inv_freq: (0..8).map(|i| 1e4f64.powf(-(i as f64) / 8.0)).collect() });
    let layer = |window| LayerAttention { rope: rope.clone(), window };
    Cache::with_attention(SHAPE, &spec.parse::<Spec>().unwrap(), None, &[layer(None), layer(window)]).unwrap()
}

fn tokens(n: usize, seed: u64) -> [Vec<f32>; 3] {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    [WIDE, NARROW, NARROW].map(|c| (0..n * c).map(|_| rng.random_range(-1.5f32..1.5)).collect())
}

fn feed(c: &mut Cache, t: &[Vec<f32>; 3], n: usize, prefill: Prefill) -> Vec<f32> {
    let (mut all, at) = (vec![], c.len());
    let (wide, narrow) = (at * WIDE..(at + n) * WIDE, at * NARROW..(at + n) * NARROW);
    for layer in 0..SHAPE.layers {
        let mut out = vec![0.0; n * WIDE];
        c.extend(layer, &t[0][wide.clone()], &t[1][narrow.clone()], &t[2][narrow.clone()], prefill, &mut out).unwrap();
        all.extend(out);
    }
    c.commit(n).unwrap();
    all
}

fn segments(c: &Cache, n: usize) -> Vec<Segment> {
    (0..n).map(|i| c.segment(i).unwrap_or_else(|| panic!("segment {i}"))).collect()
}

#[test]
fn a_resumed_cache_continues_like_the_one_it_comes_from() {
    for spec in SPECS {
        for window in [None, Some(70)] {
            let t = tokens(400, 1);
            let mut first = cache(spec, window);
            let mut kept: Vec<Segment> = Vec::new();
            // What a window lets go was given out before.
            for _ in 0..10 {
                feed(&mut first, &t, 20, Prefill::Exact);
                kept.extend((kept.len()..).map_while(|i| first.segment(i)));
            }
            assert!(kept.len() >= 3, "{spec}: {}", kept.len());
            let mut second = first.resume(&kept[..3]).unwrap();
            let len = first.segment_tokens(3);
            assert_eq!(second.len(), len);
            if !spec.contains("recent") {
                // Alone, the same cache at the same length.
                let mut alone = cache(spec, window);
                for _ in 0..len / 20 {
                    feed(&mut alone, &t, 20, Prefill::Exact);
                }
                feed(&mut alone, &t, len % 20, Prefill::Exact);
                assert_eq!(
                    feed(&mut alone, &t, 50, Prefill::Exact),
                    feed(&mut second, &t, 50, Prefill::Exact),
                    "{spec}"
                );
            }
            assert!(second.shared_bytes() > 0 && second.shared_bytes() <= second.bytes().total());
            drop((first, kept));
            assert_eq!(second.shared_bytes(), 0, "{spec}: nobody else holds a block any more");
        }
    }
}

#[test]
fn a_fork_copies_the_open_block_before_it_writes() {
    for spec in SPECS {
        let (t, other) = (tokens(200, 1), tokens(200, 2));
        let mut first = cache(spec, None);
        feed(&mut first, &t, 100, Prefill::Exact);
        let (mut fork, mut untouched) = (first.fork(), first.fork());
        assert!(first.shared_bytes() > 0);
        feed(&mut fork, &other, 30, Prefill::Exact);
        let mut alone = cache(spec, None);
        feed(&mut alone, &t, 100, Prefill::Exact);
        let want = feed(&mut alone, &t, 60, Prefill::Exact);
        assert_eq!(feed(&mut first, &t, 60, Prefill::Exact), want, "{spec}");
        fork.truncate(90).unwrap();
        assert_eq!(feed(&mut untouched, &t, 60, Prefill::Exact), want, "{spec}: after a fork was cut");
    }
}

#[test]
fn only_what_is_final_is_given_out() {
    let t = tokens(300, 1);
    let mut c = cache("int4-g16+sink3+recent40", None);
    assert!(c.segment(0).is_none(), "sinks are not there yet");
    feed(&mut c, &t, 66, Prefill::Exact);
    assert!(c.segment(0).is_some() && c.segment(1).is_none(), "one token is missing");
    feed(&mut c, &t, 1, Prefill::Exact);
    assert!(c.segment(1).is_none(), "the block is still exact");
    feed(&mut c, &t, 100, Prefill::Exact);
    assert!(c.segment(1).is_some() && c.segment(2).is_none() && c.segment(9).is_none());

    let whole = segments(&c, 2);
    assert_eq!(whole[1].holders(), 2);
    assert!(c.resume(&whole[1..]).is_err(), "the sinks come first");
    assert!(c.resume(&[whole[0].clone(), whole[0].clone()]).is_err());
    assert_eq!(c.resume(&[]).unwrap().len(), 0);
    let bytes: usize = whole.iter().map(Segment::bytes).sum();
    assert!(bytes > 0 && bytes < c.bytes().total());
}

#[test]
fn an_estimate_is_near_what_is_held() {
    for spec in SPECS {
        for (window, n) in [(None, 500), (Some(70), 500), (None, 1), (None, 66)] {
            let t = tokens(n, 1);
            let mut c = cache(spec, window);
            feed(&mut c, &t, n, Prefill::Exact);
            let (estimate, held) = (c.bytes_for(n) as f64, c.bytes().total() as f64);
            // An empty list of blocks has room for some; 32 channels have more than 1 % of outliers.
            assert!(estimate > 0.75 * held - 1000.0 && estimate < 1.5 * held + 2000.0, "{spec} {n}: {estimate} {held}");
        }
    }
}
