//! The report: JSON and a table.

use kvquant_eval::table;
use serde::Serialize;

use crate::output::bytes;

#[derive(Serialize)]
pub struct Report {
    pub model: String,
    pub cpu: String,
    pub kernels: &'static str,
    pub threads: usize,
    pub read_gbps: f64,
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
            if !self.peer.is_empty() {
                row.push(against(Some(r.decode_tok_s), self.best_peer(r.depth, |p| Some(p.decode_tok_s))));
                row.push(against(r.prefill_tok_s, self.best_peer(r.depth, |p| p.prefill_tok_s)));
            }
            rows.push(row);
        }
        for p in &self.peer {
            let mut row = vec![format!("llama.cpp {}", p.kv), p.depth.to_string(), format!("{:.1}", p.decode_tok_s)];
            row.extend(["-"; 3].map(String::from));
            row.extend([number(p.prefill_tok_s), "-".into(), bytes(p.cache_bytes as f64), "".into(), "".into()]);
            rows.push(row);
        }
        let peak = self.peak_bytes.map_or_else(String::new, |b| format!("; process peak {}", bytes(b)));
        format!(
            "{}\n{}: {} on {} threads, {} kernels; {:.1} GB/s read, weights {}{peak}\n",
            table(&rows),
            self.model,
            self.cpu,
            self.threads,
            self.kernels,
            self.read_gbps,
            bytes(self.weight_bytes as f64),
        )
    }
}
