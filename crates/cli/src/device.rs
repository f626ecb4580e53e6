//! `--device`: what a model runs on.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use kvquant_cuda::CudaError;
use kvquant_cuda::device::{Device, count};
use kvquant_cuda::model::{GpuModel, check_libraries, supports};
use kvquant_cuda::modules::Modules;
use kvquant_model::{Engine, Model};
use kvquant_quant::Spec;

use crate::output::{bytes, say};
use crate::progress::{Progress, note};

/// Of what a GPU does not do at all.
pub const CPU_ONLY: &str = "runs on the CPU only (--device cpu)";

/// The value of --device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    Cpu,
    Cuda(usize),
    Auto,
}

impl FromStr for On {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "cpu" => Ok(On::Cpu),
            "auto" => Ok(On::Auto),
            "cuda" => Ok(On::Cuda(0)),
            _ => match s.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
                Some(n) => Ok(On::Cuda(n)),
                None => Err("there are cpu, cuda:N (the N-th NVIDIA GPU, from 0) and auto".into()),
            },
        }
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            On::Cpu => write!(f, "cpu"),
            On::Cuda(n) => write!(f, "cuda:{n}"),
            On::Auto => write!(f, "auto"),
        }
    }
}

/// Where to run; flattened into the options of commands.
#[derive(clap::Args, Clone, Copy)]
pub struct Choice {
    /// What to compute on: cpu, cuda:N, or auto (a GPU if one is there and supports model and caches)
    #[arg(long, value_name = "DEVICE", default_value_t = On::Cpu)]
    pub device: On,
}

impl Choice {
    /// Puts a model on a GPU, if it is to run there: `None` is the CPU. All that can be refused is refused before any work;
    /// `auto` says what it chose, and why.
    pub fn place(self, model: &Model, specs: &[&Spec]) -> Result<Option<GpuModel>> {
        let supported = || specs.iter().map(|s| Some(*s)).chain([None]).try_for_each(|s| supports(model, s));
        match self.device {
            On::Cpu => Ok(None),
            On::Cuda(n) => {
                supported()?;
                Ok(Some(open(n, model)?))
            }
            On::Auto => match usable().and_then(|()| supported()).and_then(|()| open(0, model)) {
                Ok(gpu) => {
                    eprintln!("computing on cuda:0, {}", gpu.device().info().name);
                    Ok(Some(gpu))
                }
                Err(e) => {
                    eprintln!("computing on the CPU: {e}");
                    Ok(None)
                }
            },
        }
    }

    /// Whether a GPU will be asked for, for choosing a cache that it can have.
    pub fn wants_gpu(self) -> bool {
        match self.device {
            On::Cpu => false,
            On::Cuda(_) => true,
            On::Auto => usable().is_ok(),
        }
    }
}

/// What runs sequences: the GPU, or the model on this CPU.
pub fn engine<'a>(gpu: &'a Option<GpuModel>, model: &'a Model) -> &'a dyn Engine {
    match gpu {
        Some(gpu) => gpu,
        None => model,
    }
}

fn usable() -> Result<(), CudaError> {
    match count() {
        0 => Err(CudaError::NoDriver),
        _ => check_libraries(),
    }
}

fn open(n: usize, model: &Model) -> Result<GpuModel, CudaError> {
    let modules = Modules::new(None, None).telling(|build| note(&format!("compiling, once: {build}")));
    let device = Device::open(n, modules)?;
    check_libraries()?;
    let mut progress = Progress::new();
    let gpu = GpuModel::new(device, model, &mut |done, total| {
        progress.update("weights to the GPU", done as u64, total as u64);
    });
    progress.clear();
    gpu
}

/// `kvquant inspect --gpu`: every card, and what of NVIDIA's libraries is there.
pub fn report() -> Result<serde_json::Value> {
    let library = |found: Result<(), CudaError>| found.map_or_else(|e| e.to_string(), |()| "found".to_string());
    let modules = Modules::new(None, None);
    let mut cards = Vec::new();
    for n in 0..count() {
        let device = Device::open(n, Modules::new(None, None));
        cards.push(match device {
            Ok(d) => {
                let i = d.info();
                serde_json::json!({ "device": format!("cuda:{n}"), "name": i.name, "arch": i.arch,
                    "multiprocessors": i.processors, "shared_memory_bytes": i.shared, "l2_bytes": i.cache,
                    "memory_bytes": i.memory, "free_bytes": d.free_memory()? })
            }
            Err(e) => serde_json::json!({ "device": format!("cuda:{n}"), "error": e.to_string() }),
        });
    }
    Ok(serde_json::json!({
        "gpus": cards,
        "driver": if count() > 0 { "found".to_string() } else { CudaError::NoDriver.to_string() },
        "nvrtc": library(modules.find_compiler()),
        "cublaslt": library(check_libraries()),
        "kernels": modules.folder(),
    }))
}

/// The report for people.
pub fn show(report: &serde_json::Value) {
    let text = |v: &serde_json::Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
    for card in report["gpus"].as_array().into_iter().flatten() {
        if let Some(error) = card["error"].as_str() {
            say!("{}        {error}", text(&card["device"]));
            continue;
        }
        let size = |key: &str| bytes(card[key].as_f64().unwrap_or(0.0));
        say!(
            "{}        {} ({}), {} multiprocessors, {} of L2, {} of memory, {} free",
            text(&card["device"]),
            text(&card["name"]),
            text(&card["arch"]),
            card["multiprocessors"],
            size("l2_bytes"),
            size("memory_bytes"),
            size("free_bytes")
        );
    }
    for (key, what) in [("driver", "driver"), ("nvrtc", "NVRTC"), ("cublaslt", "cuBLASLt"), ("kernels", "kernels in")] {
        say!("{what:13} {}", text(&report[key]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_by_name() {
        for (text, on) in [("cpu", On::Cpu), ("auto", On::Auto), ("cuda:0", On::Cuda(0)), ("cuda:3", On::Cuda(3))] {
            assert_eq!(text.parse::<On>(), Ok(on));
            assert_eq!(on.to_string(), text);
        }
        assert_eq!("cuda".parse::<On>(), Ok(On::Cuda(0)));
        assert!("gpu".parse::<On>().unwrap_err().contains("cuda:N"));
        assert!("cuda:-1".parse::<On>().is_err());
    }
}
