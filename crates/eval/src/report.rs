//! The one report type; its JSON is a public contract.

use serde::{Deserialize, Serialize};

use crate::agreement::Generation;

/// What one cache did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalResult {
    /// The spec as given.
    pub kv: String,
    /// Whether it is another program's format, simulated; its bits come from a formula then.
    pub simulated: bool,
    /// All stored bits per key or value element, at the end of a window.
    pub bits_per_element: f64,
    /// Bits per element that an endless context would come to: full blocks alone, without sinks, the recent window and
    /// the open block. Null where windows are too short for a full block.
    pub bits_at_infinity: Option<f64>,
    /// Bytes of the fit that the cache uses, in a quantizer file; once a model, not counted in the bits.
    pub quantizer_bytes: usize,
    /// All stored bytes per token, at the end of a window.
    pub cache_bytes_per_token: f64,
    /// Perplexity.
    pub ppl: f64,
    /// Perplexity over that of the fp16 cache, less 1.
    pub ppl_delta: f64,
    /// Mean KL divergence from the fp16 cache, in nats.
    pub kld_mean: f64,
    /// Its 99.9 percentile.
    pub kld_p999: f64,
    /// Perplexity of the tokens in the late half of each window (places from `ctx / 2` on) alone: a recent window hides
    /// all there is to lose from the first queries of a window.
    pub late_ppl: f64,
    /// Likewise over that of the fp16 cache, less 1.
    pub late_ppl_delta: f64,
    /// Mean KL divergence where these tokens are predicted.
    pub late_kld_mean: f64,
    /// Share of positions whose most likely token is that of the fp16 cache.
    pub top1_agreement: f64,
}

/// Several caches on one text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// The text.
    pub text: String,
    /// Tokens of a window.
    pub ctx: usize,
    /// Windows.
    pub windows: usize,
    /// `quantized` or `exact`.
    pub prefill: String,
    /// One entry a cache.
    pub results: Vec<EvalResult>,
    /// Greedy continuations, where they were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
}

impl Report {
    /// A Markdown table that also reads well in a terminal.
    pub fn table(&self) -> String {
        let head = [
            "cache",
            "bits",
            "at ∞",
            "bytes/token",
            "fit",
            "perplexity",
            "change",
            "mean KLD",
            "late half",
            "99.9 % KLD",
            "top-1",
        ];
        let mut rows = vec![head.map(String::from)];
        rows.extend(self.results.iter().map(|r| {
            [
                r.kv.clone(),
                format!("{:.2}", r.bits_per_element),
                r.bits_at_infinity.map_or("-".into(), |bits| format!("{bits:.2}")),
                format!("{:.0}", r.cache_bytes_per_token),
                if r.quantizer_bytes == 0 { "-".into() } else { megabytes(r.quantizer_bytes) },
                format!("{:.3}", r.ppl),
                format!("{:+.2} %", 100.0 * r.ppl_delta),
                format!("{:.4}", r.kld_mean),
                format!("{:.4}", r.late_kld_mean),
                format!("{:.3}", r.kld_p999),
                format!("{:.1} %", 100.0 * r.top1_agreement),
            ]
        }));
        table(&rows)
    }
}

/// `1.25 MB`; the fits of a plain codebook are a few kilobytes.
fn megabytes(n: usize) -> String {
    format!("{:.2} MB", n as f64 / 1e6)
}

/// Rows of as many cells each, the first row the head; all but the first column are aligned to the right.
pub fn table<R: AsRef<[String]>>(rows: &[R]) -> String {
    let cell = |r: &R, c: usize| r.as_ref().get(c).map_or(0, |cell| cell.chars().count());
    let width = |c: usize| rows.iter().map(|r| cell(r, c)).max().unwrap_or(0).max(3);
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        for (c, cell) in row.as_ref().iter().enumerate() {
            let pad = " ".repeat(width(c) - cell.chars().count());
            out += &if c == 0 { format!("| {cell}{pad} ") } else { format!("| {pad}{cell} ") };
        }
        out += "|\n";
        if i == 0 {
            for c in 0..row.as_ref().len() {
                let line = "-".repeat(width(c));
                out += &if c == 0 { format!("| {line} ") } else { format!("| {}: ", &line[1..]) };
            }
            out += "|\n";
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agreement::Agreement;

    fn report() -> Report {
        let r = |kv: &str, bits, kld| EvalResult {
            kv: kv.into(),
            simulated: kv.starts_with("sim:"),
            bits_per_element: bits,
            bits_at_infinity: (bits < 16.0).then_some(bits - 0.1),
            quantizer_bytes: 100,
            cache_bytes_per_token: 1440.0 * bits,
            ppl: 20.0 + kld,
            ppl_delta: kld / 20.0,
            kld_mean: kld,
            kld_p999: 20.0 * kld,
            late_ppl: 19.0 + kld,
            late_ppl_delta: kld / 19.0,
            late_kld_mean: 1.1 * kld,
            top1_agreement: 1.0 - kld,
        };
        Report {
            model: "m".into(),
            text: "t".into(),
            ctx: 2048,
            windows: 2,
            prefill: "quantized".into(),
            results: vec![r("fp16", 16.0, 0.0), r("nuq3-1%+sink1", 3.4, 0.07)],
            generation: None,
        }
    }

    #[test]
    fn the_json_has_the_documented_fields() {
        let json = serde_json::to_value(report()).unwrap();
        let keys = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let mut want = ["model", "text", "ctx", "windows", "prefill", "results"].map(String::from);
        want.sort();
        let mut got = keys(&json);
        got.sort();
        assert_eq!(got, want);
        let mut want = [
            "kv",
            "simulated",
            "bits_per_element",
            "bits_at_infinity",
            "quantizer_bytes",
            "cache_bytes_per_token",
            "ppl",
            "ppl_delta",
            "kld_mean",
            "kld_p999",
            "late_ppl",
            "late_ppl_delta",
            "late_kld_mean",
            "top1_agreement",
        ]
        .map(String::from);
        want.sort();
        let mut got = keys(&json["results"][1]);
        got.sort();
        assert_eq!(got, want);
        let agreement = Agreement { kv: "fp16".into(), first_divergence: 9.0, equal_share: 1.0, similarity: 1.0 };
        let generation = Generation { prompts: 2, prompt_tokens: 8, tokens: 9, results: vec![agreement] };
        let json = serde_json::to_value(Report { generation: Some(generation), ..report() }).unwrap();
        let (mut all, mut of) = (keys(&json["generation"]), keys(&json["generation"]["results"][0]));
        all.sort();
        of.sort();
        assert_eq!(all.join(" "), "prompt_tokens prompts results tokens");
        assert_eq!(of.join(" "), "equal_share first_divergence kv similarity");
    }

    #[test]
    fn the_table_is_aligned() {
        let t = report().table();
        let lengths: Vec<usize> = t.lines().map(|l| l.chars().count()).collect();
        assert!(lengths.windows(2).all(|w| w[0] == w[1]), "{t}");
        assert!(t.contains("| nuq3-1%+sink1 |  3.40 | 3.30 |") && t.contains("93.0 %"), "{t}");
        assert!(t.contains("| 16.00 |    - |"), "{t}");
    }

    #[test]
    fn the_plot_is_an_svg_with_every_cache() {
        let svg = report().plot_svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("nuq3-1%+sink1"), "{svg}");
    }
}
