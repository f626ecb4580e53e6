//! `kvquant ablate`: the paper's ablations on one text, as a Markdown report.

use std::path::{Path, PathBuf};

use anyhow::Result;
use kvquant_cache::Prefill;
use kvquant_eval::retrieval::{RetrievalReport, Task};
use kvquant_eval::{Candidate, EvalOptions, Format, Report, agree, evaluate};
use kvquant_quant::{Quantizer, Spec};

use crate::calibrate::{Source, fit};
use crate::eval::{file_name, with_late_halves};
use crate::failure::Input;
use crate::models;
use crate::output::{read_text, say, write};
use crate::progress::Progress;
use crate::quantizers;
use crate::retrieve::{Cells, ask};

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant ablate smollm2-135m --on book.txt --self -o docs/quality.md\n  kvquant ablate smollm2-135m --on book.txt --quantizer q.safetensors --only fp16,mix3+sink1,sim:q4_0 --lengths 512\n\nWithout --quantizer it calibrates first, on --text or on self-sampled text, once for all caches."
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
    /// A text of another kind, for the late halves of windows of one more table
    #[arg(long, value_name = "FILE")]
    late_text: Option<PathBuf>,
    /// Measure these caches of the tables only, separated by commas
    #[arg(long, value_name = "SPECS")]
    only: Option<String>,
    #[command(flatten)]
    cells: Cells,
    /// Tokens of the greedy continuations
    #[arg(long, value_name = "N", default_value_t = 256)]
    generate: usize,
    /// The report to write, with a plot of the same name (.svg) beside it; standard output without it
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the report as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// A table: what it shows, and its caches.
const TABLES: [(&str, &[&str]); 11] = [
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
    (
        "Without a quantizer file",
        &[
            "nuq4-1%+sink1+recent1",
            "nuq4-1%+sink1+online",
            "nuq3-1%+sink1+recent1",
            "nuq3-1%+sink1+online",
            "nuq2-1%+sink1+recent1",
            "nuq2-1%+sink1+online",
        ],
    ),
    ("Per-token groups, without calibration", &["int4-g32", "int4-g32+asym", "int3-g32", "nf4-g32"]),
];

/// Caches that read two texts in one context.
const SHIFTED: [&str; 5] =
    ["mix4+sink1", "mix3+sink1", "nuq3-1%+sink1+recent1", "nuq3-1%+sink1+online", "nuq2-1%+sink1+online"];

/// Caches that are asked for hidden numbers and that continue texts.
const LONG: [&str; 5] = ["fp16", "mix4+sink1", "mix3+sink1", "mix2+sink1", "nuq3-1%+sink1"];

/// Names of all tables, each once, that `only` lets through.
fn names(only: Option<&str>) -> Result<Vec<&'static str>> {
    let mut all: Vec<&str> = Vec::new();
    for name in TABLES.iter().flat_map(|(_, specs)| specs.iter()) {
        if !all.contains(name) {
            all.push(name);
        }
    }
    let Some(only) = only else { return Ok(all) };
    let asked: Vec<&str> = only.split(',').map(str::trim).collect();
    if let Some(other) = asked.iter().find(|a| !all.contains(a)) {
        return Err(Input(format!("--only {other}: no table has this cache; there are {}", all.join(", "))).into());
    }
    Ok(all.into_iter().filter(|name| asked.contains(name)).collect())
}

pub fn run(args: Args) -> Result<()> {
    let names = names(args.only.as_deref())?;
    let text = read_text(&args.on)?;
    let longest = args.cells.lengths.iter().copied().max().unwrap_or(0);
    let loaded = models::load(&args.model, Some(longest.max(args.source.ctx())))?;
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
        .zip(formats)
        .map(|(n, format)| Candidate { name: n.to_string(), format, quantizer: quantizer.as_ref() })
        .collect();
    let options = EvalOptions {
        ctx: args.source.ctx(),
        windows: args.eval_windows,
        first_window: 0,
        prefill: Prefill::Quantized,
        bos: loaded.bos(),
    };
    let name = file_name(&args.on);
    let mut progress = Progress::new();
    let mut report = evaluate(&loaded.model, &loaded.name, &ids, &name, &candidates, &options, &mut |done, total| {
        progress.update("evaluating", done as u64, total as u64);
    })?;
    let shifted = match &args.late_text {
        None => None,
        Some(late) => {
            let late_ids = loaded.tokenizer.encode(&read_text(late)?, false)?;
            let ids = with_late_halves(&ids, &late_ids, options.ctx, options.windows)?;
            let some: Vec<_> = candidates.iter().filter(|c| SHIFTED.contains(&c.name.as_str())).cloned().collect();
            let name = file_name(late);
            Some(evaluate(&loaded.model, &loaded.name, &ids, &name, &some, &options, &mut |done, total| {
                progress.update("evaluating two texts", done as u64, total as u64);
            })?)
        }
    };
    let long: Vec<_> = candidates.iter().filter(|c| LONG.contains(&c.name.as_str())).cloned().collect();
    let ends = loaded.tokenizer.end_of_turn();
    let generation = agree(&loaded.model, &ids, &long, &options, args.generate, ends, &mut |done, total| {
        progress.update("continuing", done as u64, total as u64);
    })?;
    report.generation = Some(generation);
    progress.clear();
    let asked: Vec<_> = long.iter().filter_map(|c| Some((c.name.clone(), c.format.spec()?.clone()))).collect();
    let both = [Task::Passkey, Task::Multikey].map(|task| {
        ask(&loaded, None, &asked, quantizer.as_ref(), task, &args.cells, 0, Prefill::Quantized).map(|r| (task, r))
    });
    let retrieval: Vec<(Task, RetrievalReport)> = both.into_iter().collect::<Result<_>>()?;
    if args.json {
        let reports: Vec<_> = retrieval.iter().map(|(_, r)| r).collect();
        say!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({ "quality": report, "shifted": shifted, "retrieval": reports })
            )?
        );
    }
    let plot = args.output.as_ref().map(|path| path.with_extension("svg"));
    if let Some(path) = &plot {
        write(path, &report.plot_svg()?)?;
    }
    let page = page(&report, shifted.as_ref(), &retrieval, &args, quantizer.as_ref(), plot.as_deref());
    match &args.output {
        Some(path) => write(path, &page),
        None if !args.json => {
            print!("{page}");
            Ok(())
        }
        None => Ok(()),
    }
}

/// The options that make the report again, file names for paths.
fn options(args: &Args) -> String {
    let list = |all: &[usize]| all.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let source = match &args.quantizer {
        Some(path) => format!("--quantizer {} --ctx {}", file_name(path), args.source.ctx()),
        None => args.source.options(),
    };
    let late = args.late_text.as_ref().map_or(String::new(), |path| format!(" --late-text {}", file_name(path)));
    let only = args.only.as_ref().map_or(String::new(), |only| format!(" --only '{only}'"));
    format!(
        "--on {} {source} --eval-windows {}{late}{only} --lengths {} --depths {} --trials {} --generate {}",
        file_name(&args.on),
        args.eval_windows,
        list(&args.cells.lengths),
        list(&args.cells.depths),
        args.cells.trials,
        args.generate
    )
}

fn page(
    all: &Report,
    shifted: Option<&Report>,
    retrieval: &[(Task, RetrievalReport)],
    args: &Args,
    quantizer: Option<&Quantizer>,
    plot: Option<&Path>,
) -> String {
    let calibrated = quantizer.map_or("nothing".into(), |q| {
        format!("{} ({} windows of {})", q.provenance.text, q.provenance.windows, q.provenance.ctx)
    });
    let mut page = format!(
        "# Quality, part by part\n\nMade by `kvquant ablate {} {}`; do not edit.\n\n\
         {} windows of {} tokens, quantized prefill: all that attention reads went through the packed cache. No beginning-of-text\n\
         token is added; the first token of a window is not scored. Everything stored counts as bits, at the end of a window; `at ∞`\n\
         counts full blocks alone: what an endless context comes to. Perplexity, KL divergence (nats) and top-1 agreement are against\n\
         the same model with an fp16 cache; `late half` is the mean KL divergence in the second half of each window.\n\
         Calibrated on: {calibrated}.\n",
        all.model,
        options(args),
        all.windows,
        all.ctx
    );
    if let Some(name) = plot.and_then(Path::file_name) {
        page += &format!("\n![KL divergence against bits]({})\n", name.to_string_lossy());
    }
    for (title, names) in TABLES {
        let of = |n: &&str| all.results.iter().find(|r| r.kv == *n);
        let results: Vec<_> = names.iter().filter_map(of).cloned().collect();
        if results.is_empty() {
            continue;
        }
        let simulated = results.iter().any(|r| r.simulated);
        let part = Report { results, ..all.clone() };
        page += &format!("\n## {title}\n\n");
        if simulated {
            page += "`sim`: what the format gives back takes the place of keys and values in an fp16 cache; bits by formula, simplifications in\n[specs.md](specs.md).\n\n";
        }
        page += &part.table();
    }
    if let Some(shifted) = shifted.filter(|s| !s.results.is_empty()) {
        page += &format!(
            "\n## Another kind of text within a context\n\nThe late half of each window comes from {}; its column is what a cache makes of a text that neither\n\
             calibration nor the first half knew.\n\n{}",
            shifted.text,
            shifted.table()
        );
    }
    if let Some(g) = &all.generation {
        page += &format!(
            "\n## Greedy continuations\n\n{} prompts of {} tokens (first halves of the windows), continued by up to {} tokens, against fp16: tokens before\n\
             the first that differs, their share, and twice the longest common subsequence over the tokens of both.\n\n{}",
            g.prompts,
            g.prompt_tokens,
            g.tokens,
            g.table()
        );
    }
    for (task, r) in retrieval {
        let what = match task {
            Task::Passkey => "one number",
            Task::Multikey => "one of four numbers, by its name",
        };
        page += &format!(
            "\n## Retrieval: {what}\n\nA number is hidden in filler text, at {} depths, {} questions each, and asked for behind it: share of greedy answers that\n\
             contain it, and mean loss of its tokens (nats), by tokens of the prompt.\n\n{}",
            args.cells.depths.len(),
            r.trials,
            r.table()
        );
    }
    page
}
