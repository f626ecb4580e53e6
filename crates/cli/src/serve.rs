//! `kvquant serve`.

use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use kvquant_cache::SessionIdentity;
use kvquant_quant::pack::BLOCK_TOKENS;
use kvquant_quant::{Quantizer, Spec};
use kvquant_server::{HttpOptions, Limits, Loaded, Served};
use sha2::{Digest, Sha256};
use tracing_subscriber::EnvFilter;

use crate::failure::Input;
use crate::models;
use crate::quantizers;

#[derive(clap::Args, Clone)]
#[command(
    after_help = "Example:\n  kvquant serve smollm2-135m --kv mix3+sink1 --kv-memory 2G\n  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"smollm2-135m\", \"messages\": [{\"role\": \"user\", \"content\": \"Name three rivers.\"}]}'\n\nA page to chat is at http://127.0.0.1:8080/. Every option can come from the environment: --kv-memory from KVQUANT_KV_MEMORY, and so on.\nSIGTERM or Ctrl-C: running answers get --grace-seconds to finish; a second one ends them at once."
)]
pub struct Args {
    /// Known model, GGUF file or Hugging Face folder
    #[arg(env = "KVQUANT_MODEL")]
    model: String,
    /// How caches are stored [default: mix4+sink1, or nuq4-1%+sink1+online where no quantizer fits the model]
    #[arg(long, value_name = "SPEC", env = "KVQUANT_KV")]
    kv: Option<String>,
    /// Quantizer file [default: the built-in one, if it fits the model]
    #[arg(long, value_name = "FILE", env = "KVQUANT_QUANTIZER")]
    quantizer: Option<PathBuf>,
    /// Address to listen at; others than loopback are reachable from outside: set a key then
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", env = "KVQUANT_HOST")]
    host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8080, env = "KVQUANT_PORT")]
    port: u16,
    /// Key that clients must send (Authorization: Bearer KEY); better in the environment than here
    #[arg(long, value_name = "KEY", env = "KVQUANT_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// The model's name to clients [default: as given, without its folder]
    #[arg(long, value_name = "NAME", env = "KVQUANT_NAME")]
    name: Option<String>,
    /// Memory of all caches together: a number with k, M, G (powers of 1000) or Ki, Mi, Gi
    #[arg(long, value_name = "SIZE", default_value = "2G", env = "KVQUANT_KV_MEMORY")]
    kv_memory: Size,
    /// Positions of a sequence [default: the model's context]
    #[arg(long, value_name = "N", env = "KVQUANT_CTX")]
    ctx: Option<usize>,
    /// New tokens of a chat answer whose request names no limit
    #[arg(long, value_name = "N", default_value_t = 2048, env = "KVQUANT_DEFAULT_MAX_TOKENS")]
    default_max_tokens: usize,
    /// Sequences that run at a time
    #[arg(long, value_name = "N", default_value_t = 32, env = "KVQUANT_MAX_SEQUENCES")]
    max_sequences: usize,
    /// Requests that wait at a time; more get status 429
    #[arg(long, value_name = "N", default_value_t = 256, env = "KVQUANT_MAX_QUEUE")]
    max_queue: usize,
    /// How long a request waits at most, before status 429
    #[arg(long, value_name = "N", default_value_t = 120, env = "KVQUANT_QUEUE_SECONDS")]
    queue_seconds: u64,
    /// Prompt tokens of one pass, a multiple of 64: less keeps other streams smoother, more reads prompts faster
    #[arg(long, value_name = "N", default_value_t = 128, env = "KVQUANT_PREFILL_CHUNK")]
    prefill_chunk: usize,
    /// Longest request
    #[arg(long, value_name = "SIZE", default_value = "4M", env = "KVQUANT_MAX_BODY")]
    max_body: Size,
    // Not a doc comment: rustdoc would have the address as a link.
    #[arg(help = "Origin whose pages may use the server, such as https://example.org; may be given several times")]
    #[arg(long = "cors-origin", value_name = "ORIGIN", env = "KVQUANT_CORS_ORIGIN", value_delimiter = ',')]
    cors_origins: Vec<String>,
    /// Folder of stored prefixes: those that fit are used, and clients may save more (/v1/sessions)
    #[arg(long, value_name = "DIR", env = "KVQUANT_SESSION_DIR")]
    session_dir: Option<PathBuf>,
    /// How long answers may go on after the signal to end
    #[arg(long, value_name = "N", default_value_t = 30, env = "KVQUANT_GRACE_SECONDS")]
    grace_seconds: u64,
    /// Logs as lines of text or of JSON, to stderr; RUST_LOG chooses what is logged
    #[arg(long, value_enum, default_value = "text", env = "KVQUANT_LOG_FORMAT")]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || format!("`{s}` is no size; for example 500M, 8G, 1.5G, 512Mi");
        let digits = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
        let number: f64 = s[..digits].parse().map_err(|_| wrong())?;
        let factor: f64 = match s[digits..].trim_end_matches('B') {
            "" => 1.0,
            "k" | "K" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            "Ki" => 1024.0,
            "Mi" => 1024f64.powi(2),
            "Gi" => 1024f64.powi(3),
            "Ti" => 1024f64.powi(4),
            _ => return Err(wrong()),
        };
        let bytes = number * factor;
        if (1.0..=1e15).contains(&bytes) { Ok(Size(bytes as usize)) } else { Err(wrong()) }
    }
}

/// What stands for a kind of cache: weights, spec, and the fit that the spec uses.
pub fn identity(model: &kvquant_model::Model, spec: &Spec, quantizer: Option<&Quantizer>) -> Result<SessionIdentity> {
    let fit = match quantizer {
        Some(q) if spec.needs_fit() => {
            let only = Quantizer { fits: vec![q.fit(spec)?.clone()], ..q.clone() };
            Sha256::digest(only.to_bytes()?).iter().map(|b| format!("{b:02x}")).collect()
        }
        _ => String::new(),
    };
    Ok(SessionIdentity { weights_sha256: model.weights_sha256(), quantizer_sha256: fit, spec: spec.to_string() })
}

fn load(args: &Args) -> Result<(Served, kvquant_model::ChatTemplate, Limits)> {
    let loaded = models::load(&args.model, args.ctx)?;
    let (spec, quantizer) = quantizers::choose(args.quantizer.as_deref(), &loaded.model, args.kv.as_deref(), false)?;
    let empty = loaded.model.new_cache(&spec, quantizer.as_ref())?;
    let identity = identity(&loaded.model, &spec, quantizer.as_ref())?;
    let template = loaded.template()?;
    let context = args.ctx.unwrap_or(usize::MAX).min(loaded.model.config.context);
    let least = empty.bytes_for(BLOCK_TOKENS);
    if args.kv_memory.0 < least {
        let says = format!("--kv-memory {} is less than the {least} bytes of one block", args.kv_memory.0);
        return Err(Input(says).into());
    }
    let limits = Limits {
        context,
        kv_memory: args.kv_memory.0,
        max_sequences: args.max_sequences,
        max_queue: args.max_queue,
        queue_time: Duration::from_secs(args.queue_seconds),
        prefill_chunk: args.prefill_chunk,
    };
    tracing::info!(
        model = args.model,
        kv = %spec,
        context,
        kv_memory = limits.kv_memory,
        bytes_for_context = empty.bytes_for(context),
        "model loaded"
    );
    let served = Served { model: Arc::new(loaded.model), tokenizer: Arc::new(loaded.tokenizer), empty, identity };
    Ok((served, template, limits))
}

fn start_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
}

fn check(args: &Args) -> Result<()> {
    let bad = |says: String| Err(Input(says).into());
    if args.prefill_chunk == 0 || !args.prefill_chunk.is_multiple_of(BLOCK_TOKENS) {
        return bad(format!("--prefill-chunk {} is not a multiple of {BLOCK_TOKENS}", args.prefill_chunk));
    }
    for (name, n) in [("--max-sequences", args.max_sequences), ("--default-max-tokens", args.default_max_tokens)] {
        if n == 0 {
            return bad(format!("{name} must be at least 1"));
        }
    }
    if args.api_key.as_ref().is_some_and(|k| k.trim().is_empty() || k.trim() != k) {
        return bad("--api-key is empty, or has white space around it".into());
    }
    // Refused before the model is loaded.
    if let Some(kv) = &args.kv {
        kv.parse::<Spec>()?;
    }
    Ok(())
}

pub fn run(args: Args) -> Result<()> {
    check(&args)?;
    start_logs(args.log_format);
    if !args.host.is_loopback() && args.api_key.is_none() {
        tracing::warn!(host = %args.host, "whoever reaches this address can use the server: set KVQUANT_API_KEY");
    }
    let name = std::path::Path::new(&args.model).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let options = HttpOptions {
        address: (args.host, args.port).into(),
        api_key: args.api_key.clone(),
        cors_origins: args.cors_origins.clone(),
        max_body: args.max_body.0,
        default_max_tokens: args.default_max_tokens,
        grace: Duration::from_secs(args.grace_seconds),
        model_name: args.name.clone().unwrap_or(name),
        session_dir: args.session_dir.clone(),
    };
    let ready = |address: std::net::SocketAddr| {
        tracing::info!(%address, "ready");
        let _ = writeln!(std::io::stdout(), "ready at http://{address}");
    };
    // The server hands on what it can print; how the program ends depends on the kind.
    let failed = Arc::new(Mutex::new(None));
    let keep = failed.clone();
    let load = move || -> Loaded {
        load(&args).map_err(|e| {
            let says = format!("{e:#}");
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
            says.into()
        })
    };
    kvquant_server::run(options, load, ready)
        .map_err(|e| failed.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("8G", 8_000_000_000), ("512Mi", 512 << 20), ("1.5k", 1500), ("77", 77), ("2GB", 2_000_000_000)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for wrong in ["", "G", "-1G", "1e99", "8 G", "1.2.3M", "0", "99999T", "NaN"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }
}
