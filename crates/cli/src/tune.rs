//! `kvquant tune`

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use kvquant_calib::{Progress as Step, TuneOptions, tune};
use kvquant_eval::table;
use kvquant_quant::{FileError, Spec};

use crate::calibrate::Source;
use crate::failure::Input;
use crate::models;
use crate::output::say;
use crate::progress::Progress;
use crate::quantizers;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant tune smollm2-135m --kv mix2+sink1 -o tuned.safetensors\n  kvquant tune model.gguf --quantizer model.safetensors --text book.txt --kv mix3+sink1,nuq2-1%+sink1 -o tuned.safetensors\n\nEvery step runs one window exactly and through the quantizers, and moves signposts against the gradient of the KL divergence between both. The last windows are only measured on; of all measured states the best is kept, the fit as it was among them. Fits that are not named in --kv are copied."
)]
pub struct Args {
    /// Known model, GGUF file or Hugging Face folder
    model: String,
    /// Quantizer file to start from [default: the built-in one, if it fits the model]
    #[arg(long, value_name = "FILE")]
    quantizer: Option<PathBuf>,
    /// Caches to tune, separated by commas: mixB, nuq2..4
    #[arg(long, value_name = "SPECS", default_value = "mix2+sink1")]
    kv: String,
    #[command(flatten)]
    source: Source,
    /// Steps
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: usize,
    /// The first step's size, as a share of the distance between signposts; it falls to 0
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    rate: f32,
    /// Windows that are only measured on
    #[arg(long, value_name = "N", default_value_t = 4)]
    held_out: usize,
    /// Steps from one measurement to the next
    #[arg(long, value_name = "N", default_value_t = 50)]
    measure_every: usize,
    /// The quantizer file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let specs: Vec<Spec> = models::specs(&args.kv)?.into_iter().map(|(_, s)| s).collect();
    if !(args.rate.is_finite() && args.rate > 0.0) || args.steps == 0 {
        return Err(Input("--rate must be above 0 and --steps at least 1".into()).into());
    }
    let start = Instant::now();
    let loaded = models::load(&args.model, Some(args.source.ctx()))?;
    let quantizer = quantizers::find(args.quantizer.as_deref(), &loaded.model, &specs.iter().collect::<Vec<_>>())?;
    let Some(mut quantizer) = quantizer else {
        let spec = args.kv;
        return Err(FileError::NoFit { spec, available: "none: no quantizer fits this model".into() }.into());
    };
    let (windows, text) = args.source.windows_of(&loaded)?;
    let options =
        TuneOptions { steps: args.steps, rate: args.rate, held_out: args.held_out, measure_every: args.measure_every };
    let mut bar = Progress::new();
    let mut progress = |s: Step<'_>| bar.update(s.stage, s.done as u64, s.total as u64);
    let tuned = tune(&loaded.model, &windows, &mut quantizer, &specs, &options, &mut progress)?;
    bar.clear();
    let names: Vec<String> = tuned.iter().map(|t| t.spec.to_string()).collect();
    quantizer.provenance.text +=
        &format!("; {} tuned {} steps on {text}, windows of {}", names.join(", "), args.steps, args.source.ctx());
    quantizer.save(&args.output)?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let all: Vec<_> = tuned
            .iter()
            .map(|t| {
                serde_json::json!({
                    "kv": t.spec.to_string(), "kld_before": t.before, "kld_after": t.after, "best_step": t.best_step,
                })
            })
            .collect();
        let report = serde_json::json!({ "output": args.output, "seconds": seconds, "tuned": all });
        say!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let mut rows = vec![["cache", "KLD before", "after", "change", "best step"].map(String::from)];
    rows.extend(tuned.iter().map(|t| {
        [
            t.spec.to_string(),
            format!("{:.4}", t.before),
            format!("{:.4}", t.after),
            format!("{:+.1} %", 100.0 * (t.after / t.before - 1.0)),
            t.best_step.to_string(),
        ]
    }));
    say!("{}", table(&rows).trim_end());
    say!("{}: in {seconds:.0} s, KLD on {} windows that were not tuned on", args.output.display(), args.held_out);
    Ok(())
}
