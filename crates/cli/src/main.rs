//! kvquant: long-context inference with a KV cache of 2 to 4 bits.

mod ablate;
mod bench;
mod calibrate;
mod chat;
mod demo;
mod device;
mod eval;
mod failure;
mod generate;
mod gpu_check;
mod inspect;
mod load_test;
mod models;
mod output;
mod progress;
mod pull;
mod quantizers;
mod retrieve;
mod serve;
mod session;
mod tune;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// A server allocates and frees for days: this allocator gives back what is free. It has small pages, since large ones keep what
/// lies between; blocks and weights have large ones of their own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXAMPLES: &str = "Examples:
  kvquant demo
  kvquant generate smollm2-135m -p \"What is a codebook?\" --kv mix3+sink1
  kvquant eval smollm2-135m --text book.txt --kv fp16,mix3+sink1 --windows 2";

#[derive(Parser)]
#[command(name = "kvquant", version, about = "Long-context LLM inference with a KV cache of 2 to 4 bits (KVQuant, arXiv 2401.18079)", after_help = EXAMPLES)]
struct Cli {
    /// Threads to compute with [default: all cores]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<std::num::NonZeroUsize>,
    /// What weights are multiplied with: int15 is as good as f32; int8 is faster for prompts and batches, and loses as
    /// much as other programs lose that way
    #[arg(long, global = true, value_parser = models::activations(), value_name = "TYPE", default_value = "int15")]
    activations: kvquant_model::Activations,
    /// No progress on stderr
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a question on a long text with an fp16 and a 3-bit cache, and compare them
    Demo(demo::Args),
    /// Get a known model into the cache folder
    Pull(pull::Args),
    /// Fit thresholds and codebooks to a model: text in, quantizer file out
    Calibrate(calibrate::Args),
    /// Tune the signposts of a quantizer with the cache in the loop
    Tune(tune::Args),
    /// Show what is in a model or quantizer file, or which kernels this CPU gets
    Inspect(inspect::Args),
    /// Answer one prompt
    Generate(generate::Args),
    /// Talk with a model
    Chat(chat::Args),
    /// Serve a model over HTTP, as OpenAI's API
    Serve(serve::Args),
    /// Store the cache of a text and ask about it later
    Session(session::Args),
    /// Put load on a running server and report times and memory
    LoadTest(load_test::Args),
    /// Measure the quality of caches on a text against an fp16 cache
    Eval(eval::Args),
    /// Ask for a number that is hidden in a long text, with one cache after the other
    Retrieve(retrieve::Args),
    /// Measure the speed of caches at several depths
    Bench(bench::Args),
    /// Check the GPU kernels against the CPU and measure them
    GpuCheck(gpu_check::Args),
    /// Measure the method part by part (the paper's ablations) and write a report
    Ablate(ablate::Args),
}

fn run(cli: Cli) -> Result<()> {
    progress::set_quiet(cli.quiet);
    models::set_activations(cli.activations);
    // Refuse a faulty KVQUANT_KERNEL before any work.
    kvquant_kernels::dispatch::isa()?;
    if let Some(n) = cli.threads {
        rayon::ThreadPoolBuilder::new().num_threads(n.get()).build_global()?;
    }
    if let Command::Serve(args) = cli.command {
        return serve::run(args);
    }
    // From within rayon's pool, its regions (calibration has them) start at once; from outside each costs two context switches.
    rayon::scope(|_| command(cli.command))
}

fn command(command: Command) -> Result<()> {
    match command {
        Command::Demo(a) => demo::run(a),
        Command::Pull(a) => pull::run(a),
        Command::Calibrate(a) => calibrate::run(a),
        Command::Tune(a) => tune::run(a),
        Command::Inspect(a) => inspect::run(a),
        Command::Generate(a) => generate::run(a),
        Command::Chat(a) => chat::run(a),
        Command::Eval(a) => eval::run(a),
        Command::Retrieve(a) => retrieve::run(a),
        Command::Session(a) => session::run(a),
        Command::LoadTest(a) => load_test::run(a),
        Command::Serve(a) => serve::run(a),
        Command::Bench(a) => bench::run(a),
        Command::GpuCheck(a) => gpu_check::run(a),
        Command::Ablate(a) => ablate::run(a),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if failure::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", failure::describe(&e));
            ExitCode::from(if failure::is_input(&e) { 2 } else { 1 })
        }
    }
}
