//! llama-cpp-python in a process of its own, asked line by line.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::CHUNK;
use super::report::PeerResult;
use crate::failure::Input;

const SCRIPT: &str = include_str!("peer.py");

pub struct Peer {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    types: Vec<String>,
}

impl Peer {
    /// Starts the interpreter and loads the model's GGUF file.
    pub fn start(model: &Path, types: &str) -> Result<Self> {
        if model.is_dir() {
            return Err(Input("--peer runs on GGUF files; this model is a Hugging Face folder".into()).into());
        }
        let types: Vec<String> = types.split(',').map(|t| t.trim().to_string()).collect();
        let python = std::env::var_os("KVQUANT_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
        let mut child = Command::new(&python)
            .args(["-c", SCRIPT])
            .arg(model)
            .arg(rayon::current_num_threads().to_string())
            .arg(CHUNK.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| Input(format!("--peer: cannot start {}: {e}", python.display())))?;
        let (ask, answers) = (child.stdin.take(), child.stdout.take());
        let (ask, answers) = (ask.context("--peer: no pipe")?, BufReader::new(answers.context("--peer: no pipe")?));
        let mut peer = Peer { child, ask, answers, types };
        let hello = peer.read()?;
        if hello.trim() != "ready" {
            return Err(Input(format!(
                "--peer: {} has no working llama_cpp ({}); install it with `pip install llama-cpp-python`, or name an interpreter that has it in KVQUANT_PYTHON",
                python.display(),
                hello.trim()
            ))
            .into());
        }
        Ok(peer)
    }

    /// Caches to measure.
    pub fn types(&self) -> &[String] {
        &self.types
    }

    fn read(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("--peer: the interpreter stopped; its message is above");
        }
        Ok(line)
    }

    /// One cache type at one depth.
    pub fn measure(&mut self, kv: &str, depth: usize, seconds: Duration, prefill: bool) -> Result<PeerResult> {
        let question =
            serde_json::json!({ "kv": kv, "depth": depth, "seconds": seconds.as_secs_f64(), "prefill": prefill });
        writeln!(self.ask, "{question}")?;
        self.ask.flush()?;
        let answer = self.read()?;
        serde_json::from_str(&answer).with_context(|| format!("--peer, cache {kv} at {depth}: {}", answer.trim()))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be waiting for a line that never comes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
