//! `kvquant session`: prompt caches on disk.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Subcommand;
use kvquant_cache::{Prefill, SessionFile, SessionInfo, save_session};
use kvquant_model::generate::{Event, GenerateOptions, generate};
use kvquant_model::sampling::{Sampler, SamplingParams};
use kvquant_model::template::Message;
use kvquant_model::{Logits, Step, Workspace};
use kvquant_quant::Spec;
use kvquant_quant::pack::BLOCK_TOKENS;
use kvquant_server::sessions::{list, session_path};

use crate::failure::Input;
use crate::generate::to_stdout;
use crate::models::{self, Loaded};
use crate::output::{bytes, read_text, say};
use crate::progress::Progress;
use crate::{quantizers, serve};

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant session save smollm2-135m station -f handbook.txt --kv mix3+sink1\n  kvquant session load smollm2-135m station -p \"Who may open the outer door?\"\n  kvquant session list\n  kvquant session rm station\n\n`kvquant serve --session-dir DIR` uses the same files."
)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Read a text and store its cache
    Save(Save),
    /// Ask about a stored text, without reading it again
    Load(Load),
    /// Show what is stored
    List(List),
    /// Remove stored caches
    Rm(Rm),
}

#[derive(clap::Args)]
struct Folder {
    /// Folder of sessions [default: kvquant/sessions in the cache folder]
    #[arg(long, value_name = "DIR", env = "KVQUANT_SESSION_DIR")]
    dir: Option<PathBuf>,
}

#[derive(clap::Args)]
#[command(after_help = "Example:\n  kvquant session save smollm2-135m station -f handbook.txt --kv mix3+sink1")]
struct Save {
    /// Known model, GGUF file or Hugging Face folder
    model: String,
    /// Name to store it by; an older session of this name is replaced
    name: String,
    /// The text
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// How the cache is stored
    #[arg(long, value_name = "SPEC", default_value = "mix4+sink1")]
    kv: String,
    /// Quantizer file [default: the built-in one, if it fits the model]
    #[arg(long, value_name = "FILE")]
    quantizer: Option<PathBuf>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// No chat template: the text is stored as it is
    #[arg(long)]
    raw: bool,
    /// Prompt tokens of one pass; a server uses sessions of its own number only
    #[arg(long, value_name = "N", default_value_t = 128)]
    prefill_chunk: usize,
    #[command(flatten)]
    folder: Folder,
    /// Print figures as JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[command(after_help = "Example:\n  kvquant session load smollm2-135m station -p \"Who may open the outer door?\"")]
struct Load {
    /// The model that the session was saved with
    model: String,
    /// The session
    name: String,
    /// What follows the stored text
    #[arg(short, long, value_name = "TEXT")]
    prompt: String,
    /// Quantizer file that the session was saved with [default: the built-in one]
    #[arg(long, value_name = "FILE")]
    quantizer: Option<PathBuf>,
    /// 0: always the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    temperature: f32,
    /// The same seed gives the same answer
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New tokens at most
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    #[command(flatten)]
    folder: Folder,
    /// Print answer and figures as JSON when done, instead of streaming
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[command(after_help = "Example:\n  kvquant session list --json")]
struct List {
    #[command(flatten)]
    folder: Folder,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[command(after_help = "Example:\n  kvquant session rm station")]
struct Rm {
    /// The sessions
    #[arg(required = true)]
    names: Vec<String>,
    #[command(flatten)]
    folder: Folder,
}

impl Folder {
    fn path(&self) -> Result<PathBuf> {
        if let Some(dir) = &self.dir {
            return Ok(dir.clone());
        }
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let cache =
            || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME").or_else(|| set("USERPROFILE"))?.join(".cache")));
        let root = set("KVQUANT_HOME").or_else(|| Some(cache()?.join("kvquant")));
        let root = root.ok_or_else(|| Input("no folder for sessions: give --dir, or set KVQUANT_HOME".into()))?;
        Ok(root.join("sessions"))
    }

    /// The path of a session that is there.
    fn existing(&self, name: &str) -> Result<PathBuf> {
        let dir = self.path()?;
        let path = session_path(&dir, name).map_err(|e| Input(e.to_string()))?;
        if !path.is_file() {
            let names: Vec<String> = list(&dir).unwrap_or_default().into_iter().map(|(n, _)| n).collect();
            let there =
                if names.is_empty() { "there is none".into() } else { format!("there are: {}", names.join(", ")) };
            return Err(Input(format!("no session `{name}` in {}; {there}", dir.display())).into());
        }
        Ok(path)
    }
}

pub fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Save(a) => save(a),
        Action::Load(a) => load(a),
        Action::List(a) => show(a),
        Action::Rm(a) => remove(a),
    }
}

/// The text before and after what a user says.
fn around(loaded: &Loaded, system: Option<&str>) -> Result<(String, String)> {
    // Long and odd enough not to stand in a template.
    const MARK: &str = "\u{E000}kvquant-text\u{E001}";
    let mut messages: Vec<Message> =
        system.iter().map(|s| Message { role: "system".into(), content: s.to_string() }).collect();
    messages.push(Message { role: "user".into(), content: MARK.into() });
    let text = loaded.template()?.render(&messages, true)?;
    let (before, after) = text
        .split_once(MARK)
        .ok_or_else(|| Input("the model's chat template changes what a user says; use --raw".into()))?;
    Ok((before.into(), after.into()))
}

fn save(args: Save) -> Result<()> {
    let spec: Spec = args.kv.parse()?;
    if args.prefill_chunk == 0 || !args.prefill_chunk.is_multiple_of(BLOCK_TOKENS) {
        return Err(Input(format!("--prefill-chunk {} is not a multiple of {BLOCK_TOKENS}", args.prefill_chunk)).into());
    }
    let dir = args.folder.path()?;
    let path = session_path(&dir, &args.name).map_err(|e| Input(e.to_string()))?;
    let text = read_text(&args.file)?;
    let loaded = models::load(&args.model, None)?;
    let quantizer = quantizers::find(args.quantizer.as_deref(), &loaded.model, &[&spec])?;
    let mut cache = loaded.model.new_cache(&spec, quantizer.as_ref())?;
    let (before, after) = if args.raw { Default::default() } else { around(&loaded, args.system.as_deref())? };
    let mut ids = loaded.tokenizer.encode(&before, true)?;
    ids.extend(loaded.tokenizer.encode(&text, false)?);
    if let Some(bos) = loaded.bos().filter(|bos| ids.first() != Some(bos)) {
        ids.insert(0, bos);
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("{}: cannot make the folder", dir.display()))?;
    let start = std::time::Instant::now();
    let mut progress = Progress::new();
    // Passes end where those of a server end.
    let mut end = cache.segment_tokens(1);
    let mut work = Workspace::new();
    while cache.len() < ids.len() {
        end += args.prefill_chunk;
        let tokens = &ids[cache.len()..end.min(ids.len())];
        loaded.model.forward_in(
            &mut work,
            &mut [Step { tokens, cache: &mut cache, logits: Logits::None }],
            Prefill::Exact,
        )?;
        progress.update("reading the text", cache.len() as u64, ids.len() as u64);
    }
    progress.clear();
    let seconds = start.elapsed().as_secs_f64();
    let info = SessionInfo {
        identity: serve::identity(&loaded.model, &spec, quantizer.as_ref())?,
        model: loaded.name.clone(),
        prefill_chunk: args.prefill_chunk,
        after,
        tokens: ids.len(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
    };
    save_session(&path, &cache, &ids, &info)?;
    let size = std::fs::metadata(&path).map_or(0, |m| m.len());
    if args.json {
        let report = serde_json::json!({
            "name": args.name, "path": path, "tokens": ids.len(), "bytes": size, "kv": spec.to_string(),
            "prefill_seconds": seconds,
        });
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        say!("{}: {} tokens, {}, read in {seconds:.1} s: {}", args.name, ids.len(), bytes(size as f64), path.display());
    }
    Ok(())
}

fn load(args: Load) -> Result<()> {
    let file = SessionFile::open(&args.folder.existing(&args.name)?)?;
    let info = file.info().clone();
    let spec: Spec = info.identity.spec.parse()?;
    let sampler = SamplingParams { temperature: args.temperature, seed: args.seed, ..SamplingParams::default() };
    let mut sampler = Sampler::new(sampler)?;
    let loaded = models::load(&args.model, None)?;
    let quantizer = quantizers::find(args.quantizer.as_deref(), &loaded.model, &[&spec])?;
    let empty = loaded.model.new_cache(&spec, quantizer.as_ref())?;
    file.check(&serve::identity(&loaded.model, &spec, quantizer.as_ref())?)?;
    let start = std::time::Instant::now();
    let mut cache = file.cache(&empty)?;
    let restored = start.elapsed().as_secs_f64();
    let mut ids = loaded.tokenizer.encode(&format!("\n\n{}", args.prompt), false)?;
    ids.extend(loaded.tokenizer.encode(&info.after, true)?);
    let options = GenerateOptions { max_tokens: args.max_tokens, ..GenerateOptions::default() };
    let mut failed = None;
    let outcome = generate(&loaded.model, &loaded.tokenizer, &mut cache, &ids, &mut sampler, &options, &mut |event| {
        if let Event::Text(text) = event
            && !args.json
            && let Err(e) = to_stdout(text)
        {
            failed = Some(e);
        }
        failed.is_none()
    })?;
    if let Some(e) = failed {
        return Err(e);
    }
    let first = restored + outcome.prefill_seconds;
    if args.json {
        let report = serde_json::json!({
            "text": outcome.text, "tokens": outcome.tokens, "stop": outcome.stop, "stored_tokens": info.tokens,
            "restore_seconds": restored, "first_token_seconds": first, "kv": spec.to_string(),
        });
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        to_stdout("\n")?;
        let (stored, new) = (info.tokens, outcome.tokens.len());
        eprintln!("[{stored} tokens restored in {restored:.2} s, {new} new, first after {first:.2} s, {spec}]");
    }
    Ok(())
}

fn show(args: List) -> Result<()> {
    let dir = args.folder.path()?;
    let files =
        if dir.is_dir() { list(&dir).with_context(|| format!("{}: cannot read", dir.display()))? } else { vec![] };
    let opened: Vec<_> = files.iter().map(|(name, path)| (name, path, SessionFile::open(path))).collect();
    if args.json {
        let all: Vec<_> = opened
            .iter()
            .map(|(name, path, file)| match file {
                Ok(f) => serde_json::json!({
                    "name": name, "path": path, "tokens": f.info().tokens, "bytes": f.bytes(), "model": f.info().model,
                    "kv": f.info().identity.spec, "created": f.info().created,
                }),
                Err(e) => serde_json::json!({ "name": name, "path": path, "error": e.to_string() }),
            })
            .collect();
        say!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    if opened.is_empty() {
        say!("no sessions in {}", dir.display());
    }
    for (name, path, file) in &opened {
        match file {
            Ok(f) => {
                let (i, size) = (f.info(), bytes(f.bytes() as f64));
                say!("{name:24} {:>8} tokens {size:>10}  {}  {}", i.tokens, i.identity.spec, i.model);
            }
            Err(e) => say!("{name:24} {} ({e})", describe(path)),
        }
    }
    Ok(())
}

fn describe(path: &Path) -> String {
    format!("can't be used: {}", path.display())
}

fn remove(args: Rm) -> Result<()> {
    // All names are looked at before the first is removed.
    let paths: Vec<PathBuf> = args.names.iter().map(|n| args.folder.existing(n)).collect::<Result<_>>()?;
    for (name, path) in args.names.iter().zip(&paths) {
        std::fs::remove_file(path).with_context(|| format!("{}: cannot remove", path.display()))?;
        say!("removed {name}");
    }
    Ok(())
}
