//! `kvquant ablate`: the paper's ablations on one text, as a Markdown report.

use std::path::PathBuf;

use anyhow::Result;
use kvquant_cache::Prefill;
use kvquant_eval::{Candidate, EvalOptions, Format, Report, evaluate};
use kvquant_quant::Spec;

use crate::calibrate::{Source, fit};
use crate::models;
use crate::output::{read_text, say, write};
use crate::progress::Progress;
use crate::quantizers;

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant ablate smollm2-135m --on book.txt --self -o docs/quality.md\n\nWithout --quantizer it calibrates first, on --text or on self-sampled text, once for all caches."
)]
pub struct Args {
    /// Known model, GGUF file or Hugging Face folder
    model: String,
    /// Text to measure on
    #[arg(long, value_name = "FILE")]
    on: PathBuf,
    /// Quantizer file with all the fits
    #[arg(long, value_name = "FILE")]
    quantizer: Option<PathBuf>,
    /// Keep the quantizer that was fitted
    #[arg(long, value_name = "FILE", conflicts_with = "quantizer")]
    save_quantizer: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// Windows of the text to measure on
    #[arg(long, value_name = "N", default_value_t = 2)]
    eval_windows: usize,
    /// The report to write; standard output without it
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the reports as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// A table: what it shows, and its caches.
const TABLES: [(&str, &[&str]); 10] = [
    ("Widths", &["fp16", "nuq4-1%+sink1", "nuq3-1%+sink1", "nuq2-1%+sink1"]),
    (
        "Scopes: keys per channel or token, values per token or channel",
        &["nuq3-1%+sink1", "nuq3-1%+sink1+ktoken", "nuq3-1%+sink1+vchannel"],
    ),
    ("Keys before or after RoPE", &["nuq3-1%+sink1", "nuq3-1%+sink1+postrope"]),
    ("Codebooks", &["nuq3-1%+sink1", "nf3-1%+sink1", "int3-1%+sink1", "int3+sink1"]),
    (
        "Mixed widths",
        &["nuq3-1%+sink1", "mix4+sink1", "mix3+sink1", "mix2.5+sink1", "mix2+sink1", "mix3+sink1+recent32"],
    ),
    ("Scales of 32 channels, as other programs have them", &["nuq4-1%+sink1", "int4-g32", "mix4+sink1"]),
    (
        "Other programs' formats, simulated",
        &[
            "mix4+sink1",
            "mix3+sink1",
            "sim:q8_0",
            "sim:q4_0",
            "sim:q4_0-rot",
            "sim:kivi4-g32",
            "sim:kivi2-g32",
            "sim:turbo4",
            "sim:turbo3",
        ],
    ),
    ("Outliers and sinks", &["nuq3-1%+sink1", "nuq3-1%", "nuq3+sink1", "nuq3", "nuq3-1%+sink1+recent32"]),
    (
        "Weights of the codebook fit, and Q-Norm",
        &["nuq3-1%+sink1", "nuq3-1%+sink1+wfisher", "nuq3-1%+sink1+wnone", "nuq2-1%+sink1", "nuq2-1%+sink1+qnorm"],
    ),
    ("Per-token groups, without calibration", &["int4-g32", "int4-g32+asym", "int3-g32", "nf4-g32"]),
];

pub fn run(args: Args) -> Result<()> {
    let text = read_text(&args.on)?;
    let loaded = models::load(&args.model, Some(args.source.ctx()))?;
    let mut names: Vec<&str> = Vec::new();
    for name in TABLES.iter().flat_map(|(_, specs)| specs.iter()) {
        if !names.contains(name) {
            names.push(name);
        }
    }
    let formats: Vec<Format> = names.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
    let specs: Vec<&Spec> = formats.iter().filter_map(Format::spec).collect();
    let quantizer = match &args.quantizer {
        Some(path) => quantizers::find(Some(path), &loaded.model, &specs)?,
        None => {
            let needed: Vec<Spec> =
                specs.iter().filter(|s| s.needs_fit() && s.recent() == 0).map(|s| (*s).clone()).collect();
            let q = fit(&loaded, &args.source, &needed)?;
            if let Some(path) = &args.save_quantizer {
                q.save(path)?;
            }
            Some(q)
        }
    };
    let ids = loaded.tokenizer.encode(&text, false)?;
    let candidates: Vec<_> = names
        .iter()
        .zip(&formats)
        .map(|(n, f)| Candidate { name: n.to_string(), format: f.clone(), quantizer: quantizer.as_ref() })
        .collect();
    let options = EvalOptions {
        ctx: args.source.ctx(),
        windows: args.eval_windows,
        first_window: 0,
        prefill: Prefill::Quantized,
        bos: loaded.bos(),
    };
    let name = args.on.file_name().unwrap_or_default().to_string_lossy();
    let mut progress = Progress::new();
    let report = evaluate(&loaded.model, &loaded.name, &ids, &name, &candidates, &options, &mut |done, total| {
        progress.update("evaluating", done as u64, total as u64);
    })?;
    progress.clear();
    let calibrated = quantizer.as_ref().map_or("nothing".into(), |q| {
        format!("{} ({} windows of {})", q.provenance.text, q.provenance.windows, q.provenance.ctx)
    });
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    }
    let page = page(&report, &calibrated, &args.source.options(), args.eval_windows);
    match &args.output {
        Some(path) => write(path, &page),
        None if !args.json => {
            print!("{page}");
            Ok(())
        }
        None => Ok(()),
    }
}

fn page(all: &Report, calibrated: &str, source: &str, windows: usize) -> String {
    let mut page = format!(
        "# Quality, part by part\n\nMade by `kvquant ablate {} --on {} {source} --eval-windows {windows}`; do not edit.\n\n\
         {} windows of {} tokens, quantized prefill: all that attention reads went through the packed cache. No beginning-of-text\n\
         token is added; the first token of a window is not scored. Everything stored counts as bits, at the end of a window.\n\
         Perplexity, KL divergence (nats) and top-1 agreement are against the same model with an fp16 cache.\n\
         Calibrated on: {calibrated}.\n",
        all.model, all.text, all.windows, all.ctx
    );
    for (title, names) in TABLES {
        let results = names.iter().filter_map(|n| all.results.iter().find(|r| r.kv == *n)).cloned().collect();
        let part = Report { results, ..all.clone() };
        page += &format!("\n## {title}\n\n{}", part.table());
    }
    page
}
