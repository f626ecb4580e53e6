//! The server through its socket: what it answers, what it frees, and how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const SPEC: &str = "nuq3-1%+sink1";

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvquant"))
            .args(["serve", "smollm2-135m", "--port", "0", "--kv", SPEC])
            .args(arguments)
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("ready at http://").unwrap_or_else(|| panic!("{line}")).to_owned();
        Server { child, address }
    }

    fn open(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A body that is too long may be refused before all of it is sent.
        let _ = stream.write_all(body);
        stream
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String) {
        let mut answer = Vec::new();
        let _ = self.open(method, path, headers, body).read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        (status, if chunked { joined(body) } else { body.to_owned() })
    }

    fn get(&self, path: &str) -> Value {
        serde_json::from_str(&self.send("GET", path, "", b"").1).unwrap()
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.send("POST", path, JSON, body.to_string().as_bytes());
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}")))
    }

    fn figure(&self, name: &str) -> f64 {
        let text = self.send("GET", "/metrics", "", b"").1;
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("{name}: {text}"));
        line.parse().unwrap()
    }

    fn wait_for(&self, name: &str, value: f64) {
        let until = Instant::now() + Duration::from_secs(30);
        while self.figure(name) != value {
            assert!(Instant::now() < until, "{name} is {}, not {value}", self.figure(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const JSON: &str = "Content-Type: application/json\r\n";

fn joined(chunks: &str) -> String {
    let (mut out, mut rest) = (String::new(), chunks);
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(n) = usize::from_str_radix(size.trim(), 16) else { break };
        if n == 0 || after.len() < n {
            break;
        }
        out.push_str(&after[..n]);
        rest = after[n..].trim_start_matches("\r\n");
    }
    out
}

fn chat(text: &str, more: Value) -> Value {
    let mut request = json!({
        "model": "smollm2-135m", "messages": [{ "role": "user", "content": text }], "temperature": 0, "max_tokens": 12,
    });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

/// A text of about 1,100 tokens.
fn document() -> String {
    (0..110).map(|i| format!("Rule {i}: the keeper of gate {} reports to room {}. ", i * 7 % 50, i * 3 % 40)).collect()
}

#[test]
fn answers_streams_and_errors() {
    let s = Server::start(&["--max-body", "100k", "--ctx", "2000", "--kv-memory", "20M"]);
    assert_eq!(s.get("/health")["status"], "ok");
    assert_eq!(s.get("/v1/models")["data"][0]["max_model_len"], 2000);
    let (status, whole) = s.post("/v1/chat/completions", &chat("Name three rivers.", json!({ "logprobs": true })));
    assert_eq!((status, &whole["choices"][0]["finish_reason"]), (200, &json!("length")));
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    let tokens = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.iter().map(|t| t["token"].as_str().unwrap()).collect::<String>(), text(&whole));

    let request = chat("Name three rivers.", json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let (status, events) = s.send("POST", "/v1/chat/completions", JSON, request.to_string().as_bytes());
    let events: Vec<&str> = events.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).collect();
    assert_eq!((status, events.last()), (200, Some(&"[DONE]")));
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let streamed: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, text(&whole), "the stream says what the whole answer says");
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 12);

    let stop = text(&whole).split(' ').nth(2).unwrap().to_owned();
    let (_, stopped) = s.post("/v1/chat/completions", &chat("Name three rivers.", json!({ "stop": stop })));
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(text(&stopped), text(&whole).split_once(&stop).unwrap().0);
    let hot = json!({ "temperature": 1.5, "seed": 5, "frequency_penalty": 0.5, "top_k": 50, "min_p": 0.01 });
    let (_, a) = s.post("/v1/chat/completions", &chat("Tell me a story.", hot.clone()));
    let (_, b) = s.post("/v1/chat/completions", &chat("Tell me a story.", hot));
    assert_eq!(text(&a), text(&b), "a seed repeats");
    let (_, done) = s.post("/v1/completions", &json!({
        "model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0, "logprobs": 1,
    }));
    assert!(done["choices"][0]["text"].as_str().unwrap().contains("Paris"), "{done}");
    assert_eq!(done["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 3);
    let (_, counted) = s.post("/v1/tokenize", &json!({ "prompt": "Hello there" }));
    assert_eq!(counted["count"], counted["tokens"].as_array().unwrap().len());

    let path = "/v1/chat/completions";
    for (method, path, headers, body, want, code) in [
        ("POST", path, JSON, "{".into(), 400, "invalid_value"),
        ("POST", path, "", chat("x", json!({})).to_string(), 415, "wrong_content_type"),
        ("POST", path, JSON, chat("x", json!({ "model": "gpt-4" })).to_string(), 404, "model_not_found"),
        ("POST", path, JSON, chat("x", json!({ "max_tokens": 5000 })).to_string(), 400, "context_length_exceeded"),
        ("POST", path, JSON, chat("x", json!({ "max_tokens": u64::MAX })).to_string(), 400, "context_length_exceeded"),
        ("POST", path, JSON, chat(&"many words ".repeat(3000), json!({})).to_string(), 400, "context_length_exceeded"),
        (
            "POST",
            path,
            JSON,
            chat(&" ".repeat(99_000), json!({})).to_string() + &" ".repeat(9000),
            413,
            "body_too_large",
        ),
        ("POST", path, JSON, chat("x", json!({ "tools": [1] })).to_string(), 400, "unsupported_parameter"),
        (
            "POST",
            "/v1/completions",
            JSON,
            json!({"model": "smollm2-135m", "prompt": ""}).to_string(),
            400,
            "invalid_value",
        ),
        (
            "POST",
            "/v1/completions",
            JSON,
            json!({"model": "smollm2-135m", "prompt": [1, 99999]}).to_string(),
            400,
            "invalid_value",
        ),
        ("POST", "/v1/sessions", JSON, "{}".into(), 404, "sessions_off"),
        ("PUT", path, JSON, "{}".into(), 405, "wrong_method"),
        ("GET", "/v2", "", String::new(), 404, "not_found"),
    ] {
        let (status, answer) = s.send(method, path, headers, body.as_bytes());
        let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{answer}"));
        assert_eq!((status, &answer["error"]["code"]), (want, &json!(code)), "{method} {path}: {answer}");
        assert!(answer["error"]["message"].is_string() && answer["error"]["type"].is_string());
    }
    for (path, kind) in [("/", "<!doctype html>"), ("/page.js", "\"use strict\""), ("/page.css", ":root")] {
        let (status, page) = s.send("GET", path, "", b"");
        assert!(status == 200 && page.starts_with(kind), "{path}: {page}");
    }
}

#[test]
fn prefixes_are_shared_and_answers_stay_the_same() {
    let s = Server::start(&[]);
    let ask = |q: &str| s.post("/v1/chat/completions", &chat(&format!("{}\n{q}", document()), json!({}))).1;
    let cold = ask("Which room?");
    let warm = ask("Which room?");
    let (prompt, cached) = (&cold["usage"]["prompt_tokens"], &warm["usage"]["prompt_tokens_details"]["cached_tokens"]);
    assert_eq!(cold["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert!(cached.as_u64().unwrap() + 200 > prompt.as_u64().unwrap(), "{cached} of {prompt}");
    assert_eq!(text(&warm), text(&cold), "shared blocks give the answer of fresh ones");
    assert!(ask("Which gate?")["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 800);
    // Two that run at the same time hold one copy.
    let before = s.figure("kvquant_prefix_bytes");
    std::thread::scope(|t| {
        t.spawn(|| ask("Who reports?"));
        t.spawn(|| ask("Who keeps the gate?"));
    });
    assert!(s.figure("kvquant_prefix_bytes") <= before * 1.2);
}

#[test]
fn clients_that_go_away_free_their_blocks_at_once() {
    let s = Server::start(&["--max-sequences", "2"]);
    let long = chat("Tell me a very long story.", json!({ "max_tokens": 4000, "stream": true })).to_string();
    for _ in 0..2 {
        let open = || s.open("POST", "/v1/chat/completions", JSON, long.as_bytes());
        // Requests that come together may change places: the one that is read runs before the others come.
        let mut streams = vec![open()];
        let mut some = [0; 300];
        streams[0].read_exact(&mut some).unwrap();
        streams.extend([open(), open()]);
        s.wait_for("kvquant_running", 2.0);
        s.wait_for("kvquant_waiting", 1.0);
        assert!(s.figure("kvquant_kv_reserved_bytes") > 0.0);
        drop(streams);
        s.wait_for("kvquant_running", 0.0);
        s.wait_for("kvquant_waiting", 0.0);
        assert_eq!(s.figure("kvquant_kv_reserved_bytes"), 0.0);
        assert_eq!(s.figure("kvquant_kv_bytes"), s.figure("kvquant_prefix_bytes"));
    }
    assert_eq!(s.figure("kvquant_cancelled_total"), 6.0);
}

#[test]
fn memory_admits_in_order_and_says_what_never_fits() {
    // Room for about 3,000 tokens.
    let s = Server::start(&["--kv-memory", "16M", "--max-queue", "2", "--queue-seconds", "60"]);
    let (status, e) = s.post("/v1/chat/completions", &chat("x", json!({ "max_tokens": 5000 })));
    assert_eq!((status, &e["error"]["code"]), (400, &json!("kv_memory_exceeded")), "{e}");
    let request = |n: usize| chat("Tell me a story.", json!({ "max_tokens": n, "stream": true })).to_string();
    let big = s.open("POST", "/v1/chat/completions", JSON, request(2200).as_bytes());
    s.wait_for("kvquant_running", 1.0);
    let second = s.open("POST", "/v1/chat/completions", JSON, request(2200).as_bytes());
    s.wait_for("kvquant_waiting", 1.0);
    let third = s.open("POST", "/v1/chat/completions", JSON, request(5).as_bytes());
    s.wait_for("kvquant_waiting", 2.0);
    let (status, e) = s.post("/v1/chat/completions", &chat("x", json!({})));
    assert_eq!((status, &e["error"]["type"]), (429, &json!("rate_limit_error")), "{e}");
    assert_eq!(s.figure("kvquant_running"), 1.0, "the small one does not pass the big one");
    // Memory comes free: the one that waited longest is next, and nobody was cut.
    drop(big);
    s.wait_for("kvquant_waiting", 0.0);
    drop(second);
    let mut answer = String::new();
    let mut third = third;
    third.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("[DONE]") && !answer.contains("\"error\""), "{answer}");
    // Many different prompts: old prefixes give way, the budget holds.
    for i in 0..5 {
        let (status, _) =
            s.post("/v1/chat/completions", &chat(&format!("{i} {}", document()), json!({ "max_tokens": 2 })));
        assert_eq!(status, 200);
        assert!(s.figure("kvquant_kv_bytes") <= 16e6);
    }
    assert!(s.figure("kvquant_prefix_evicted") > 0.0);
}

#[test]
fn sessions_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let question =
        |s: &Server| s.post("/v1/chat/completions", &chat(&format!("{} Which room?", document()), json!({}))).1;
    let first = {
        let s = Server::start(&["--session-dir", dir, "--api-key", "sesame"]);
        let key = "Authorization: Bearer sesame\r\n";
        let body = json!({ "name": "rules", "messages": [{ "role": "user", "content": document() }] }).to_string();
        assert_eq!(s.send("POST", "/v1/sessions", JSON, body.as_bytes()).0, 401);
        assert_eq!(
            s.send("POST", "/v1/sessions", &format!("{JSON}Authorization: Bearer sesam\r\n"), body.as_bytes()).0,
            401
        );
        assert_eq!(s.send("GET", "/health", "", b"").0, 200);
        let headers = format!("{JSON}{key}");
        let (status, saved) = s.send("POST", "/v1/sessions", &headers, body.as_bytes());
        assert_eq!(status, 201, "{saved}");
        let bad = body.replace("rules", "../rules");
        assert_eq!(s.send("POST", "/v1/sessions", &headers, bad.as_bytes()).0, 400);
        let q = chat(&format!("{} Which room?", document()), json!({})).to_string();
        serde_json::from_str::<Value>(&s.send("POST", "/v1/chat/completions", &headers, q.as_bytes()).1).unwrap()
    };
    // Files of others and damaged ones are left alone.
    std::fs::write(folder.path().join("broken.kvs"), b"KVQSESS1 but no more").unwrap();
    let s = Server::start(&["--session-dir", dir]);
    assert_eq!(s.get("/v1/sessions")["data"].as_array().unwrap().len(), 1);
    let again = question(&s);
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 800, "{again}");
    assert_eq!(text(&again), text(&first));
    assert_eq!(s.send("DELETE", "/v1/sessions/rules", "", b"").0, 200);
    assert_eq!(s.send("DELETE", "/v1/sessions/rules", "", b"").0, 404);
    assert!(folder.path().join("broken.kvs").exists() && !folder.path().join("rules.kvs").exists());
}

#[test]
fn a_signal_lets_answers_finish_and_then_ends_them() {
    for (grace, n, last) in [("60", 30, "\"finish_reason\":\"length\""), ("1", 4000, "shutting_down")] {
        let mut s = Server::start(&["--grace-seconds", grace]);
        let request = chat("Tell me a very long story.", json!({ "max_tokens": n, "stream": true })).to_string();
        let mut stream = s.open("POST", "/v1/chat/completions", JSON, request.as_bytes());
        s.wait_for("kvquant_running", 1.0);
        s.signal("-TERM");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(last) && answer.trim_end().contains("[DONE]"), "{grace}: {answer}");
        assert!(s.child.wait().unwrap().success());
    }
}

#[test]
fn sessions_by_command() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let file = folder.path().join("rules.txt");
    std::fs::write(&file, document()).unwrap();
    let run = |arguments: &[&str]| {
        let o = Command::new(env!("CARGO_BIN_EXE_kvquant")).args(arguments).args(["--dir", dir]).output().unwrap();
        (o.status.code(), String::from_utf8_lossy(&o.stdout).into_owned() + &String::from_utf8_lossy(&o.stderr))
    };
    let save = ["session", "save", "smollm2-135m", "rules", "--kv", SPEC, "-f", file.to_str().unwrap()];
    let (code, says) = run(&save);
    assert_eq!(code, Some(0), "{says}");
    let ask = ["session", "load", "smollm2-135m", "rules", "-p", "Which room?", "--max-tokens", "8", "--json"];
    let (code, first) = run(&ask);
    assert_eq!(code, Some(0), "{first}");
    let text = |s: &str| serde_json::from_str::<Value>(s).unwrap()["text"].clone();
    assert_eq!(text(&first), text(&run(&ask).1));
    assert!(run(&["session", "list"]).1.contains("rules"));
    let (code, says) = run(&["session", "load", "smollm2-135m", "other", "-p", "x"]);
    assert!(code == Some(2) && says.contains("there are: rules"), "{says}");
    // A damaged file is refused, and stays.
    let path = folder.path().join("rules.kvs");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20_000] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    let (code, says) = run(&ask);
    assert!(code == Some(2) && says.contains("checksum") && says.contains("rules.kvs"), "{says}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(run(&["session", "rm", "rules"]).0, Some(0));
    assert!(!path.exists());
}
