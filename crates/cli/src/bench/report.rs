//! The report: JSON and a table.

use kvquant_eval::table;
use serde::Serialize;

use crate::output::bytes;

#[derive(Serialize)]
pub struct Report {
    pub model: String,
    pub cpu: String,
    pub kernels: &'static str,
    pub activations: &'static str,
    pub threads: usize,
    /// The middle of all measurements, and the least and the most.
    pub read_gbps: f64,
    pub read_gbps_range: [f64; 2],
    pub weight_bytes: usize,
    /// Where the system tells.
    pub peak_bytes: Option<f64>,
    pub results: Vec<Result>,
    pub peer: Vec<PeerResult>,
}

#[derive(Serialize)]
pub struct Result {
    pub kv: String,
    pub depth: usize,
    pub decode_tok_s: f64,
    pub attend_ms: f64,
    pub fp16_floor_ms: f64,
    pub prefill_tok_s: Option<f64>,
    pub append_tok_s: f64,
    pub cache_bytes: usize,
    pub cache_gbps: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub batch: Vec<Batch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stages>,
}

/// Sequences that are decoded together, at this depth each.
#[derive(Serialize)]
pub struct Batch {
    pub sequences: usize,
    pub decode_tok_s: f64,
}

/// Where the time of a step goes.
#[derive(Serialize)]
pub struct Stages {
    pub step: &'static str,
    /// Parts of the whole, in the order of the pass.
    pub shares: Vec<(&'static str, f64)>,
}

#[derive(Serialize, serde::Deserialize)]
pub struct PeerResult {
    pub kv: String,
    pub depth: usize,
    pub decode_tok_s: f64,
    pub prefill_tok_s: Option<f64>,
    pub cache_bytes: usize,
}

impl Report {
    /// The fastest of the peer's caches at a depth.
    fn best_peer(&self, depth: usize, speed: impl Fn(&PeerResult) -> Option<f64>) -> Option<f64> {
        self.peer.iter().filter(|p| p.depth == depth).filter_map(speed).max_by(f64::total_cmp)
    }

    pub fn table(&self) -> String {
        let batches: Vec<usize> =
            self.results.first().map_or(vec![], |r| r.batch.iter().map(|b| b.sequences).collect());
        let against = |ours: Option<f64>, theirs: Option<f64>| match (ours, theirs) {
            (Some(a), Some(b)) => format!("{:.2}", a / b),
            _ => String::from("-"),
        };
        let number = |x: Option<f64>| x.map_or_else(|| String::from("-"), |x| format!("{x:.0}"));
        let mut head = vec![
            "cache",
            "depth",
            "decode tok/s",
            "attention ms",
            "fp16 floor ms",
            "to floor",
            "prefill tok/s",
            "append tok/s",
            "held",
        ];
        let together: Vec<String> = batches.iter().map(|n| format!("{n} at once, tok/s")).collect();
        head.extend(together.iter().map(String::as_str));
        if !self.peer.is_empty() {
            head.extend(["decode to peer's best", "prefill to peer's best"]);
        }
        let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
        for r in &self.results {
            let to_floor =
                if r.fp16_floor_ms > 0.0 { format!("{:.2}", r.attend_ms / r.fp16_floor_ms) } else { String::from("-") };
            let mut row = vec![
                r.kv.clone(),
                r.depth.to_string(),
                format!("{:.1}", r.decode_tok_s),
                format!("{:.2}", r.attend_ms),
                format!("{:.2}", r.fp16_floor_ms),
                to_floor,
                number(r.prefill_tok_s),
                format!("{:.0}", r.append_tok_s),
                bytes(r.cache_bytes as f64),
            ];
            row.extend(
                r.batch.iter().map(|b| format!("{:.1} ({:.2}x)", b.decode_tok_s, b.decode_tok_s / r.decode_tok_s)),
            );
            if !self.peer.is_empty() {
                row.push(against(Some(r.decode_tok_s), self.best_peer(r.depth, |p| Some(p.decode_tok_s))));
                row.push(against(r.prefill_tok_s, self.best_peer(r.depth, |p| p.prefill_tok_s)));
            }
            rows.push(row);
        }
        for p in &self.peer {
            let mut row = vec![format!("llama.cpp {}", p.kv), p.depth.to_string(), format!("{:.1}", p.decode_tok_s)];
            row.extend(["-"; 3].map(String::from));
            row.extend([number(p.prefill_tok_s), "-".into(), bytes(p.cache_bytes as f64)]);
            row.resize(rows[0].len(), String::new());
            rows.push(row);
        }
        let peak =
            self.peak_bytes.map_or_else(String::new, |b| format!("; process peak {}{}", bytes(b), self.above(b)));
        format!(
            "{}\n{}{}: {} on {} threads, {} kernels, {} activations; {:.1} GB/s read ({:.1} to {:.1}), weights {}{peak}\n",
            table(&rows),
            self.profile(),
            self.model,
            self.cpu,
            self.threads,
            self.kernels,
            self.activations,
            self.read_gbps,
            self.read_gbps_range[0],
            self.read_gbps_range[1],
            bytes(self.weight_bytes as f64),
        )
    }

    /// What the peak holds beside the weights: the cache's, where the process had no other.
    fn above(&self, peak: f64) -> String {
        match (&self.results[..], &self.peer[..]) {
            ([one], []) => {
                let above = peak - self.weight_bytes as f64;
                let cache = one.cache_bytes as f64;
                format!(", {} above the weights: the cache and {}", bytes(above), bytes((above - cache).max(0.0)))
            }
            _ => String::new(),
        }
    }

    /// A table of stages, where they were measured.
    fn profile(&self) -> String {
        let of = |r: &Result| r.stages.iter().map(|s| (r.kv.clone(), r.depth, s.step)).collect::<Vec<_>>();
        let columns: Vec<_> = self.results.iter().flat_map(of).collect();
        let stages: Vec<&Stages> = self.results.iter().flat_map(|r| &r.stages).collect();
        let Some(first) = stages.first() else { return String::new() };
        let mut rows = vec![vec![String::from("stage, % of the step")]];
        rows[0].extend(columns.iter().map(|(kv, depth, step)| format!("{kv} {step} at {depth}")));
        for (i, (name, _)) in first.shares.iter().enumerate() {
            let shares = stages.iter().map(|s| format!("{:.1}", 100.0 * s.shares[i].1));
            rows.push(std::iter::once((*name).to_string()).chain(shares).collect());
        }
        format!("{}\n", table(&rows))
    }
}
