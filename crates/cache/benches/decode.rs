//! Attention of one token over all layers of a deep cache, as a decode step does it: all threads, blocks from memory.
//!
//! `cargo bench -p kvquant-cache --bench decode -- [tokens] [spec ...]`

use std::sync::Arc;
use std::time::Instant;

use kvquant_cache::{Cache, CacheShape, Prefill};
use kvquant_kernels::rope::Rope;
use kvquant_quant::{Quantizer, SideFit, Spec};
use rand::{Rng, SeedableRng};

/// The shape that the quantizer file is for.
const SHAPE: CacheShape = CacheShape { layers: 30, heads: 9, kv_heads: 3, head_dim: 64 };
const STEPS: usize = 40;

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
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut noise = |n: usize| (0..n).map(|_| (0..6).map(|_| rng.random::<f32>() - 0.5).sum()).collect::<Vec<f32>>();
    println!("{depth} tokens, {} threads; ms for a token's attention in all layers", kvquant_kernels::threads::count());
    println!("{:16} {:>8} {:>8} {:>8}", "cache", "least", "median", "MB");
    for spec in specs {
        let parsed: Spec = spec.parse().expect("a cache spec");
        let mut cache = Cache::new(SHAPE, &parsed, Some(&quantizer), rope.clone()).expect("a fit for the spec");
        let n = depth.min(1024);
        for layer in 0..SHAPE.layers {
            let (mut k, mut v) = (noise(n * 192), noise(n * 192));
            if let Ok(fit) = quantizer.fit(&parsed).map(|f| &f.layers[layer]) {
                // About as many outliers as real keys have.
                let middle =
                    |of: &SideFit| -> Vec<f32> { of.lower.iter().zip(&of.upper).map(|(l, u)| (l + u) / 2.0).collect() };
                let (keys, values) = (middle(&fit.keys), middle(&fit.values));
                match (&fit.keys.mixed, &fit.values.mixed) {
                    (Some(of_keys), Some(of_values)) => {
                        for (i, x) in k.iter_mut().enumerate() {
                            let (c, at) = (i % 192, i % 192 / 2 * 2);
                            let (sin, cos) = of_keys.transform[c / 2].sin_cos();
                            let turned = [keys[at] * cos + keys[at + 1] * sin, keys[at + 1] * cos - keys[at] * sin];
                            *x = turned[c % 2] + *x * 0.01;
                        }
                        for (i, x) in v.iter_mut().enumerate() {
                            let (head, c) = (i % 192 / 64, i % 64);
                            let back = |axis: usize| {
                                of_values.transform[(head * 64 + axis) * 64 + c] * values[head * 64 + axis]
                            };
                            *x = (0..64).map(back).sum::<f32>() + *x * 0.001;
                        }
                    }
                    _ => {
                        for (i, x) in k.iter_mut().enumerate() {
                            let half = (fit.keys.upper[i % 192] - fit.keys.lower[i % 192]) / 2.0;
                            *x = keys[i % 192] + *x / 1.8 * half;
                        }
                    }
                }
            }
            cache.append(layer, &k, &v).expect("numbers that fit");
        }
        cache.commit(n).expect("even layers");
        cache.repeat_to(depth).expect("whole blocks");
        let (q, k, v) = (noise(576), noise(192), noise(192));
        let mut out = vec![0.0; 576];
        let mut times: Vec<f64> = (0..STEPS)
            .map(|_| {
                let start = Instant::now();
                for layer in 0..SHAPE.layers {
                    cache.extend(layer, &q, &k, &v, Prefill::Exact, &mut out).expect("numbers that fit");
                }
                cache.commit(1).expect("even layers");
                start.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{spec:16} {:8.2} {:8.2} {:8.1}", times[0], times[STEPS / 2], cache.bytes().total() as f64 / 1e6);
    }
}
