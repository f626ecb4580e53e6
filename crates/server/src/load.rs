//! A load test against a running server, over loopback or any network.
//!
//! First one stream alone and eight together, for the gain of sharing the weight reads. Then clients that ask short and
//! long questions, some about one common document, some that go away in the middle; bounded in time. Resident memory is
//! compared while the server is idle, after a first part that warms its store of prefixes, and at the end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// What to do to the server.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Host and port.
    pub address: String,
    /// The server's key.
    pub api_key: Option<String>,
    /// Clients at a time.
    pub clients: usize,
    /// How long.
    pub time: Duration,
    /// Words of a long prompt.
    pub long_words: usize,
}

/// The test can't be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No server there.
    #[error("cannot connect to {address}: {source}; start one with `kvquant serve`")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// HTTP failed.
    #[error("http: {0}")]
    Http(#[from] hyper::Error),
    /// A request can't be made.
    #[error("request: {0}")]
    Request(#[from] hyper::http::Error),
    /// The server says something else than expected.
    #[error("{path} answered {status}: {body}")]
    Answer {
        /// What was asked for.
        path: String,
        /// Its status.
        status: u16,
        /// What it said.
        body: String,
    },
}

/// Times in seconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Percentiles {
    /// How many.
    pub count: usize,
    /// The median.
    pub p50: f64,
    /// 95 of 100 are below.
    pub p95: f64,
}

/// Bytes of the server's memory, read every second: medians, since requests that come and go move them by several percent.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Memory {
    /// Resident.
    pub resident: u64,
    /// Of caches.
    pub caches: u64,
    /// Resident and not of caches.
    pub beside: u64,
}

/// What came out.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LoadReport {
    /// Tokens per second of one stream alone.
    pub one_stream: f64,
    /// Tokens per second of eight streams together.
    pub eight_streams: f64,
    /// Requests that were answered to the end.
    pub finished: usize,
    /// Requests that the test left in the middle.
    pub left: usize,
    /// Answers that say the server is busy (429).
    pub busy: usize,
    /// Everything that went wrong, by what was said.
    pub errors: BTreeMap<String, usize>,
    /// Tokens of all clients, per second.
    pub tokens_per_second: f64,
    /// Seconds to the first token of short prompts.
    pub first_token_short: Percentiles,
    /// Seconds to the first token of long prompts of their own.
    pub first_token_long: Percentiles,
    /// Seconds to the first token of questions about the common document.
    pub first_token_shared: Percentiles,
    /// Tokens per second of a stream, after its first token.
    pub stream_rate: Percentiles,
    /// Memory in the first quarter of the second part.
    pub memory_first: Memory,
    /// Memory in its last quarter.
    pub memory_last: Memory,
    /// Growth of what is beside the caches from the one to the other, in percent of all that is resident.
    pub growth_percent: f64,
    /// Sequences that run or wait at the end.
    pub left_over: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Short,
    Long,
    Shared,
    Leave,
}

#[derive(Debug, Default)]
struct Seen {
    first: [Vec<f64>; 3],
    rates: Vec<f64>,
    tokens: usize,
    finished: usize,
    left: usize,
    busy: usize,
    errors: BTreeMap<String, usize>,
}

const WORDS: [&str; 32] = [
    "river", "stone", "engine", "garden", "winter", "letter", "signal", "harbor", "copper", "meadow", "lantern",
    "bridge", "violin", "forest", "island", "thunder", "market", "saddle", "window", "candle", "orchard", "planet",
    "mirror", "anchor", "valley", "pepper", "cotton", "rocket", "shadow", "temple", "velvet", "walnut",
];

fn words(n: usize, seed: u64) -> String {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| WORDS[rng.random_range(0..WORDS.len())]).collect::<Vec<_>>().join(" ")
}

async fn send(options: &LoadOptions, path: &str, body: Option<Value>) -> Result<hyper::Response<Incoming>, LoadError> {
    let address = &options.address;
    let stream =
        TcpStream::connect(address).await.map_err(|source| LoadError::Connect { address: address.clone(), source })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the response's body.
    tokio::spawn(connection);
    let mut request = Request::builder()
        .method(if body.is_some() { "POST" } else { "GET" })
        .uri(path)
        .header("host", address)
        .header("content-type", "application/json");
    if let Some(key) = &options.api_key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let body = body.map_or_else(Bytes::new, |b| b.to_string().into());
    Ok(sender.send_request(request.body(Full::new(body))?).await?)
}

async fn get(options: &LoadOptions, path: &str) -> Result<String, LoadError> {
    let answer = send(options, path, None).await?;
    let status = answer.status().as_u16();
    let body = String::from_utf8_lossy(&answer.into_body().collect().await?.to_bytes()).into_owned();
    if status == 200 { Ok(body) } else { Err(LoadError::Answer { path: path.into(), status, body }) }
}

/// A figure of /metrics.
fn figure(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|v| v.trim().parse::<f64>().ok()).unwrap_or(0.0) as u64
}

/// A streamed answer: seconds to the first token and to the last, tokens. `leave`: goes away after so many pieces.
async fn ask(
    options: &LoadOptions,
    model: &str,
    prompt: &str,
    max_tokens: usize,
    leave: Option<usize>,
) -> Result<(f64, f64, usize), LoadError> {
    let body = json!({
        "model": model, "messages": [{ "role": "user", "content": prompt }], "max_tokens": max_tokens, "temperature": 0.8,
        "stream": true, "stream_options": { "include_usage": true },
    });
    let started = Instant::now();
    let answer = send(options, "/v1/chat/completions", Some(body)).await?;
    let status = answer.status().as_u16();
    let mut stream = answer.into_body();
    if status != 200 {
        let body = String::from_utf8_lossy(&stream.collect().await?.to_bytes()).into_owned();
        return Err(LoadError::Answer { path: "/v1/chat/completions".into(), status, body });
    }
    let (mut rest, mut first, mut last, mut pieces, mut tokens, mut done) = (String::new(), 0.0, 0.0, 0, 0, false);
    while let Some(frame) = stream.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        rest.push_str(&String::from_utf8_lossy(&data));
        while let Some((event, after)) = rest.split_once("\n\n").map(|(e, a)| (e.to_owned(), a.to_owned())) {
            rest = after;
            let Some(event) = event.strip_prefix("data: ") else { continue };
            if event == "[DONE]" {
                done = true;
                continue;
            }
            let chunk: Value = serde_json::from_str(event).unwrap_or_default();
            if !chunk["error"].is_null() {
                return Err(LoadError::Answer { path: "stream".into(), status, body: chunk.to_string() });
            }
            if chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|c| !c.is_empty()) {
                last = started.elapsed().as_secs_f64();
                if pieces == 0 {
                    first = last;
                }
                pieces += 1;
                if leave == Some(pieces) {
                    return Ok((first, last, pieces));
                }
            }
            tokens = chunk["usage"]["completion_tokens"].as_u64().unwrap_or(tokens as u64) as usize;
        }
    }
    if !done {
        return Err(LoadError::Answer { path: "stream".into(), status, body: "it ended without [DONE]".into() });
    }
    Ok((first, last, tokens))
}

/// Tokens per second of `n` streams together, prompts not counted.
async fn rate(options: &LoadOptions, model: &str, n: usize) -> Result<f64, LoadError> {
    let streams = (0..n).map(|i| {
        let (options, model) = (options.clone(), model.to_owned());
        let prompt = format!("Write a long story about a {} and a {}.", WORDS[i % 32], WORDS[(i * 7 + 3) % 32]);
        tokio::spawn(async move { ask(&options, &model, &prompt, 160, None).await })
    });
    let streams: Vec<_> = streams.collect();
    let (mut start, mut end, mut tokens) = (f64::INFINITY, 0.0f64, 0);
    for s in streams {
        let (first, last, n) =
            s.await.map_err(|e| LoadError::Answer { path: "task".into(), status: 0, body: e.to_string() })??;
        start = start.min(first);
        end = end.max(last);
        tokens += n.saturating_sub(1);
    }
    Ok(tokens as f64 / (end - start).max(1e-9))
}

async fn client(options: LoadOptions, model: String, id: u64, until: Instant, seen: Arc<Mutex<Seen>>) {
    let mut rng = StdRng::seed_from_u64(id);
    let document = words(options.long_words, 0);
    while Instant::now() < until {
        let kind = match rng.random_range(0..100) {
            0..60 => Kind::Short,
            60..68 => Kind::Long,
            68..85 => Kind::Shared,
            _ => Kind::Leave,
        };
        let question = format!("What do you think of a {}?", WORDS[rng.random_range(0..WORDS.len())]);
        let prompt = match kind {
            Kind::Long => format!("{}\n\n{question}", words(options.long_words, rng.random())),
            Kind::Shared => format!("{document}\n\n{question}"),
            Kind::Leave if rng.random_bool(0.3) => format!("{}\n\n{question}", words(options.long_words, rng.random())),
            Kind::Short | Kind::Leave => question,
        };
        let leave = (kind == Kind::Leave).then(|| rng.random_range(1..12));
        let max_tokens = if leave.is_some() { 64 } else { rng.random_range(8..48) };
        let answer = ask(&options, &model, &prompt, max_tokens, leave);
        // Some go away before the first token.
        let early = leave.is_some() && rng.random_bool(0.3);
        let answer = if early {
            match tokio::time::timeout(Duration::from_millis(rng.random_range(1..300)), answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    seen.lock().unwrap_or_else(PoisonError::into_inner).left += 1;
                    continue;
                }
            }
        } else {
            answer.await
        };
        let mut pause = None;
        {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            match answer {
                Ok((_, _, n)) if leave.is_some() => {
                    seen.left += 1;
                    seen.tokens += n;
                }
                Ok((first, last, n)) => {
                    seen.finished += 1;
                    seen.tokens += n;
                    seen.first[match kind {
                        Kind::Long => 1,
                        Kind::Shared => 2,
                        _ => 0,
                    }]
                    .push(first);
                    if n > 1 && last > first {
                        seen.rates.push((n - 1) as f64 / (last - first));
                    }
                }
                Err(LoadError::Answer { status: 429, .. }) => {
                    seen.busy += 1;
                    pause = Some(Duration::from_millis(500));
                }
                Err(e) => *seen.errors.entry(e.to_string()).or_default() += 1,
            }
        }
        if let Some(pause) = pause {
            tokio::time::sleep(pause).await;
        }
    }
}

fn percentiles(mut all: Vec<f64>) -> Percentiles {
    all.sort_by(f64::total_cmp);
    let at = |share: f64| all.get(((all.len() as f64 * share) as usize).min(all.len().saturating_sub(1))).copied();
    Percentiles { count: all.len(), p50: at(0.5).unwrap_or(0.0), p95: at(0.95).unwrap_or(0.0) }
}

async fn clients(options: &LoadOptions, model: &str, time: Duration, seed: u64) -> Seen {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let until = Instant::now() + time;
    let all: Vec<_> = (0..options.clients as u64)
        .map(|i| tokio::spawn(client(options.clone(), model.to_owned(), seed + i, until, seen.clone())))
        .collect();
    for c in all {
        if let Err(e) = c.await {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            *seen.errors.entry(format!("a client broke down: {e}")).or_default() += 1;
        }
    }
    std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Sequences that are left once no more should run.
async fn left_over(options: &LoadOptions) -> Result<u64, LoadError> {
    let mut left_over = 0;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let text = get(options, "/metrics").await?;
        left_over = figure(&text, "kvquant_running") + figure(&text, "kvquant_waiting");
        if left_over == 0 {
            break;
        }
    }
    Ok(left_over)
}

/// Runs some work and reads resident bytes and those of caches every second meanwhile.
async fn watched<T>(options: &LoadOptions, work: impl Future<Output = T>) -> (T, Vec<(u64, u64)>) {
    let (mut read, mut tick) = (Vec::new(), tokio::time::interval(Duration::from_secs(1)));
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            out = &mut work => return (out, read),
            _ = tick.tick() => {
                // A server that can't answer this one fails its clients too, which are counted.
                if let Ok(text) = get(options, "/metrics").await {
                    read.push((figure(&text, "process_resident_memory_bytes"), figure(&text, "kvquant_kv_bytes")));
                }
            }
        }
    }
}

/// The medians of some readings.
fn memory(read: &[(u64, u64)]) -> Memory {
    let median = |of: fn(&(u64, u64)) -> u64| {
        let mut all: Vec<u64> = read.iter().map(of).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or(0)
    };
    Memory { resident: median(|r| r.0), caches: median(|r| r.1), beside: median(|r| r.0.saturating_sub(r.1)) }
}

/// Runs the test; `say` hears how far it has come.
///
/// # Errors
/// The server can't be reached, or fails where it must not.
pub async fn load(options: LoadOptions, say: &mut dyn FnMut(&str)) -> Result<LoadReport, LoadError> {
    let models: Value = serde_json::from_str(&get(&options, "/v1/models").await?).unwrap_or_default();
    let model = models["data"][0]["id"].as_str().unwrap_or_default().to_owned();
    say("one stream, then eight");
    rate(&options, &model, 1).await?;
    let one_stream = rate(&options, &model, 1).await?;
    let eight_streams = rate(&options, &model, 8).await?;
    let warm = options.time / 4;
    say(&format!("{} clients for {} s, the first part", options.clients, warm.as_secs()));
    let first = clients(&options, &model, warm, 1_000_000).await;
    let main = options.time - warm;
    say(&format!("{} clients for {} s", options.clients, main.as_secs()));
    let started = Instant::now();
    let (mut seen, read) = watched(&options, clients(&options, &model, main, 1)).await;
    let seconds = started.elapsed().as_secs_f64();
    let left_over = left_over(&options).await?;
    let quarter = read.len().div_ceil(4);
    let (memory_first, memory_last) = (memory(&read[..quarter]), memory(&read[read.len() - quarter..]));
    for (e, n) in first.errors {
        *seen.errors.entry(e).or_default() += n;
    }
    let [short, long, shared] = seen.first;
    Ok(LoadReport {
        one_stream,
        eight_streams,
        finished: seen.finished,
        left: seen.left,
        busy: seen.busy,
        errors: seen.errors,
        tokens_per_second: seen.tokens as f64 / seconds,
        first_token_short: percentiles(short),
        first_token_long: percentiles(long),
        first_token_shared: percentiles(shared),
        stream_rate: percentiles(seen.rates),
        memory_first,
        memory_last,
        growth_percent: 100.0 * (memory_last.beside as f64 - memory_first.beside as f64)
            / memory_first.resident.max(1) as f64,
        left_over,
    })
}

/// [`load`] on a runtime of its own.
///
/// # Errors
/// As [`load`]; or the system gives no threads.
pub fn run(options: LoadOptions, say: &mut dyn FnMut(&str)) -> Result<LoadReport, LoadError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|source| LoadError::Connect { address: options.address.clone(), source })?;
    runtime.block_on(load(options, say))
}
