//! `kvquant demo`: the same question on a long text, with an fp16 cache and with a 3-bit one.

use std::time::Instant;

use anyhow::Result;
use kvquant_cache::Prefill;
use kvquant_eval::{Candidate, EvalOptions, Format, evaluate, table};
use kvquant_model::generate::{Event, GenerateOptions, generate};
use kvquant_model::pull::KNOWN;
use kvquant_model::sampling::{Sampler, SamplingParams};
use kvquant_model::template::Message;
use kvquant_quant::Spec;

use crate::generate::{interrupted, to_stdout};
use crate::models;
use crate::output::{bytes, say};
use crate::progress::Progress;
use crate::quantizers;

/// A text of the project's own.
const TEXT: &str = include_str!("../assets/station.txt");
const QUESTION: &str = "What was the name of the keeper who counted the birds?";
const SPECS: [&str; 2] = ["fp16", "mix3+sink1"];

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant demo\n\nThe model is fetched if it is not there. The text and the question come with the program."
)]
pub struct Args {
    /// Print the comparison as JSON when done, instead of streaming
    #[arg(long)]
    json: bool,
}

struct Run {
    spec: Spec,
    answer: String,
    prompt_tokens: usize,
    prefill: f64,
    decode: f64,
    cache_bytes: usize,
    cache_tokens: usize,
    bits: f64,
}

pub fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    let loaded = models::load(KNOWN[0].name, None)?;
    let specs = SPECS.map(|s| s.parse::<Spec>());
    let specs: Vec<Spec> = specs.into_iter().collect::<Result<_, _>>()?;
    let quantizer = quantizers::find(None, &loaded.model, &specs.iter().collect::<Vec<_>>())?;
    let content = format!("{TEXT}\n\n{QUESTION}");
    let prompt = loaded.template()?.render(&[Message { role: "user".into(), content }], true)?;
    let ids = loaded.tokenizer.encode(&prompt, true)?;
    let say = |text: &str| if args.json { Ok(()) } else { to_stdout(text) };
    say(&format!("{}: a handbook of {} tokens, then: {QUESTION}\n", loaded.name, ids.len()))?;
    let interrupted = interrupted()?;
    let mut runs = Vec::new();
    for spec in &specs {
        say(&format!("\n{spec:14} "))?;
        let mut cache = loaded.model.new_cache(spec, quantizer.as_ref())?;
        let mut sampler = Sampler::new(SamplingParams::default())?;
        let mut progress = Progress::new();
        let mut failed = None;
        let options = GenerateOptions { max_tokens: 60, prefill: Prefill::Quantized, ..GenerateOptions::default() };
        let o = generate(&loaded.model, &loaded.tokenizer, &mut cache, &ids, &mut sampler, &options, &mut |event| {
            match event {
                Event::Prefill { done, total } if done == total => progress.clear(),
                Event::Prefill { done, total } => progress.update("reading the text", done as u64, total as u64),
                Event::Text(text) => failed = say(text).err(),
            }
            failed.is_none() && !interrupted.load(std::sync::atomic::Ordering::Relaxed)
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        say("\n")?;
        runs.push(Run {
            spec: spec.clone(),
            answer: o.text.trim().to_string(),
            prompt_tokens: o.prompt_tokens,
            prefill: o.prompt_tokens as f64 / o.prefill_seconds,
            decode: o.tokens.len().saturating_sub(1) as f64 / o.decode_seconds,
            cache_bytes: cache.bytes().total(),
            cache_tokens: cache.len(),
            bits: cache.bits_per_element(),
        });
    }
    let text = loaded.tokenizer.encode(TEXT, false)?;
    let options = EvalOptions {
        ctx: text.len().min(2048),
        windows: 1,
        first_window: 0,
        prefill: Prefill::Quantized,
        bos: loaded.bos(),
    };
    let candidates: Vec<_> = specs
        .iter()
        .map(|s| Candidate { name: s.to_string(), format: Format::Cache(s.clone()), quantizer: quantizer.as_ref() })
        .collect();
    let mut progress = Progress::new();
    let report =
        evaluate(&loaded.model, &loaded.name, &text, "the handbook", &candidates, &options, &mut |done, total| {
            progress.update("measuring quality", done as u64, total as u64);
        })?;
    progress.clear();
    if args.json {
        let all: Vec<_> = runs
            .iter()
            .zip(&report.results)
            .map(|(r, e)| {
                serde_json::json!({
                    "kv": r.spec.to_string(), "answer": r.answer, "prompt_tokens": r.prompt_tokens, "prefill_tok_s": r.prefill,
                    "decode_tok_s": r.decode, "cache_bytes": r.cache_bytes, "cache_bytes_per_token": r.cache_bytes as f64 / r.cache_tokens as f64,
                    "bits_per_element": r.bits, "ppl": e.ppl, "kld_mean": e.kld_mean, "top1_agreement": e.top1_agreement,
                })
            })
            .collect();
        say!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let mut rows = vec![
        [
            "",
            "prefill tok/s",
            "decode tok/s",
            "cache",
            "bytes/token",
            "bits/element",
            "perplexity",
            "mean KLD",
            "top-1",
        ]
        .map(String::from),
    ];
    rows.extend(runs.iter().zip(&report.results).map(|(r, e)| {
        [
            r.spec.to_string(),
            format!("{:.0}", r.prefill),
            format!("{:.1}", r.decode),
            bytes(r.cache_bytes as f64),
            format!("{:.0}", r.cache_bytes as f64 / r.cache_tokens as f64),
            format!("{:.2}", r.bits),
            format!("{:.3}", e.ppl),
            format!("{:.4}", e.kld_mean),
            format!("{:.1} %", 100.0 * e.top1_agreement),
        ]
    }));
    say!("\n{}", table(&rows));
    say!(
        "Perplexity and KL divergence on the first {} tokens of the text, against the fp16 cache; {:.0} s in all.",
        options.ctx,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
