//! `kvquant ablate`: the paper's ablations and all that goes beyond them on one text, as a Markdown report.

mod page;
mod parts;
mod tables;

use std::path::{Path, PathBuf};

use anyhow::Result;
use kvquant_cache::Prefill;
use kvquant_eval::retrieval::{RetrievalReport, Task};
use kvquant_eval::{Candidate, EvalOptions, EvalResult, Format, Report, agree, evaluate};
use kvquant_quant::{Quantizer, Spec};

use crate::calibrate::{Source, fit};
use crate::eval::{file_name, with_late_halves};
use crate::models::{self, Loaded};
use crate::output::{read_text, say, write};
use crate::progress::Progress;
use crate::quantizers;
use crate::retrieve::{Cells, ask};
use parts::{Parts, hash};

/// Caches that run side by side; each such group also runs an fp16 cache.
const GROUP: usize = 6;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant ablate smollm2-135m --on book.txt --self -o docs/quality.md --parts parts.json\n  kvquant ablate smollm2-135m --on book.txt --quantizer q.safetensors --only fp16,mix3+sink1,sim:q4_0 --lengths 512\n\nWithout --quantizer it calibrates first, on --text or on self-sampled text, once for all caches."
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
    /// Keep the quantizer that was fitted; one that is there already, of the same text and with all fits, is taken up
    #[arg(long, value_name = "FILE", conflicts_with = "quantizer")]
    save_quantizer: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// Windows of the text to measure on
    #[arg(long, value_name = "N", default_value_t = 2)]
    eval_windows: usize,
    /// Further texts, for the caches of one more table, separated by commas
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    other: Vec<PathBuf>,
    /// Further quantizers (calibrated on another text, tuned), for the same table
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    compare: Vec<PathBuf>,
    /// Tokens of longer windows, for one more table, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    contexts: Vec<usize>,
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
    /// Keep results in this file as they come, and take up those that it has
    #[arg(long, value_name = "FILE.json")]
    parts: Option<PathBuf>,
    /// The report to write, with plots of the same name (.svg) beside it; what its last part says by hand is kept.
    /// Standard output without it
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the report as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// A quantizer and what reports call it.
struct Named {
    name: String,
    hash: String,
    quantizer: Quantizer,
}

impl Named {
    fn new(name: String, quantizer: Quantizer) -> Result<Named> {
        let hash = hash(&quantizer.to_bytes()?);
        Ok(Named { name, hash, quantizer })
    }
}

/// A text and what reports call it.
struct Text {
    name: String,
    ids: Vec<u32>,
}

impl Text {
    fn new(path: &Path, loaded: &Loaded) -> Result<Text> {
        Ok(Text { name: file_name(path), ids: loaded.tokenizer.encode(&read_text(path)?, false)? })
    }

    fn hash(&self) -> String {
        hash(&self.ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>())
    }
}

/// Caches with one quantizer on one text.
struct Compared {
    quantizer: String,
    text: String,
    report: Report,
}

/// All that a page shows.
struct Findings {
    all: Report,
    shifted: Option<Report>,
    contexts: Vec<Report>,
    compared: Vec<Compared>,
    retrieval: Vec<(Task, RetrievalReport)>,
}

/// What measures and keeps.
struct Bench<'a> {
    loaded: &'a Loaded,
    parts: Parts,
}

impl Bench<'_> {
    /// Windows of a text through caches, some at a time.
    fn measure(
        &mut self,
        stage: &str,
        text: &Text,
        names: &[&str],
        quantizer: Option<&Named>,
        options: &EvalOptions,
    ) -> Result<Report> {
        let Bench { loaded, parts } = self;
        let of_text = (text.hash(), options.ctx, options.windows);
        let key = |name: &str| (loaded.name.clone(), of_text.clone(), name.to_string(), quantizer.map(|q| &q.hash));
        let mut missing = Vec::new();
        for name in names {
            if parts.get::<EvalResult>(&key(name))?.is_none() {
                missing.push(*name);
            }
        }
        for (i, group) in missing.chunks(GROUP).enumerate() {
            let candidates = candidates(group, quantizer)?;
            let mut bar = Progress::new();
            let stage = format!("{stage}, {} of {} caches done", i * GROUP, missing.len());
            let mut progress = |done, total| bar.update(&stage, done as u64, total as u64);
            let (model, ids) = (&loaded.model, &text.ids);
            let report = evaluate(model, &loaded.name, ids, &text.name, &candidates, options, &mut progress)?;
            bar.clear();
            for result in report.results {
                parts.put(&key(&result.kv), &result)?;
            }
            parts.keep()?;
        }
        let results = names.iter().map(|name| parts.get(&key(name)));
        let results = results.collect::<Result<Vec<Option<EvalResult>>>>()?.into_iter().flatten().collect();
        Ok(Report {
            model: loaded.name.clone(),
            text: text.name.clone(),
            ctx: options.ctx,
            windows: options.windows,
            prefill: "quantized".into(),
            results,
            generation: None,
        })
    }
}

fn candidates<'a>(names: &[&str], quantizer: Option<&'a Named>) -> Result<Vec<Candidate<'a>>> {
    let of = |name: &&str| -> Result<Candidate<'a>> {
        let format: Format = name.parse()?;
        Ok(Candidate { name: name.to_string(), format, quantizer: quantizer.map(|q| &q.quantizer) })
    };
    names.iter().map(of).collect()
}

/// Those of `some` that are in `names`.
fn chosen<'a>(some: &[&'a str], names: &[&str]) -> Vec<&'a str> {
    some.iter().copied().filter(|name| names.contains(name)).collect()
}

/// The main quantizer: a file's, or fitted here for `specs`.
fn main_quantizer(args: &Args, loaded: &Loaded, specs: &[&Spec]) -> Result<Option<Named>> {
    if let Some(path) = &args.quantizer {
        let found = quantizers::find(Some(path), &loaded.model, specs)?;
        return found.map(|q| Named::new(file_name(path), q)).transpose();
    }
    let own = |q| Named::new("calibrated for this page".into(), q);
    if let Some(path) = args.save_quantizer.as_ref().filter(|path| path.exists()) {
        let kept = quantizers::find(Some(path), &loaded.model, &[])?;
        let whole = |q: &Quantizer| specs.iter().all(|s| !s.needs_fit() || q.fit(s).is_ok());
        if let Some(q) = kept.filter(|q| args.source.made(q) && whole(q)) {
            return own(q).map(Some);
        }
    }
    let needed: Vec<Spec> = specs.iter().filter(|s| s.needs_fit()).map(|s| (*s).clone()).collect();
    if needed.is_empty() {
        return Ok(None);
    }
    let q = fit(loaded, &args.source, &needed)?;
    if let Some(path) = &args.save_quantizer {
        q.save(path)?;
    }
    own(q).map(Some)
}

pub fn run(args: Args) -> Result<()> {
    let names = tables::names(args.only.as_deref())?;
    let longest = args.cells.lengths.iter().chain(&args.contexts).copied().max().unwrap_or(0);
    let loaded = models::load(&args.model, Some(longest.max(args.source.ctx())))?;
    let formats: Vec<Format> = names.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
    let specs: Vec<&Spec> = formats.iter().filter_map(Format::spec).collect();
    let text = Text::new(&args.on, &loaded)?;
    let others = args.other.iter().map(|path| Text::new(path, &loaded)).collect::<Result<Vec<_>>>()?;
    let mut compare = Vec::new();
    for path in &args.compare {
        let found = quantizers::find(Some(path), &loaded.model, &[])?;
        compare.extend(found.map(|q| Named::new(file_name(path), q)).transpose()?);
    }
    let mut bench = Bench { loaded: &loaded, parts: Parts::open(args.parts.as_deref())? };
    let quantizer = main_quantizer(&args, &loaded, &specs)?;
    let quantizer = quantizer.as_ref();
    let (ctx, windows, bos) = (args.source.ctx(), args.eval_windows, loaded.bos());
    let options = EvalOptions { ctx, windows, first_window: 0, prefill: Prefill::Quantized, bos };

    let all = bench.measure("evaluating", &text, &names, quantizer, &options)?;
    let shifted = match &args.late_text {
        None => None,
        Some(late) => {
            let late = Text::new(late, &loaded)?;
            let ids = with_late_halves(&text.ids, &late.ids, ctx, windows)?;
            let both = Text { name: late.name, ids };
            let some = chosen(&tables::SHIFTED, &names);
            Some(bench.measure("two texts in a window", &both, &some, quantizer, &options)?)
        }
    };
    let mut compared = Vec::new();
    let some = chosen(&tables::COMPARED, &names);
    let is_own = |q: &Named| quantizer.is_some_and(|own| own.hash == q.hash);
    for of in quantizer.into_iter().chain(compare.iter().filter(|q| !is_own(q))) {
        let fits = |name: &&str| name.parse().is_ok_and(|spec: Spec| of.quantizer.fit(&spec).is_ok());
        let some: Vec<&str> = some.iter().copied().filter(fits).collect();
        for on in std::iter::once(&text).chain(&others) {
            if compare.is_empty() && others.is_empty() {
                break;
            }
            let report = bench.measure(&format!("{} on {}", of.name, on.name), on, &some, Some(of), &options)?;
            compared.push(Compared { quantizer: of.name.clone(), text: on.name.clone(), report });
        }
    }
    let mut contexts = Vec::new();
    for &ctx in &args.contexts {
        // About as many tokens as in the other tables.
        let windows = (windows * options.ctx / ctx.max(1)).max(1);
        let options = EvalOptions { ctx, windows, ..options.clone() };
        let some = chosen(&tables::LENGTHS, &names);
        contexts.push(bench.measure(&format!("windows of {ctx}"), &text, &some, quantizer, &options)?);
    }
    let long = chosen(&tables::LONG, &names);
    let ends = loaded.tokenizer.end_of_turn();
    let key = (&loaded.name, text.hash(), ctx, windows, args.generate, &long, quantizer.map(|q| &q.hash));
    let generation = bench.parts.part(&key, || {
        let candidates = candidates(&long, quantizer)?;
        let mut bar = Progress::new();
        let mut progress = |done, total| bar.update("continuing", done as u64, total as u64);
        let made = agree(&loaded.model, &text.ids, &candidates, &options, args.generate, ends, &mut progress)?;
        bar.clear();
        Ok(made)
    })?;
    let all = Report { generation: Some(generation), ..all };
    let mut retrieval = Vec::new();
    for task in [Task::Passkey, Task::Multikey] {
        let Cells { lengths, depths, trials } = &args.cells;
        let key = (&loaded.name, task, lengths, depths, trials, &long, quantizer.map(|q| &q.hash));
        let report = bench.parts.part(&key, || {
            let of = |name: &&str| Ok((name.to_string(), name.parse()?));
            let caches = long.iter().map(of).collect::<Result<Vec<_>>>()?;
            let quantizer = quantizer.map(|q| &q.quantizer);
            ask(&loaded, None, &caches, quantizer, task, &args.cells, 0, Prefill::Quantized)
        })?;
        retrieval.push((task, report));
    }
    let findings = Findings { all, shifted, contexts, compared, retrieval };
    if args.json {
        let reports: Vec<_> = findings.retrieval.iter().map(|(_, r)| r).collect();
        let compared = findings.compared.iter();
        let compared: Vec<_> =
            compared.map(|c| serde_json::json!({ "quantizer": c.quantizer, "quality": c.report })).collect();
        let json = serde_json::json!({
            "quality": findings.all, "shifted": findings.shifted, "contexts": findings.contexts, "compared": compared,
            "retrieval": reports,
        });
        say!("{}", serde_json::to_string_pretty(&json)?);
    }
    let page = page::page(&findings, &args, quantizer, &compare);
    let Some(path) = &args.output else {
        if !args.json {
            print!("{page}");
        }
        return Ok(());
    };
    write(&path.with_extension("svg"), &findings.all.plot_svg()?)?;
    for (task, report) in &findings.retrieval {
        write(&page::heat_map(path, *task), &report.plot_svg()?)?;
    }
    let before = if path.exists() { read_text(path)? } else { String::new() };
    write(path, &(page + page::by_hand(&before)))
}
