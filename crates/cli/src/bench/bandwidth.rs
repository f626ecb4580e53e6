//! What the machine can read, and its name.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// Bytes of the buffer that is read: beyond any cache.
const BYTES: usize = 1 << 29;
const ROUNDS: usize = 6;

/// The most that all threads together read from memory, GB/s.
pub fn read_gbps() -> f64 {
    let buffer = vec![1u64; BYTES / 8];
    let part = buffer.len().div_ceil(rayon::current_num_threads());
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let sum: u64 = buffer.par_chunks(part).with_max_len(1).map(sum).sum();
        black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    BYTES as f64 / best / 1e9
}

/// Several sums at once, so that additions do not wait for each other.
fn sum(part: &[u64]) -> u64 {
    let (chunks, rest) = part.as_chunks::<32>();
    let mut lanes = [0u64; 32];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*x);
        }
    }
    lanes.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

/// The CPU as the system names it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}
