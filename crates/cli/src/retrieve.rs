//! `kvquant retrieve`: whether a fact is found again in a long prompt.

use std::path::{Path, PathBuf};

use anyhow::Result;
use kvquant_cache::Prefill;
use kvquant_eval::retrieval::{RetrievalOptions, RetrievalReport, Task, Text, retrieve};
use kvquant_quant::Spec;

use crate::eval::PrefillArg;
use crate::failure::Input;
use crate::models::{self, Loaded};
use crate::output::{read_text, say, write};
use crate::progress::Progress;
use crate::quantizers;

/// A text of the project's own, to hide facts in.
const FILLER: &str = include_str!("../assets/station.txt");

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant retrieve smollm2-135m --kv fp16,mix3+sink1 --lengths 512,1024 --trials 1\n  kvquant retrieve smollm2-135m --task multikey --json --plot heat.svg\n\nA five-digit number is hidden in filler text, and asked for behind it. `found` is the share of greedy answers that contain it; `loss` is the mean negative log-likelihood of its digits, in nats. Tokens of a prompt include the chat template and the question."
)]
pub struct Args {
    /// Known model, GGUF file or Hugging Face folder
    model: String,
    /// Caches, separated by commas
    #[arg(long, value_name = "SPECS", default_value = "fp16,mix4+sink1,mix3+sink1,mix2+sink1")]
    kv: String,
    /// passkey: one number; multikey: four under four names, one of which is asked for
    #[arg(long, value_enum, default_value = "passkey")]
    task: TaskArg,
    #[command(flatten)]
    cells: Cells,
    /// The same seed asks the same questions
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Text to hide facts in [default: a handbook that comes with the program]
    #[arg(long, value_name = "FILE")]
    filler: Option<PathBuf>,
    /// quantized: all that attention reads went through the cache; exact: chunks of 256 see themselves exactly
    #[arg(long, value_enum, default_value = "quantized")]
    prefill: PrefillArg,
    /// Quantizer file [default: the built-in one, if it fits the model]
    #[arg(long, value_name = "FILE")]
    quantizer: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Draw a heat map of length and depth for every cache
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Which questions are asked.
#[derive(clap::Args, Clone)]
pub struct Cells {
    /// Tokens of a prompt, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "512,1024,2048,4096")]
    pub lengths: Vec<usize>,
    /// Where the fact is, in percent of the text
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,25,50,75,100")]
    pub depths: Vec<usize>,
    /// Questions for each length and depth
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub trials: usize,
}

/// Task on the command line.
#[derive(clap::ValueEnum, Clone, Copy)]
pub enum TaskArg {
    Passkey,
    Multikey,
}

impl From<TaskArg> for Task {
    fn from(t: TaskArg) -> Self {
        match t {
            TaskArg::Passkey => Task::Passkey,
            TaskArg::Multikey => Task::Multikey,
        }
    }
}

/// Asks all questions of `cells` with all caches.
pub fn ask(
    loaded: &Loaded,
    filler: Option<&Path>,
    caches: &[(String, Spec)],
    quantizer: Option<&kvquant_quant::Quantizer>,
    task: Task,
    cells: &Cells,
    seed: u64,
    prefill: Prefill,
) -> Result<RetrievalReport> {
    let own = filler.map(read_text).transpose()?;
    let template = loaded.template()?;
    let text = Text {
        tokenizer: &loaded.tokenizer,
        template: &template,
        bos: loaded.bos(),
        filler: own.as_deref().unwrap_or(FILLER),
    };
    let caches: Vec<_> = caches.iter().map(|(name, spec)| (name.clone(), spec.clone(), quantizer)).collect();
    let (lengths, depths) = (cells.lengths.clone(), cells.depths.clone());
    let options = RetrievalOptions { task, lengths, depths, trials: cells.trials, seed, prefill };
    let mut progress = Progress::new();
    let report = retrieve(&loaded.model, &loaded.name, &text, &caches, &options, &mut |done, total| {
        progress.update("asking", done as u64, total as u64);
    })?;
    progress.clear();
    Ok(report)
}

pub fn run(args: Args) -> Result<()> {
    let kvs = models::specs(&args.kv)?;
    let longest = args.cells.lengths.iter().max().copied();
    if longest == Some(0) {
        return Err(Input("--lengths 0: a prompt needs tokens; for example --lengths 512,1024".into()).into());
    }
    let loaded = models::load(&args.model, longest)?;
    let specs: Vec<&Spec> = kvs.iter().map(|(_, s)| s).collect();
    let quantizer = quantizers::find(args.quantizer.as_deref(), &loaded.model, &specs)?;
    let (task, prefill) = (args.task.into(), args.prefill.into());
    let report = ask(&loaded, args.filler.as_deref(), &kvs, quantizer.as_ref(), task, &args.cells, args.seed, prefill)?;
    if let Some(path) = &args.plot {
        write(path, &report.plot_svg()?)?;
    }
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(())
}
