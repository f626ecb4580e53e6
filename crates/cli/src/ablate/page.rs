//! The report as a page.

use std::path::{Path, PathBuf};

use kvquant_eval::retrieval::Task;
use kvquant_eval::{Report, table};

use super::tables::TABLES;
use super::{Args, Findings, Named};
use crate::eval::file_name;
use crate::output::bytes;

/// Begins the part of a page that is written by hand.
const BY_HAND: &str = "\n<!-- By hand from here on: `kvquant ablate` keeps it. -->\n";

/// The part of a page that is written by hand.
pub fn by_hand(page: &str) -> &str {
    page.find(BY_HAND).map_or("", |at| &page[at..])
}

/// Where the heat map of a task lies, beside the page.
pub fn heat_map(page: &Path, task: Task) -> PathBuf {
    let stem = page.file_stem().unwrap_or_default().to_string_lossy();
    let task = match task {
        Task::Passkey => "passkey",
        Task::Multikey => "multikey",
    };
    page.with_file_name(format!("{stem}-{task}.svg"))
}

fn list(all: &[usize]) -> String {
    all.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// The options that make the report again, file names for paths.
fn options(args: &Args) -> String {
    let mut all = vec![format!("--on {}", file_name(&args.on))];
    all.push(match &args.quantizer {
        Some(path) => format!("--quantizer {} --ctx {}", file_name(path), args.source.ctx()),
        None => args.source.options(),
    });
    all.push(format!("--eval-windows {}", args.eval_windows));
    let files = |paths: &[PathBuf]| paths.iter().map(|p| file_name(p)).collect::<Vec<_>>().join(",");
    for (option, paths) in [("other", &args.other), ("compare", &args.compare)] {
        if !paths.is_empty() {
            all.push(format!("--{option} {}", files(paths)));
        }
    }
    if !args.contexts.is_empty() {
        all.push(format!("--contexts {}", list(&args.contexts)));
    }
    all.extend(args.late_text.as_ref().map(|path| format!("--late-text {}", file_name(path))));
    all.extend(args.only.as_ref().map(|only| format!("--only '{only}'")));
    let cells = &args.cells;
    all.push(format!("--lengths {} --depths {} --trials {}", list(&cells.lengths), list(&cells.depths), cells.trials));
    all.push(format!("--generate {}", args.generate));
    all.join(" ")
}

/// What a quantizer was made of.
fn made_of(named: &Named) -> String {
    let p = &named.quantizer.provenance;
    format!("{} ({} windows of {})", p.text, p.windows, p.ctx)
}

pub fn page(findings: &Findings, args: &Args, quantizer: Option<&Named>, compare: &[Named]) -> String {
    let all = &findings.all;
    let mut page = format!(
        "# Quality, part by part\n\nMade by `kvquant ablate {} {}`; do not edit above the last part.\n\n\
         {} windows of {} tokens, quantized prefill: all that attention reads went through the packed cache. No beginning-of-text\n\
         token is added; the first token of a window is not scored. Everything stored counts as bits, at the end of a window; `at ∞`\n\
         counts full blocks alone: what an endless context comes to. Perplexity, KL divergence (nats) and top-1 agreement are against\n\
         the same model with an fp16 cache; `late half` is the mean KL divergence in the second half of each window, `fit` what the\n\
         quantizer file holds for the cache, once a model.\n\
         Calibrated on: {}.\n",
        all.model,
        options(args),
        all.windows,
        all.ctx,
        quantizer.map_or("nothing".into(), made_of)
    );
    if let Some(path) = &args.output {
        page += &format!("\n![KL divergence against bits]({})\n", file_name(&path.with_extension("svg")));
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
    if let Some(shifted) = findings.shifted.as_ref().filter(|s| !s.results.is_empty()) {
        page += &format!(
            "\n## Another kind of text within a context\n\nThe late half of each window comes from {}; its column is what a cache makes of a text that neither\n\
             calibration nor the first half knew.\n\n{}",
            shifted.text,
            shifted.table()
        );
    }
    page += &compared(findings, quantizer, compare);
    for report in findings.contexts.iter().filter(|r| !r.results.is_empty()) {
        page += &format!(
            "\n## Windows of {} tokens\n\n{} of them, from the start of the same text.\n\n{}",
            report.ctx,
            report.windows,
            report.table()
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
    for (task, r) in &findings.retrieval {
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
        if let Some(path) = &args.output {
            page += &format!("\n![found by length and depth]({})\n", file_name(&heat_map(path, *task)));
        }
    }
    page
}

/// Mean KL divergences of every cache with every quantizer, a column a text.
fn compared(findings: &Findings, quantizer: Option<&Named>, compare: &[Named]) -> String {
    let mut texts: Vec<&str> = Vec::new();
    let mut rows: Vec<(&str, &str)> = Vec::new();
    for c in &findings.compared {
        if !texts.contains(&c.text.as_str()) {
            texts.push(&c.text);
        }
        for r in &c.report.results {
            if !rows.contains(&(&r.kv, &c.quantizer)) {
                rows.push((&r.kv, &c.quantizer));
            }
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    // Those of one cache together.
    let place = |kv: &str| rows.iter().position(|(other, _)| *other == kv);
    let mut sorted = rows.clone();
    sorted.sort_by_key(|(kv, _)| place(kv));
    let mut cells = vec![vec!["cache".to_string(), "quantizer".to_string()]];
    cells[0].extend(texts.iter().map(|t| t.to_string()));
    for (kv, of) in sorted {
        let kld = |text: &&str| {
            let on = findings.compared.iter().find(|c| c.quantizer == of && c.text == *text);
            let result = on.and_then(|c| c.report.results.iter().find(|r| r.kv == kv));
            result.map_or("-".into(), |r| format!("{:.4}", r.kld_mean))
        };
        cells.push([kv.to_string(), of.to_string()].into_iter().chain(texts.iter().map(kld)).collect());
    }
    let mut part =
        String::from("\n## Calibration text against test text\n\nMean KL divergence on each text. The quantizers:\n\n");
    for q in quantizer.into_iter().chain(compare) {
        let size: usize = q.quantizer.fits.iter().map(|f| f.file_bytes()).sum();
        part += &format!("- {}: {}; {} in all\n", q.name, made_of(q), bytes(size as f64));
    }
    part + "\n" + &table(&cells)
}
