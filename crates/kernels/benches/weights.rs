//! Products with quantized weights at the shapes of a 135M model (30 layers, width 576, MLP 1536, 49152 tokens).
//!
//! Decode: a whole step's matrices in turn (98 MB, more than any cache here), against the rate at which the same
//! threads can read memory. Prefill: GFLOP/s of 512 tokens, against what the FMA units can do. Every product is
//! checked in f64 before it is timed. Integer and f32 activations in turns. `cargo bench -p kvquant-kernels --bench weights [decode|types|prefill|few]`

use std::hint::black_box;
use std::time::Instant;

use kvquant_kernels::dispatch;
use kvquant_kernels::linalg::gemm;
use kvquant_kernels::weights::{Activations, Weight, WeightType, matmul_fused};
use rayon::prelude::*;

const WIDTH: usize = 576;
const KV: usize = 192;
const MLP: usize = 1536;
const VOCAB: usize = 49152;
const LAYERS: usize = 30;

fn noise(seed: usize) -> impl FnMut() -> u32 {
    let mut s = seed as u64 ^ 0x9E37_79B9_7F4A_7C15;
    move || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 32) as u32
    }
}

fn activations(n: usize) -> Vec<f32> {
    let mut next = noise(7);
    (0..n).map(|_| next() as f32 / (1u64 << 31) as f32 - 1.0).collect()
}

/// Random codes; halves (scales and minima, wherever the type has them) of about 0.01.
fn weight(ty: WeightType, rows: usize, cols: usize, seed: usize) -> Weight {
    let (elements, size) = ty.block();
    let mut next = noise(seed + 1);
    let halves: &[usize] = match ty {
        WeightType::F16 | WeightType::Q4_0 | WeightType::Q5_0 | WeightType::Q8_0 => &[0],
        WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4K | WeightType::Q5K => &[0, 2],
        WeightType::Q2K => &[80, 82],
        WeightType::Q3K => &[108],
        WeightType::Q6K => &[208],
        WeightType::F32 | WeightType::Bf16 => &[],
    };
    let mut data: Vec<u8> = (0..rows * cols / elements * size).map(|_| next() as u8).collect();
    for block in data.chunks_exact_mut(size) {
        for &at in halves {
            block[at..at + 2].copy_from_slice(&(0x2100 | (next() & 0x81ff) as u16).to_le_bytes());
        }
        if halves.is_empty() {
            block[size - 1] = 0x3c | block[size - 1] & 0x81;
        }
    }
    Weight::from_gguf(ty, rows, cols, data).expect("whole blocks")
}

/// Within what rounding to 8 bits may change, and sums in f32.
fn check(a: Activations, w: &Weight, x: &[f32], m: usize) {
    let mut y = vec![f32::NAN; m * w.rows()];
    w.matmul(a, x, m, &mut y);
    let mut row = vec![0.0; w.cols()];
    for r in (0..w.rows()).step_by(w.rows() / 7 + 1).chain([w.rows() - 1]) {
        w.dequant_row(r, &mut row);
        for t in 0..m {
            let x = &x[t * w.cols()..][..w.cols()];
            let pairs = row.iter().zip(x).map(|(a, b)| *a as f64 * *b as f64);
            let (want, size) = pairs.fold((0.0, 0.0), |(s, z), p| (s + p, z + p.abs()));
            let rounding: f64 = row
                .chunks(32)
                .zip(x.chunks(32))
                .map(|(w, x)| {
                    let largest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
                    w.iter().map(|w| w.abs() as f64).sum::<f64>() * largest as f64 / 2.0
                })
                .sum();
            let most = match a {
                Activations::Int8 => 127.0,
                Activations::Int15 => 16256.0,
                Activations::F32 => f64::INFINITY,
            };
            let bound = 2e-6 * size + 1.001 * rounding / most;
            let got = y[t * w.rows() + r] as f64;
            assert!((got - want).abs() <= bound, "{} m {m} row {r}: {got} {want}", w.ty().name());
        }
    }
}

/// Seconds of the best run: what disturbs a run only ever makes it longer.
fn time(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut all: Vec<f64> = (0..runs)
        .map(|_| {
            let t = Instant::now();
            f();
            t.elapsed().as_secs_f64()
        })
        .collect();
    all.sort_by(f64::total_cmp);
    all[0]
}

/// Bytes a second that all threads read together.
fn read_rate() -> f64 {
    let data = vec![1u64; 32 << 20];
    let s = time(9, || {
        let sum: u64 = data.par_chunks(1 << 16).map(|c| c.iter().fold(0u64, |a, b| a.wrapping_add(*b))).sum();
        black_box(sum);
    });
    (data.len() * 8) as f64 / s
}

/// f32 operations a second of one thread whose FMA units are never idle, times the threads.
fn peak() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if dispatch::Isa::Avx2.is_available() {
        use std::arch::x86_64::*;
        /// # Safety
        /// The CPU has AVX2 and FMA.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn spin(n: usize) -> f32 {
            let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
            let mut acc = [_mm256_setzero_ps(); 12];
            for _ in 0..n {
                for x in &mut acc {
                    *x = _mm256_fmadd_ps(*x, a, b);
                }
            }
            acc.iter().map(|x| _mm256_cvtss_f32(*x)).sum()
        }
        const N: usize = 1_000_000;
        let threads = rayon::current_num_threads();
        let s = time(9, || {
            (0..threads).into_par_iter().for_each(|_| {
                // SAFETY: detected above.
                black_box(unsafe { spin(N) });
            });
        });
        return (threads * N * 12 * 16) as f64 / s;
    }
    f64::NAN
}

struct Layer {
    q: Weight,
    k: Weight,
    v: Weight,
    o: Weight,
    gate: Weight,
    up: Weight,
    down: Weight,
}

fn decode(a: Activations, ty: WeightType, rate: f64) {
    let layers: Vec<Layer> = (0..LAYERS)
        .map(|i| Layer {
            q: weight(ty, WIDTH, WIDTH, i),
            k: weight(ty, KV, WIDTH, i),
            v: weight(ty, KV, WIDTH, i),
            o: weight(ty, WIDTH, WIDTH, i),
            gate: weight(ty, MLP, WIDTH, i),
            up: weight(ty, MLP, WIDTH, i),
            down: weight(ty, WIDTH, MLP, i),
        })
        .collect();
    let head = weight(WeightType::Q8_0, VOCAB, WIDTH, 99);
    let bytes: usize = layers
        .iter()
        .flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down])
        .chain([&head])
        .map(Weight::bytes)
        .sum();
    for m in [1, 2, 4, 8] {
        let x = activations(m * MLP);
        let (narrow, wide) = (&x[..m * WIDTH], &x[..m * MLP]);
        for w in [&layers[0].q, &layers[0].up, &head] {
            check(a, w, narrow, m);
        }
        check(a, &layers[0].down, wide, m);
        let mut y: [Vec<f32>; 7] = [WIDTH, KV, KV, WIDTH, MLP, MLP, WIDTH].map(|n| vec![0.0; m * n]);
        let mut logits = vec![0.0; m * VOCAB];
        let mut only_head = 0.0;
        let mut step = || {
            let [q, k, v, o, gate, up, down] = &mut y;
            for l in &layers {
                matmul_fused(a, &[&l.q, &l.k, &l.v], narrow, m, &mut [q, k, v]);
                l.o.matmul(a, narrow, m, o);
                matmul_fused(a, &[&l.gate, &l.up], narrow, m, &mut [gate, up]);
                l.down.matmul(a, wide, m, down);
            }
            let t = Instant::now();
            head.matmul(a, narrow, m, &mut logits);
            only_head = t.elapsed().as_secs_f64();
        };
        let outside = time(15, &mut step);
        let (mut inside, threads) = (0.0, rayon::current_num_threads());
        rayon::scope(|_| inside = time(15, &mut step));
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool of one");
        let single = alone.install(|| time(15, &mut step));
        let floor = bytes as f64 / rate;
        println!(
            "{:5} {:4} m={m}  {:5.1} MB  called from outside the pool {:6.2} ms, from inside {:6.2} ms = {:5.1} GB/s, {:3.0} % of reading; floor {:.2} ms; 1 of {threads} threads {:6.2} ms; head alone {:.2} ms",
            ty.name(),
            a.name(),
            bytes as f64 / 1e6,
            outside * 1e3,
            inside * 1e3,
            bytes as f64 / inside / 1e9,
            100.0 * floor / inside,
            floor * 1e3,
            single * 1e3,
            only_head * 1e3,
        );
    }
}

/// Every type at one thread from cache, where the arithmetic shows, and with all threads.
fn types() {
    for ty in WeightType::ALL {
        let w = weight(ty, 512, 1024, 3);
        let x = activations(8 * w.cols());
        let mut line = format!("{:5}", ty.name());
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool of one");
        for (a, m) in Activations::ALL.into_iter().flat_map(|a| [(a, 1), (a, 8)]) {
            let x = &x[..m * w.cols()];
            check(a, &w, x, m);
            let mut y = vec![0.0; m * w.rows()];
            let s = alone.install(|| time(51, || w.matmul(a, x, m, &mut y)));
            line += &format!(
                "  {} m={m}: {:6.1} us, {:5.2} GB/s, {:5.2} G weights/s",
                a.name(),
                s * 1e6,
                w.bytes() as f64 / s / 1e9,
                (w.rows() * w.cols()) as f64 / s / 1e9
            );
        }
        println!("{line}");
    }
}

fn prefill(peak: f64) {
    for (ty, rows, cols) in [
        (WeightType::Q4_1, WIDTH, WIDTH),
        (WeightType::Q4_1, KV, WIDTH),
        (WeightType::Q4_1, MLP, WIDTH),
        (WeightType::Q4_1, WIDTH, MLP),
        (WeightType::Q8_0, MLP, WIDTH),
        (WeightType::Q6K, WIDTH, MLP),
        (WeightType::F32, WIDTH, MLP),
        (WeightType::Q4_1, 1024, 4096),
    ] {
        let w = weight(ty, rows, cols, 5);
        for (a, m) in Activations::ALL.into_iter().flat_map(|a| [(a, 512), (a, 64)]) {
            let x = activations(m * cols);
            check(a, &w, &x, m);
            let mut y = vec![0.0; m * rows];
            let mut s = 0.0;
            rayon::scope(|_| s = time(15, || w.matmul(a, &x, m, &mut y)));
            let rate = (2 * m * rows * cols) as f64 / s;
            println!(
                "{:5} {:4} m={m:<4} [{rows:4}, {cols:4}]  {:7.3} ms  {:6.1} GFLOP/s  {:3.0} % of {:.0}",
                ty.name(),
                a.name(),
                s * 1e3,
                rate / 1e9,
                100.0 * rate / peak,
                peak / 1e9
            );
        }
    }
}

/// The dense product that calibration uses, at its shapes.
fn dense(peak: f64) {
    for (m, n, k, transposed) in [(512, MLP, WIDTH, true), (512, WIDTH, MLP, true), (512, WIDTH, MLP, false)] {
        let (a, b) = (activations(m * k), activations(n * k));
        let (b_rs, b_cs) = if transposed { (1, k) } else { (n, 1) };
        let mut c = vec![0.0; m * n];
        let s = time(15, || gemm(m, n, k, 1.0, &a, k, 1, &b, b_rs, b_cs, 0.0, &mut c, n, rayon::current_num_threads()));
        let want: f64 = (0..k).map(|p| a[p] as f64 * b[p * b_rs] as f64).sum();
        assert!((c[0] as f64 - want).abs() < 1e-3, "{} {want}", c[0]);
        let rate = (2 * m * n * k) as f64 / s;
        println!(
            "dense [{m}, {k}] [{k}, {n}]  {:6.1} GFLOP/s  {:3.0} % of {:.0}",
            rate / 1e9,
            100.0 * rate / peak,
            peak / 1e9
        );
    }
}

/// What a token costs among few.
fn few() {
    let w = weight(WeightType::Q4_1, MLP, WIDTH, 5);
    for a in Activations::ALL {
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24, 32] {
            let x = activations(m * WIDTH);
            check(a, &w, &x, m);
            let mut y = vec![0.0; m * MLP];
            let mut s = 0.0;
            rayon::scope(|_| s = time(51, || w.matmul(a, &x, m, &mut y)));
            println!("{:4} m={m:<2}  {:6.1} us  {:6.1} us a token", a.name(), s * 1e6, s * 1e6 / m as f64);
        }
    }
}

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wants = |name: &str| asked.is_empty() || asked.iter().any(|a| a == name);
    print!("{}", dispatch::cpu_report());
    if wants("decode") {
        let rate = read_rate();
        println!("reading memory: {:.1} GB/s", rate / 1e9);
        for a in Activations::ALL {
            decode(a, WeightType::Q4_1, rate);
            decode(a, WeightType::Q8_0, rate);
        }
    }
    if wants("types") {
        types();
    }
    if wants("few") {
        few();
    }
    if wants("prefill") {
        let peak = peak();
        dense(peak);
        prefill(peak);
    }
}
