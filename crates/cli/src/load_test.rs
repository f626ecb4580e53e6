//! `kvquant load-test`.

use std::time::Duration;

use anyhow::Result;
use kvquant_server::load::{LoadOptions, LoadReport, Memory, Percentiles, run as load};

use crate::failure::Input;
use crate::output::{bytes, say};

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant serve smollm2-135m --kv nuq3-1%+sink1 --kv-memory 100M &\n  kvquant load-test --clients 32 --seconds 300\n\nExits with 1 when a request failed that should not have, or memory grew by more than 5 %."
)]
pub struct Args {
    /// Host and port of the server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    address: String,
    /// The server's key
    #[arg(long, value_name = "KEY", env = "KVQUANT_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Clients at a time
    #[arg(long, value_name = "N", default_value_t = 32)]
    clients: usize,
    /// How long
    #[arg(long, value_name = "N", default_value_t = 300)]
    seconds: u64,
    /// Words of a long prompt
    #[arg(long, value_name = "N", default_value_t = 800)]
    long_words: usize,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Most growth of resident memory beside the caches, in percent.
const MOST_GROWTH: f64 = 5.0;

pub fn run(args: Args) -> Result<()> {
    if args.clients == 0 || args.clients > 1024 || args.seconds == 0 || args.seconds > 24 * 3600 {
        return Err(Input("--clients must be 1 to 1024, --seconds 1 to 86400".into()).into());
    }
    let address = args.address.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let options = LoadOptions {
        address,
        api_key: args.api_key,
        clients: args.clients,
        time: Duration::from_secs(args.seconds),
        long_words: args.long_words,
    };
    let report = load(options, &mut |stage| eprintln!("{stage} ..."))?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    let failed: usize = report.errors.values().sum();
    if failed > 0 || report.left_over > 0 || report.growth_percent > MOST_GROWTH {
        anyhow::bail!(
            "{failed} requests failed, {} are left over, memory grew by {:.1} %",
            report.left_over,
            report.growth_percent
        );
    }
    Ok(())
}

fn print(r: &LoadReport) {
    say!(
        "one stream {:.1} tokens/s, eight together {:.1} ({:.2} times)",
        r.one_stream,
        r.eight_streams,
        r.eight_streams / r.one_stream
    );
    say!(
        "{} answers, {} left in the middle, {} told to wait, {:.1} tokens/s",
        r.finished,
        r.left,
        r.busy,
        r.tokens_per_second
    );
    say!("{:32}   count     p50     p95", "");
    let row = |name: &str, p: Percentiles| say!("{name:32}  {:>6}  {:>6.2}  {:>6.2}", p.count, p.p50, p.p95);
    row("first token, short prompt (s)", r.first_token_short);
    row("first token, long prompt (s)", r.first_token_long);
    row("first token, common document (s)", r.first_token_shared);
    row("tokens/s of a stream", r.stream_rate);
    let memory = |m: Memory| format!("{} ({} in caches)", bytes(m.resident as f64), bytes(m.caches as f64));
    say!(
        "memory {} in the first quarter, {} in the last, medians: {:+.1} % beside the caches",
        memory(r.memory_first),
        memory(r.memory_last),
        r.growth_percent
    );
    for (error, n) in &r.errors {
        say!("{n} x {error}");
    }
}
