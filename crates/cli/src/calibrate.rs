//! `kvquant calibrate`

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use kvquant_calib::{Progress as Step, calibrate, sample_windows_from};
use kvquant_quant::{Quantizer, Spec};

use crate::failure::Input;
use crate::models::{self, Loaded};
use crate::output::{bytes, peak_memory, read_text, say};
use crate::progress::Progress;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant calibrate smollm2-135m --self -o smollm2.safetensors\n  kvquant calibrate model.gguf --text book.txt --kv mix3+sink1,nuq3-1%+sink1 -o model.safetensors"
)]
pub struct Args {
    /// Known model, GGUF file or Hugging Face folder
    model: String,
    #[command(flatten)]
    source: Source,
    /// Caches to fit, separated by commas; one run serves them all
    #[arg(
        long,
        value_name = "SPECS",
        default_value = "mix4+sink1,mix3+sink1,mix2+sink1,nuq4-1%+sink1,nuq3-1%+sink1,nuq2-1%+sink1"
    )]
    kv: String,
    /// The quantizer file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Where calibration text comes from.
#[derive(clap::Args, Clone)]
pub struct Source {
    /// Calibrate on this text; take one that is not used for measuring
    #[arg(long, value_name = "FILE", conflicts_with = "self_sampled")]
    text: Option<PathBuf>,
    /// Calibrate on text that the model itself samples (the default)
    #[arg(long = "self")]
    self_sampled: bool,
    /// Windows of text
    #[arg(long, value_name = "N", default_value_t = 16)]
    windows: usize,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 2048)]
    ctx: usize,
    /// Seed of the sampled text
    #[arg(long, value_name = "N", default_value_t = 7)]
    seed: u64,
}

impl Source {
    /// The options that say it, for reports.
    pub fn options(&self) -> String {
        let text = match &self.text {
            Some(path) => format!("--text {}", path.file_name().unwrap_or_default().to_string_lossy()),
            None => format!("--self --seed {}", self.seed),
        };
        format!("{text} --windows {} --ctx {}", self.windows, self.ctx)
    }

    /// Tokens of a window.
    pub fn ctx(&self) -> usize {
        self.ctx
    }
}

impl Source {
    /// What to call the text.
    pub fn name(&self) -> String {
        match &self.text {
            Some(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            None => format!("sampled by the model itself, seed {}", self.seed),
        }
    }

    /// Whether a quantizer comes from this text.
    pub fn made(&self, q: &Quantizer) -> bool {
        (&q.provenance.text, q.provenance.windows, q.provenance.ctx) == (&self.name(), self.windows, self.ctx)
    }

    /// Windows of token ids, and what to call their text.
    pub fn windows_of(&self, loaded: &Loaded) -> Result<(Vec<Vec<u32>>, String)> {
        if self.windows == 0 || self.ctx < 2 {
            return Err(Input("--windows must be at least 1 and --ctx at least 2".into()).into());
        }
        let Some(path) = &self.text else {
            let mut bar = Progress::new();
            let mut progress = |s: Step<'_>| bar.update(s.stage, s.done as u64, s.total as u64);
            let (n, ctx, seed) = (self.windows, self.ctx, self.seed);
            let windows = sample_windows_from(&loaded.model, loaded.bos(), n, ctx, seed, &mut progress)?;
            return Ok((windows, self.name()));
        };
        let ids = loaded.tokenizer.encode(&read_text(path)?, false)?;
        let need = self.windows * self.ctx;
        if ids.len() < need {
            let (got, n, ctx, text) = (ids.len(), self.windows, self.ctx, path.display());
            let problem = format!(
                "{text}: {got} tokens, and {n} windows of {ctx} need {need}; use a longer text, fewer --windows or a smaller --ctx"
            );
            return Err(Input(problem).into());
        }
        let mut windows: Vec<_> = ids.chunks_exact(self.ctx).take(self.windows).map(<[u32]>::to_vec).collect();
        if let Some(bos) = loaded.bos() {
            windows.iter_mut().for_each(|w| w[0] = bos);
        }
        Ok((windows, self.name()))
    }
}

/// Calibrates on what `source` says.
pub fn fit(loaded: &Loaded, source: &Source, specs: &[Spec]) -> Result<Quantizer> {
    let (windows, name) = source.windows_of(loaded)?;
    let mut bar = Progress::new();
    let mut progress = |s: Step<'_>| bar.update(s.stage, s.done as u64, s.total as u64);
    Ok(calibrate(&loaded.model, &windows, specs, &name, &mut progress)?)
}

pub fn run(args: Args) -> Result<()> {
    let specs: Vec<Spec> = models::specs(&args.kv)?.into_iter().map(|(_, s)| s).collect();
    if let Some(fixed) = specs.iter().find(|s| !s.needs_fit()) {
        return Err(Input(format!("{fixed} needs no calibration; leave it out of --kv")).into());
    }
    let start = Instant::now();
    let loaded = models::load(&args.model, Some(args.source.ctx))?;
    let quantizer = fit(&loaded, &args.source, &specs)?;
    quantizer.save(&args.output)?;
    let (seconds, peak) = (start.elapsed().as_secs_f64(), peak_memory());
    let size = std::fs::metadata(&args.output)?.len();
    if args.json {
        let report = serde_json::json!({
            "output": args.output, "bytes": size, "seconds": seconds, "peak_bytes": peak,
            "provenance": quantizer.provenance, "fits": quantizer.fits.iter().map(|f| f.spec.fit_key()).collect::<Vec<_>>(),
        });
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        let peak = peak.map_or("unknown".into(), bytes);
        say!(
            "{}: {}, {} fits, in {seconds:.0} s, {peak} of memory at most",
            args.output.display(),
            bytes(size as f64),
            quantizer.fits.len()
        );
    }
    Ok(())
}
