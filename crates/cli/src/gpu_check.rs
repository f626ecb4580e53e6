//! `kvquant gpu-check`

mod count;
mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use kvquant_cuda::bench::{self, Plan, Row, SHAPES, Shape};
use kvquant_cuda::check::{self, Outcome};
use kvquant_cuda::device::Device;
use kvquant_cuda::model::GpuModel;
use kvquant_cuda::modules::{Build, Modules, shared_limit};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::failure::Input;
use crate::output;
use crate::output::say;

/// Channels a token of the models that kernels are compiled for ahead.
const CHANNELS: [usize; 5] = [128, 192, 256, 1024, 4096];
/// Query rows of the prefill benches.
const QUERIES: usize = 1024;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant gpu-check --out results\n  kvquant gpu-check --only check\n  kvquant gpu-check --only copy,decode --tokens 131072 --shapes llama2-7b --bits 16,3\n  kvquant gpu-check --compile sm_80,sm_90a --modules kernels     (needs no GPU)\n  kvquant gpu-check --count"
)]
pub struct Args {
    /// Which GPU
    #[arg(long, default_value_t = 0, value_name = "N")]
    device: usize,
    /// Only these parts
    #[arg(long, value_delimiter = ',', value_name = "PART", default_values = ["check", "copy", "decode", "append", "prefill", "sdpa"])]
    only: Vec<Part>,
    /// Fewer cases of the check
    #[arg(long)]
    quick: bool,
    /// Also compare this model's forward pass with the CPU's: a known model, GGUF file or Hugging Face folder
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Models to bench
    #[arg(long, value_delimiter = ',', default_values = ["llama2-7b", "llama3-8b", "smollm2"])]
    shapes: Vec<String>,
    /// Bits of the caches to bench; 16 is fp16
    #[arg(long, value_delimiter = ',', default_values_t = [16, 4, 3, 2])]
    bits: Vec<usize>,
    /// Lengths of the histories to bench
    #[arg(long, value_delimiter = ',', default_values_t = [2048, 8192, 32768, 131072, 1048576])]
    tokens: Vec<usize>,
    /// Seed of the check's random input [default: from the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// Folder of NVRTC, where the system does not find it
    #[arg(long, value_name = "DIR")]
    nvrtc: Option<PathBuf>,
    /// Folder of compiled kernels [default: the user's cache]
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Only compile every kernel for these architectures, into the folder of compiled kernels, and report registers, shared
    /// memory and spills; what the folder has already is reported again
    #[arg(long, value_delimiter = ',', value_name = "ARCH")]
    compile: Vec<String>,
    /// With --compile: only these files of kernels
    #[arg(long, value_delimiter = ',', value_name = "FILES", requires = "compile")]
    kernels: Vec<String>,
    /// With --compile: fail if registers are spilled
    #[arg(long, requires = "compile")]
    no_spills: bool,
    /// Only print what the kernels must move and compute, and what that takes at least; needs no GPU
    #[arg(long, conflicts_with = "compile")]
    count: bool,
    /// Folder for gpu-check.json
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Check,
    Copy,
    Decode,
    Append,
    Prefill,
    Sdpa,
    /// All layers of a model resident, decoded
    Capacity,
}

pub fn run(args: Args) -> Result<()> {
    if args.count {
        count::run();
        return Ok(());
    }
    let modules = Modules::new(args.modules.as_deref(), args.nvrtc.as_deref());
    if !args.compile.is_empty() {
        return compile(&args, &modules);
    }
    let shapes: Vec<Shape> = args
        .shapes
        .iter()
        .map(|name| {
            SHAPES.iter().find(|s| s.name == name).copied().ok_or_else(|| {
                let known: Vec<&str> = SHAPES.iter().map(|s| s.name).collect();
                Input(format!("--shapes {name}: unknown; there are {}", known.join(", ")))
            })
        })
        .collect::<Result<_, _>>()?;
    if let Some(b) = args.bits.iter().find(|b| ![2, 3, 4, 16].contains(b)) {
        return Err(Input(format!("--bits {b}: there are 2, 3, 4 and 16")).into());
    }
    if let Some(t) = args.tokens.iter().find(|t| !(1..=1 << 24).contains(*t)) {
        return Err(Input(format!("--tokens {t}: 1 to {} are supported", 1 << 24)).into());
    }
    let device = Device::open(args.device, modules)?;
    let has = |p: Part| args.only.contains(&p);
    let info = device.info();
    eprintln!(
        "{} ({}), {} multiprocessors, {} of L2, {}",
        info.name,
        info.arch,
        info.processors,
        output::bytes(info.cache as f64),
        output::bytes(info.memory as f64)
    );

    let mut outcomes = Vec::new();
    let mut tell = |o: &Outcome| {
        let word = if o.passed() { "ok   " } else { "WRONG" };
        eprintln!("{word} {:14} {:44} error {:.2e} of {:.0e}", o.kernel, o.case, o.error, o.tolerance);
    };
    let seed = args.seed.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64)
    });
    if has(Part::Check) {
        eprintln!("check: seed {seed}");
        outcomes = check::run(&device, seed, args.quick, &mut tell)?;
    }
    if let Some(name) = &args.model {
        let loaded = crate::models::load(name, None)?;
        let modules = Modules::new(args.modules.as_deref(), args.nvrtc.as_deref());
        let gpu = GpuModel::new(Device::open(args.device, modules)?, &loaded.model, &mut |_, _| {})?;
        outcomes.extend(model::run(&loaded, &gpu, &mut tell)?);
    }
    let mut rows = Vec::new();
    let show = |r: &Row| {
        let rate = r.bytes as f64 / r.seconds / 1e9;
        eprintln!(
            "{:10} {:10} {:9} {:8} {:10.1} us {:7.0} GB/s",
            r.what,
            r.shape,
            r.cache,
            r.tokens,
            r.seconds * 1e6,
            rate
        );
    };
    if has(Part::Copy) {
        let row = bench::copy(&device)?;
        show(&row);
        rows.push(row);
    }
    let plan = Plan {
        shapes: shapes.clone(),
        bits: args.bits.clone(),
        tokens: args.tokens.clone(),
        decode: has(Part::Decode),
        append: has(Part::Append),
        prefill: has(Part::Prefill),
    };
    if plan.decode || plan.append || plan.prefill {
        rows.extend(bench::run(&device, &plan, &mut |r| show(r), &mut |what| eprintln!("left out: {what}"))?);
    }
    if has(Part::Capacity) {
        for s in &shapes {
            for &bits in args.bits.iter().filter(|b| **b != 16) {
                for &tokens in &args.tokens {
                    let row = bench::capacity(&device, s, bits, tokens)?;
                    show(&row);
                    rows.push(row);
                }
            }
        }
    }
    let sdpa = if has(Part::Sdpa) { sdpa(&args, &shapes, has(Part::Prefill)) } else { Vec::new() };

    let report = json!({
        "device": { "name": info.name, "arch": info.arch, "multiprocessors": info.processors, "l2_bytes": info.cache, "memory_bytes": info.memory },
        "seed": seed, "check": outcomes, "times": rows, "sdpa": sdpa,
    });
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder)
            .map_err(|e| Input(format!("{}: cannot make the folder: {e}", folder.display())))?;
        output::write(&folder.join("gpu-check.json"), &serde_json::to_string_pretty(&report)?)?;
    }
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table(&rows, &sdpa));
        summary(&outcomes);
    }
    let wrong = outcomes.iter().filter(|o| !o.passed()).count();
    anyhow::ensure!(wrong == 0, "{wrong} of {} comparisons with the CPU are out of tolerance", outcomes.len());
    Ok(())
}

/// The worst outcome of each kernel.
fn summary(outcomes: &[Outcome]) {
    let mut worst: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for o in outcomes {
        let w = worst.entry(o.kernel).or_insert((0, 0.0));
        *w = (w.0 + 1, w.1.max(o.error));
    }
    for (kernel, (n, error)) in worst {
        say!("{kernel:14} {n} comparisons, greatest error {error:.2e}");
    }
}

/// Times of one layer in microseconds, by model and length; ratios to our fp16 kernel in brackets.
fn table(rows: &[Row], sdpa: &[Value]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let copy = rows.iter().find(|r| r.what == "copy").map(|r| r.bytes as f64 / r.seconds);
    if let Some(rate) = copy {
        let _ = writeln!(text, "copy {:.0} GB/s, read and written", rate / 1e9);
    }
    let mut keys: Vec<(&str, &str, usize)> =
        rows.iter().filter(|r| r.what != "copy").map(|r| (r.what, r.shape, r.tokens)).collect();
    keys.sort_unstable();
    keys.dedup();
    for (what, shape, tokens) in keys {
        let of = |r: &&Row| (r.what, r.shape, r.tokens) == (what, shape, tokens);
        let base = rows.iter().filter(of).find(|r| r.cache == "fp16").map(|r| r.seconds);
        let _ = write!(text, "{what:10} {shape:10} {tokens:8}");
        for r in rows.iter().filter(of) {
            let _ = write!(text, "  {} {:.1}", r.cache, r.seconds * 1e6);
            match (base, copy) {
                (Some(b), _) if r.cache != "fp16" => {
                    let _ = write!(text, " ({:.2}x)", b / r.seconds);
                }
                (_, Some(rate)) if what == "decode" => {
                    let _ = write!(text, " ({:.2} of copy)", r.bytes as f64 / r.seconds / rate);
                }
                _ => {}
            }
        }
        let torch = sdpa.iter().find(|v| v["what"] == what && v["shape"] == shape && v["tokens"] == tokens);
        if let Some(s) = torch.and_then(|v| v["seconds"].as_f64()) {
            let _ = write!(text, "  torch {:.1}", s * 1e6);
        }
        text.push('\n');
    }
    text
}

/// PyTorch's times, where python3 has it.
fn sdpa(args: &Args, shapes: &[Shape], prefill: bool) -> Vec<Value> {
    let shapes: Vec<Value> = shapes
        .iter()
        .map(|s| json!({ "name": s.name, "kv_heads": s.kv_heads, "group": s.group, "dim": s.dim }))
        .collect();
    let what: &[&str] = if prefill { &["decode", "prefill"] } else { &["decode"] };
    let work = json!({ "shapes": shapes, "tokens": args.tokens, "queries": QUERIES, "what": what });
    eprintln!("PyTorch's scaled_dot_product_attention");
    let done = Command::new("python3").arg("-c").arg(include_str!("../assets/sdpa.py")).arg(work.to_string()).output();
    match done {
        Ok(out) => {
            if !out.status.success() {
                let why = String::from_utf8_lossy(&out.stderr);
                eprintln!("left out: PyTorch: {}", why.lines().last().unwrap_or("python3 failed"));
            }
            String::from_utf8_lossy(&out.stdout).lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
        }
        Err(e) => {
            eprintln!("left out: PyTorch: python3: {e}");
            Vec::new()
        }
    }
}

/// Compiles, on all cores, and reports in order what ptxas says.
fn compile(args: &Args, modules: &Modules) -> Result<()> {
    let mut spilled = Vec::new();
    for arch in &args.compile {
        let Some(limit) = shared_limit(arch) else {
            return Err(Input(format!("--compile {arch}: unknown; for example sm_80, sm_90a, sm_100")).into());
        };
        let all = Build::all(limit, &CHANNELS);
        let asked = |b: &Build| args.kernels.is_empty() || args.kernels.iter().any(|k| k == b.source.name());
        if let Some(k) = args.kernels.iter().find(|k| all.iter().all(|b| b.source.name() != *k)) {
            let known: BTreeSet<&str> = all.iter().map(|b| b.source.name()).collect();
            let known: Vec<&str> = known.into_iter().collect();
            return Err(Input(format!("--kernels {k}: unknown; there are {}", known.join(", "))).into());
        }
        let builds: Vec<Build> = all.into_iter().filter(asked).collect();
        // A few at a time, so that the report goes on while others compile.
        for some in builds.chunks(2 * rayon::current_num_threads()) {
            let made: Vec<_> = some.par_iter().map(|b| modules.compile_once(b, arch)).collect();
            for (build, made) in some.iter().zip(made) {
                let (code, r) = made?;
                say!(
                    "{arch:7} {build:56} {:4} registers {:4} bytes spilled {:6} of shared memory {:7} of code",
                    r.registers,
                    r.spilled,
                    r.shared,
                    code.len()
                );
                if r.spilled > 0 {
                    spilled.push(format!("{arch} {build}"));
                }
            }
        }
    }
    if !spilled.is_empty() {
        say!("spills: {}", spilled.join("; "));
    }
    anyhow::ensure!(!args.no_spills || spilled.is_empty(), "{} builds spill registers", spilled.len());
    Ok(())
}
