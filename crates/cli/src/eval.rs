//! `kvquant eval`

use std::path::{Path, PathBuf};

use anyhow::Result;
use kvquant_cache::Prefill;
use kvquant_eval::{Candidate, EvalError, EvalOptions, agree_on, evaluate_on};
use kvquant_quant::Spec;

use crate::device;
use crate::failure::Input;
use crate::models;
use crate::output::{read_text, say, write};
use crate::progress::Progress;
use crate::quantizers;

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant eval smollm2-135m --text book.txt --kv fp16,mix4+sink1,mix3+sink1 --windows 2 --plot quality.svg\n  kvquant eval smollm2-135m --text book.txt --kv mix3+sink1 --generate 256\n\nThe text is cut into windows from its start, the first token of a window is not scored. For models that expect a beginning-of-text token, it takes the place of the first.\nBits count everything that the cache stores, at the end of a window; `at ∞` is what they come to in an endless context: full blocks alone, without first and recent tokens in fp16. `fit` is what the quantizer file holds for the cache, once a model. `late half` is the mean KL divergence of the tokens in the second half of each window.\nWith --generate: `equal tokens` come before the first that differs from fp16's; `similarity` is twice the longest common subsequence over the tokens of both."
)]
pub struct Args {
    /// Known model, GGUF file or Hugging Face folder
    model: String,
    /// Text to measure on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Take the late half of each window from this text: how caches bear another kind of text within a context
    #[arg(long, value_name = "FILE")]
    late_text: Option<PathBuf>,
    /// Caches, separated by commas; also sim:q8_0, sim:q4_0, sim:q4_0-rot, sim:kivi4-g32, sim:kivi2-g32, sim:turbo4 and
    /// sim:turbo3, other programs' formats, simulated
    #[arg(
        long,
        value_name = "SPECS",
        default_value = "fp16,mix4+sink1,mix3+sink1,nuq4-1%+sink1,nuq3-1%+sink1,nuq2-1%+sink1"
    )]
    kv: String,
    /// Windows of the text
    #[arg(long, value_name = "N", default_value_t = 2)]
    windows: usize,
    /// The first window, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    first_window: usize,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 2048)]
    ctx: usize,
    /// quantized: all that attention reads went through the cache; exact: chunks of 512 see themselves exactly
    #[arg(long, value_enum, default_value = "quantized")]
    prefill: PrefillArg,
    /// Quantizer file [default: the built-in one, if it fits the model]
    #[arg(long, value_name = "FILE")]
    quantizer: Option<PathBuf>,
    /// Also continue the first half of each window by up to N greedy tokens and compare them with fp16's
    #[arg(long, value_name = "N")]
    generate: Option<usize>,
    #[command(flatten)]
    on: device::Choice,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Draw KL divergence against bits
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Prefill on the command line.
#[derive(clap::ValueEnum, Clone, Copy)]
pub enum PrefillArg {
    Quantized,
    Exact,
}

impl From<PrefillArg> for Prefill {
    fn from(p: PrefillArg) -> Self {
        match p {
            PrefillArg::Quantized => Prefill::Quantized,
            PrefillArg::Exact => Prefill::Exact,
        }
    }
}

/// Windows whose late halves come from another text, each text from its beginning on.
pub fn with_late_halves(early: &[u32], late: &[u32], ctx: usize, windows: usize) -> Result<Vec<u32>> {
    let (first, second) = (ctx / 2, ctx - ctx / 2);
    let have = (early.len() / first.max(1)).min(late.len() / second.max(1));
    if have < windows {
        let problem = format!(
            "the texts have {} and {} tokens, enough for the halves of {have} windows of {ctx}, and {windows} are asked for; use longer texts, fewer windows or a smaller --ctx",
            early.len(),
            late.len()
        );
        return Err(Input(problem).into());
    }
    let halves = early.chunks_exact(first.max(1)).zip(late.chunks_exact(second.max(1)));
    Ok(halves.take(windows).flat_map(|(a, b)| a.iter().chain(b)).copied().collect())
}

pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub fn run(args: Args) -> Result<()> {
    let kvs = models::formats(&args.kv)?;
    let text = read_text(&args.text)?;
    let loaded = models::load(&args.model, Some(args.ctx))?;
    let specs: Vec<&Spec> = kvs.iter().filter_map(|(_, f)| f.spec()).collect();
    let quantizer = quantizers::find(args.quantizer.as_deref(), &loaded.model, &specs)?;
    let gpu = match (kvs.iter().find(|(_, f)| f.spec().is_none()), args.on.device) {
        (Some((name, _)), device::On::Cuda(_)) => {
            return Err(EvalError::Simulated { name: name.clone(), problem: device::CPU_ONLY }.into());
        }
        (Some((name, _)), device::On::Auto) => {
            eprintln!("computing on the CPU: {name}, which is simulated, {}", device::CPU_ONLY);
            None
        }
        _ => args.on.place(&loaded.model, &specs)?,
    };
    let engine = device::engine(&gpu, &loaded.model);
    let mut ids = loaded.tokenizer.encode(&text, false)?;
    let mut name = file_name(&args.text);
    if let Some(late) = &args.late_text {
        let late_ids = loaded.tokenizer.encode(&read_text(late)?, false)?;
        ids = with_late_halves(&ids, &late_ids, args.ctx, args.first_window + args.windows)?;
        name = format!("{name}, late halves {}", file_name(late));
    }
    let candidates: Vec<_> =
        kvs.into_iter().map(|(name, format)| Candidate { name, format, quantizer: quantizer.as_ref() }).collect();
    let options = EvalOptions {
        ctx: args.ctx,
        windows: args.windows,
        first_window: args.first_window,
        prefill: args.prefill.into(),
        bos: loaded.bos(),
    };
    let mut progress = Progress::new();
    let (model, title) = (&loaded.model, &loaded.name);
    let mut report = evaluate_on(engine, model, title, &ids, &name, &candidates, &options, &mut |done, total| {
        progress.update("evaluating", done as u64, total as u64);
    })?;
    if let Some(tokens) = args.generate {
        let ends = loaded.tokenizer.end_of_turn();
        let generation = agree_on(engine, model, &ids, &candidates, &options, tokens, ends, &mut |done, total| {
            progress.update("continuing", done as u64, total as u64);
        })?;
        report.generation = Some(generation);
    }
    progress.clear();
    if let Some(path) = &args.plot {
        write(path, &report.plot_svg()?)?;
    }
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
        if let Some(g) = &report.generation {
            say!("\n{} greedy continuations of {} tokens by up to {}:\n", g.prompts, g.prompt_tokens, g.tokens);
            print!("{}", g.table());
        }
        if report.results.iter().any(|r| r.simulated) {
            say!("sim: other programs' formats, simulated in an fp16 cache; bits by formula (docs/specs.md)");
        }
    }
    Ok(())
}
