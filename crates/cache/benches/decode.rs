//! Attention of one token over all layers of a deep cache, as a decode step does it: all threads, blocks from memory,
//! between products that read the layer's weights.
//!
//! `cargo bench -p kvquant-cache --bench decode -- [tokens] [spec ...]`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use kvquant_cache::{Cache, CacheShape, Prefill};
use kvquant_kernels::rope::Rope;
use kvquant_kernels::threads;
use kvquant_quant::{Quantizer, SideFit, Spec};
use rand::{Rng, SeedableRng};

/// The shape that the quantizer file is for.
const SHAPE: CacheShape = CacheShape { layers: 30, heads: 9, kv_heads: 3, head_dim: 64 };
const STEPS: usize = 40;
/// Numbers of 64 bits that a layer's weights have in the model's file.
const LAYER_WEIGHTS: usize = 280_000;
/// Sums of six uniform numbers of unit width: what 1 % and 0.3 % of them are beyond.
const FIXED: f32 = 1.8;
const MIXED: f32 = 2.05;

/// How much more a channel spreads than others. Real outliers gather in few channels: of keys, where bounds were found on another
/// text, 1.5 % are outliers, of which four in ten follow one of their own channel; of values more than half do.
fn spread(channel: usize, [period, more]: [f32; 2]) -> f32 {
    if channel % period as usize == 3 { more } else { 1.0 }
}
const OF_KEYS: [f32; 2] = [8.0, 1.35];
const OF_VALUES: [f32; 2] = [32.0, 2.2];

/// Reads a layer's weights, as a step does before it attends: what caches held of earlier layers is gone then.
fn read(weights: &[u64]) {
    let pieces: Vec<&[u64]> = weights.chunks(LAYER_WEIGHTS / 64).collect();
    threads::for_each(pieces.len(), |i| {
        black_box(pieces[i].iter().fold(0, |sum: u64, x| sum.wrapping_add(*x)));
    });
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let (numbers, specs): (Vec<_>, Vec<_>) = words.iter().partition(|w| w.parse::<usize>().is_ok());
    let depth = numbers.first().map_or(32768, |w| w.parse().expect("a number"));
    let specs = if specs.is_empty() {
        "fp16 nuq4-1% nuq3-1% nuq2-1%".split(' ').map(str::to_string).collect()
    } else {
        specs.into_iter().cloned().collect::<Vec<_>>()
    };
    let path = std::env::var("KVQUANT_QUANTIZER")
        .unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../../quantizers/smollm2-135m.safetensors").into());
    let quantizer = Quantizer::load(path.as_ref()).expect("a quantizer file");
    let rope = Arc::new(Rope { inv_freq: (0..32).map(|i| 100_000f64.powf(-(i as f64) / 32.0)).collect() });
    let weights = vec![1u64; SHAPE.layers * LAYER_WEIGHTS];
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut noise = |n: usize| (0..n).map(|_| (0..6).map(|_| rng.random::<f32>() - 0.5).sum()).collect::<Vec<f32>>();
    println!("{depth} tokens, {} threads; ms for a token's attention in all layers", threads::count());
    println!("{:16} {:>8} {:>8} {:>8}", "cache", "least", "median", "MB");
    for spec in specs {
        let parsed: Spec = spec.parse().expect("a cache spec");
        let mut cache = Cache::new(SHAPE, &parsed, Some(&quantizer), rope.clone()).expect("a fit for the spec");
        let n = depth.min(1024);
        let mut tokens = Vec::new();
        for layer in 0..SHAPE.layers {
            let (mut k, mut v) = (noise(n * 192), noise(n * 192));
            if let Ok(fit) = quantizer.fit(&parsed).map(|f| &f.layers[layer]) {
                // About as many outliers as real keys and values have; 0.3 % where widths are mixed.
                let within = |of: &SideFit, c: usize, x: f32, most: f32| {
                    (of.lower[c] + of.upper[c]) / 2.0 + x / most * (of.upper[c] - of.lower[c]) / 2.0
                };
                match (&fit.keys.mixed, &fit.values.mixed) {
                    (Some(of_keys), Some(of_values)) => {
                        for token in k.chunks_exact_mut(192) {
                            for (i, angle) in of_keys.transform.iter().enumerate() {
                                let (sin, cos) = angle.sin_cos();
                                let [a, b] = [2 * i, 2 * i + 1].map(|c| within(&fit.keys, c, token[c], MIXED));
                                (token[2 * i], token[2 * i + 1]) = (a * cos + b * sin, b * cos - a * sin);
                            }
                        }
                        for (i, head) in v.chunks_exact_mut(64).enumerate() {
                            let first = i % 3 * 64;
                            let axes: Vec<f32> =
                                (0..64).map(|c| within(&fit.values, first + c, head[c], MIXED)).collect();
                            for (c, x) in head.iter_mut().enumerate() {
                                *x = (0..64).map(|a| of_values.transform[(first + a) * 64 + c] * axes[a]).sum();
                            }
                        }
                    }
                    _ => {
                        for (i, x) in k.iter_mut().enumerate() {
                            *x = within(&fit.keys, i % 192, *x * spread(i, OF_KEYS), FIXED);
                        }
                        v.iter_mut().enumerate().for_each(|(i, x)| *x *= spread(i, OF_VALUES));
                    }
                }
            }
            tokens.push((k[..192].to_vec(), v[..192].to_vec()));
            cache.append(layer, &k, &v).expect("numbers that fit");
        }
        cache.commit(n).expect("even layers");
        cache.repeat_to(depth).expect("whole blocks");
        let q = noise(576);
        let mut out = vec![0.0; 576];
        let mut times: Vec<f64> = (0..STEPS)
            .map(|_| {
                let mut seconds = 0.0;
                for (layer, weights) in weights.chunks_exact(LAYER_WEIGHTS).enumerate() {
                    read(weights);
                    let (k, v) = &tokens[layer];
                    let start = Instant::now();
                    cache.extend(layer, &q, k, v, Prefill::Exact, &mut out).expect("numbers that fit");
                    seconds += start.elapsed().as_secs_f64();
                }
                cache.commit(1).expect("even layers");
                seconds * 1e3
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{spec:16} {:8.2} {:8.2} {:8.1}", times[0], times[STEPS / 2], cache.bytes().total() as f64 / 1e6);
    }
}
