//! `kvquant inspect`

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;
use kvquant_kernels::weights::WeightType;
use kvquant_model::gguf::Value;
use kvquant_model::{Config, Gguf, Source, pull};
use kvquant_quant::Quantizer;
use serde_json::json;

use crate::failure::Input;
use crate::output::{bytes, say};
use crate::progress::Progress;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant inspect smollm2-135m\n  kvquant inspect smollm2.safetensors --json\n  kvquant inspect --cpu\n  kvquant inspect --gpu"
)]
pub struct Args {
    /// A GGUF file, a Hugging Face folder, a quantizer file, or a known model
    #[arg(required_unless_present_any = ["cpu", "gpu"])]
    file: Option<String>,
    /// Show which kernels this CPU gets
    #[arg(long)]
    cpu: bool,
    /// Show the GPUs, and which of NVIDIA's libraries are there
    #[arg(long)]
    gpu: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.cpu {
        print!("{}", kvquant_kernels::dispatch::cpu_report());
        say!("attention     {}", kvquant_kernels::attend::Kernels::detect()?.name());
    }
    if args.gpu {
        let report = crate::device::report()?;
        if args.json {
            say!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            crate::device::show(&report);
        }
    }
    let Some(file) = args.file else { return Ok(()) };
    let mut progress = Progress::new();
    let path = pull::resolve(&file, &mut |stage, done, total| progress.update(stage, done, total))?;
    progress.clear();
    let report = if is_model(&path)? { model(&path)? } else { quantizer(&path)? };
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        show(&report, 0);
    }
    Ok(())
}

fn is_model(path: &PathBuf) -> Result<bool> {
    if path.is_dir() {
        return Ok(true);
    }
    let mut start = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut start));
    match read {
        Ok(()) => Ok(start == *b"GGUF"),
        Err(e) => Err(Input(format!(
            "{}: cannot read: {e}; give a GGUF file, a model folder or a quantizer file",
            path.display()
        ))
        .into()),
    }
}

fn model(path: &Path) -> Result<serde_json::Value> {
    let source = Source::open(path)?;
    let mut metadata = serde_json::Map::new();
    let values = match &source {
        Source::Gguf(g) => &g.metadata,
        Source::Folder(f) => f.metadata(),
    };
    for (k, v) in values {
        let shown = match v {
            Value::U64(x) => json!(x),
            Value::I64(x) => json!(x),
            Value::F64(x) => json!(x),
            Value::Bool(x) => json!(x),
            Value::String(s) if s.chars().count() > 80 => {
                json!(format!("{}...", s.chars().take(77).collect::<String>()))
            }
            Value::String(s) => json!(s),
            Value::Strings(x) => json!(format!("{} texts", x.len())),
            Value::Ints(x) => json!(format!("{} integers", x.len())),
            Value::Floats(x) => json!(format!("{} numbers", x.len())),
            Value::Bools(x) => json!(format!("{} booleans", x.len())),
        };
        metadata.insert(k.clone(), shown);
    }
    let types = match &source {
        Source::Gguf(g) => types(g),
        Source::Folder(f) => f.types(),
    };
    let types: BTreeMap<_, _> =
        types.into_iter().map(|(k, (n, b))| (k, format!("{n} tensors, {}", bytes(b as f64)))).collect();
    // An architecture that does not run can still be looked at.
    let runs = match Config::read(&source, None) {
        Ok(c) => {
            let elements = 2 * c.layers * c.kv_heads * c.head_dim;
            let windows = c.attention.iter().filter(|a| a.window.is_some()).count();
            json!({ "family": c.family.gguf, "layers": c.layers, "layers_with_a_window": windows,
                "window": c.attention.iter().find_map(|a| a.window), "hidden": c.hidden, "heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim,
                "context": c.context, "cache_elements_per_token": elements,
                "cache_bytes_per_token": { "fp16": elements * 2, "4 bits": elements / 2, "3 bits": elements * 3 / 8, "2 bits": elements / 4 } })
        }
        Err(e) => json!(e.to_string()),
    };
    Ok(
        json!({ "file": path, "kind": if path.is_dir() { "Hugging Face folder" } else { "GGUF model" }, "model": runs, "tensors": types, "metadata": metadata }),
    )
}

/// Element types, with how many tensors and bytes there are of each.
fn types(g: &Gguf) -> BTreeMap<String, (usize, u64)> {
    let mut types: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for t in &g.tensors {
        let name = WeightType::from_ggml(t.ty).map_or(format!("type {}", t.ty), |t| t.name().into());
        let of = types.entry(name).or_default();
        *of = (of.0 + 1, of.1 + t.bytes);
    }
    types
}

fn quantizer(path: &Path) -> Result<serde_json::Value> {
    let q = Quantizer::load(path)?;
    let fits: BTreeMap<String, String> = q
        .fits
        .iter()
        .map(|f| {
            let sides = || f.layers.iter().flat_map(|l| [&l.keys, &l.values]);
            let widths: Vec<u8> = sides().filter_map(|s| s.mixed.as_ref()).flat_map(|m| m.widths.clone()).collect();
            let book = match sides().next().map_or(0, |s| s.encode.len()) {
                _ if !widths.is_empty() => {
                    let mean = widths.iter().map(|b| f64::from(*b)).sum::<f64>() / widths.len() as f64;
                    let most = widths.iter().max().copied().unwrap_or(0);
                    format!("mixed widths up to {most} bits, {mean:.2} on average, with transforms")
                }
                0 => "thresholds only".to_string(),
                n => format!("{}-bit codebooks", n.ilog2()),
            };
            (f.spec.fit_key(), format!("{book}, {} layers, {}", f.layers.len(), bytes(f.file_bytes() as f64)))
        })
        .collect();
    let size = std::fs::metadata(path).map_or(0, |m| m.len());
    Ok(
        json!({ "file": path, "kind": "quantizer", "bytes": size, "model": q.model, "provenance": q.provenance, "fits": fits }),
    )
}

/// Indented lines, for people.
fn show(v: &serde_json::Value, depth: usize) {
    let Some(map) = v.as_object() else { return };
    for (k, v) in map {
        let pad = "  ".repeat(depth);
        match v {
            serde_json::Value::Object(_) => {
                say!("{pad}{k}");
                show(v, depth + 1);
            }
            serde_json::Value::String(s) => say!("{pad}{k:26} {}", s.replace('\n', "\\n")),
            other => say!("{pad}{k:26} {other}"),
        }
    }
}
