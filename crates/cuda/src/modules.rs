//! Which kernels there are, and their machine code: looked for in folders, else compiled and kept.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use crate::CudaError;
use crate::nvrtc::Nvrtc;
use crate::tables::TERMS;

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Quantize, select outliers, pack.
    Append,
    /// Decode attention over codes.
    Decode,
    /// Codes back to rows.
    Dense,
    /// Prefill attention over fp16 rows.
    Prefill,
    /// Decode attention over fp16 rows.
    Exact,
    /// Rows turned to their positions.
    Rows,
    /// Partial states to one.
    Merge,
    /// What lies between the products of a forward pass.
    Model,
    /// Copy, and random numbers.
    Copy,
}

impl Source {
    fn text(self) -> &'static str {
        match self {
            Source::Append => include_str!("../kernels/append.cu"),
            Source::Decode => include_str!("../kernels/decode.cu"),
            Source::Dense => include_str!("../kernels/dense.cu"),
            Source::Prefill => include_str!("../kernels/prefill.cu"),
            Source::Exact => include_str!("../kernels/exact.cu"),
            Source::Rows => include_str!("../kernels/rows.cu"),
            Source::Merge => include_str!("../kernels/merge.cu"),
            Source::Model => include_str!("../kernels/model.cu"),
            Source::Copy => include_str!("../kernels/copy.cu"),
        }
    }

    /// The name of the file, without its ending.
    pub fn name(self) -> &'static str {
        match self {
            Source::Append => "append",
            Source::Decode => "decode",
            Source::Dense => "dense",
            Source::Prefill => "prefill",
            Source::Exact => "exact",
            Source::Rows => "rows",
            Source::Merge => "merge",
            Source::Model => "model",
            Source::Copy => "copy",
        }
    }
}

/// A file of kernels for certain sizes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Build {
    /// The file.
    pub source: Source,
    /// Its definitions.
    pub defines: Vec<(&'static str, usize)>,
}

impl std::fmt::Display for Build {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.source.name())?;
        self.defines.iter().try_for_each(|(k, v)| write!(f, " {k}={v}"))
    }
}

/// Shared memory of the decode kernel: common to a block of threads, and of each of its warps (kernels/decode.cu).
fn decode_shared(bits: usize, dim: usize, group: usize, turned: usize) -> (usize, usize) {
    let (unit, series) = (dim * 8 * bits, dim / SLAB - turned);
    let columns = if series > 0 { 2048 + TERMS * dim * 2 + series * 6 * 512 } else { 0 };
    (
        turned * 4096 + dim * 128 + dim * 4 + group * dim * 4 + 64 + columns,
        2 * unit + 2 * 512 + dim * 4 + 256 + group * (256 + 256 + 128 + 6 * dim) + 64,
    )
}

/// Channels of 16 RoPE pairs, which the decode kernel takes together.
pub const SLAB: usize = 32;

/// How the decode kernel is built for a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeShape {
    /// Warps of a block of threads.
    pub warps: usize,
    /// Its shared memory.
    pub shared: usize,
    /// Query heads that a block of threads takes together.
    pub group: usize,
    /// Slabs whose keys are turned; the rest goes by series.
    pub turned: usize,
}

/// Query heads taken together of `heads` that share a KV head: a divisor of it up to 8.
pub fn group_of(heads: usize) -> usize {
    (1..=8).rev().find(|g| heads.is_multiple_of(*g)).unwrap_or(1)
}

impl DecodeShape {
    /// As many warps as fit the shared memory of a block, up to what their registers allow. `fast` slabs have pairs that turn too far within a block
    /// for a series; several query heads turn all keys, since their series would not fit a product's columns.
    pub fn new(bits: usize, dim: usize, group: usize, fast: usize, limit: usize) -> Self {
        let turned = if group == 1 { fast.min(dim / SLAB) } else { dim / SLAB };
        let (fixed, warp) = decode_shared(bits, dim, group, turned);
        let fit = (limit.saturating_sub(fixed) / warp).max(1);
        // More warps leave each fewer registers: 16 have 128, 12 have 168, 8 have 255. 20 with 96 are no faster. Registers are
        // shared out to a quarter of the warps each.
        let most = if group == 1 && dim <= 128 { 16 } else { 12 };
        let warps = fit.min(most);
        let warps = if warps >= 4 { warps / 4 * 4 } else { warps };
        DecodeShape { warps, shared: fixed + warp * warps, group, turned }
    }
}

impl Build {
    fn of(source: Source, defines: &[(&'static str, usize)]) -> Self {
        Build { source, defines: defines.to_vec() }
    }

    /// Decode attention over codes.
    pub fn decode(bits: usize, dim: usize, shape: DecodeShape) -> Self {
        let DecodeShape { warps, shared, group, turned } = shape;
        Self::of(
            Source::Decode,
            &[("BITS", bits), ("DIM", dim), ("GROUP", group), ("WARPS", warps), ("SHARED", shared), ("TURNED", turned)],
        )
    }
    /// Append.
    pub fn append(bits: usize, dim: usize, channels: usize) -> Self {
        Self::of(Source::Append, &[("BITS", bits), ("DIM", dim), ("CHANNELS", channels)])
    }
    /// Codes to rows.
    pub fn dense(bits: usize, dim: usize) -> Self {
        Self::of(Source::Dense, &[("BITS", bits), ("DIM", dim)])
    }
    /// Decode attention over fp16 rows.
    pub fn exact(dim: usize, group: usize) -> Self {
        Self::of(Source::Exact, &[("BITS", 4), ("DIM", dim), ("GROUP", group)])
    }
    /// A file that knows the head dimension only.
    pub fn plain(source: Source, dim: usize) -> Self {
        Self::of(source, &[("BITS", 4), ("DIM", dim)])
    }

    /// Every build for models of these channels (KV heads times head dimension) on a card with so much shared memory.
    pub fn all(shared: usize, channels: &[usize]) -> Vec<Build> {
        let mut all = vec![Self::plain(Source::Copy, 128)];
        for dim in [64, 128, 256] {
            all.extend([Source::Prefill, Source::Rows, Source::Merge, Source::Model].map(|s| Self::plain(s, dim)));
            all.extend((1..=8).map(|g| Self::exact(dim, g)));
            for bits in [2, 3, 4] {
                all.push(Self::dense(bits, dim));
                // As RoPE's usual bases have it: the first 16 or 32 pairs are fast.
                let fast = (dim / 128).max(1);
                all.extend((1..=8).map(|g| Self::decode(bits, dim, DecodeShape::new(bits, dim, g, fast, shared))));
                all.extend(channels.iter().filter(|c| c.is_multiple_of(dim)).map(|c| Self::append(bits, dim, *c)));
            }
        }
        all
    }

    fn full_text(&self) -> String {
        let common = [include_str!("../kernels/layout.cuh"), include_str!("../kernels/device.cuh")].concat();
        let (codes, series) = (include_str!("../kernels/codes.cuh"), include_str!("../kernels/series.cuh"));
        match self.source {
            Source::Decode => {
                [&common, codes, series, include_str!("../kernels/decode.cuh"), self.source.text()].concat()
            }
            Source::Dense => [&common, codes, self.source.text()].concat(),
            _ => [&common, self.source.text()].concat(),
        }
    }

    fn options(&self, arch: &str) -> Vec<String> {
        let mut o: Vec<String> =
            ["--std=c++17", "--ptxas-options=-v", "--device-as-default-execution-space"].map(String::from).to_vec();
        o.push(format!("--gpu-architecture={arch}"));
        o.extend(self.defines.iter().map(|(k, v)| format!("-D{k}={v}")));
        o
    }

    /// A name that changes with text, options and architecture.
    pub fn file(&self, arch: &str) -> String {
        let mut hash = Sha256::new();
        hash.update(self.full_text());
        self.options(arch).iter().for_each(|o| hash.update(o));
        let hash: String = hash.finalize().iter().take(10).map(|b| format!("{b:02x}")).collect();
        format!("{}-{arch}-{hash}.cubin", self.source.name())
    }
}

/// Shared memory that a block of threads may have on an architecture.
pub fn shared_limit(arch: &str) -> Option<usize> {
    match arch {
        "sm_80" | "sm_87" => Some(163 << 10),
        "sm_86" | "sm_89" | "sm_120" | "sm_121" => Some(99 << 10),
        "sm_90" | "sm_90a" | "sm_100" | "sm_100a" | "sm_103" => Some(227 << 10),
        _ => None,
    }
}

/// What ptxas reports of the worst function of a build.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of registers spilled to memory.
    pub spilled: usize,
    /// Bytes of shared memory whose size the text says.
    pub shared: usize,
}

impl Resources {
    fn read(log: &str) -> Self {
        let words: Vec<&str> = log.split_whitespace().collect();
        let number = |i: usize| words.get(i).and_then(|w| w.parse::<usize>().ok()).unwrap_or(0);
        let mut r = Resources::default();
        for (i, pair) in words.windows(2).enumerate() {
            match pair {
                ["Used", _] => r.registers = r.registers.max(number(i + 1)),
                ["bytes", "smem"] | ["bytes", "smem,"] => r.shared = r.shared.max(number(i - i.min(1))),
                ["spill", "stores,"] => r.spilled = r.spilled.max(number(i - i.min(2))),
                _ => {}
            }
        }
        r
    }
}

/// Hears of a build that has to be compiled.
type Tell = Box<dyn Fn(&Build) + Send + Sync>;

/// Folders of compiled kernels, and the compiler.
pub struct Modules {
    folder: PathBuf,
    nvrtc_folder: Option<PathBuf>,
    nvrtc: OnceLock<Nvrtc>,
    tell: Option<Tell>,
}

impl Modules {
    /// Kernels are kept in `folder`; else `KVQUANT_MODULES`, else the user's cache.
    pub fn new(folder: Option<&Path>, nvrtc: Option<&Path>) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let folder = folder.map(Path::to_path_buf).or_else(|| set("KVQUANT_MODULES")).unwrap_or_else(|| {
            let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|h| h.join(".cache")));
            cache.unwrap_or_else(std::env::temp_dir).join("kvquant").join("cuda")
        });
        Modules { folder, nvrtc_folder: nvrtc.map(Path::to_path_buf), nvrtc: OnceLock::new(), tell: None }
    }

    /// Tells of every kernel that has to be compiled before it is used, which takes a second or more.
    pub fn telling(mut self, tell: impl Fn(&Build) + Send + Sync + 'static) -> Self {
        self.tell = Some(Box::new(tell));
        self
    }

    /// Whether the compiler can be loaded.
    ///
    /// # Errors
    /// It is not there.
    pub fn find_compiler(&self) -> Result<(), CudaError> {
        self.compiler().map(|_| ())
    }

    /// Where compiled kernels are kept.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn compiler(&self) -> Result<&Nvrtc, CudaError> {
        if self.nvrtc.get().is_none() {
            let loaded = Nvrtc::load(self.nvrtc_folder.as_deref())?;
            let _ = self.nvrtc.set(loaded);
        }
        Ok(self.nvrtc.get().expect("set just now"))
    }

    /// Compiles a build and keeps it.
    ///
    /// # Errors
    /// No compiler, an error in the text, or the folder can't be written.
    pub fn compile(&self, build: &Build, arch: &str) -> Result<(Vec<u8>, Resources), CudaError> {
        let made = self
            .compiler()?
            .compile(&format!("{}.cu", build.source.name()), &build.full_text(), &build.options(arch))
            .map_err(|log| CudaError::Compile { kernel: build.to_string(), arch: arch.into(), log })?;
        let path = self.folder.join(build.file(arch));
        let io = |operation, path: &Path, source| CudaError::Io { path: path.to_path_buf(), operation, source };
        std::fs::create_dir_all(&self.folder).map_err(|e| io("make the folder", &self.folder, e))?;
        let report = path.with_extension("log");
        kvquant_quant::write_whole(&report, made.log.as_bytes()).map_err(|e| io("write", &report, e))?;
        kvquant_quant::write_whole(&path, &made.cubin).map_err(|e| io("write", &path, e))?;
        Ok((made.cubin, Resources::read(&made.log)))
    }

    /// [`compile`](Modules::compile), unless the folder has the same build and its report.
    ///
    /// # Errors
    /// As for `compile`.
    pub fn compile_once(&self, build: &Build, arch: &str) -> Result<(Vec<u8>, Resources), CudaError> {
        let path = self.folder.join(build.file(arch));
        match (std::fs::read(&path), std::fs::read_to_string(path.with_extension("log"))) {
            (Ok(code), Ok(log)) if code.starts_with(b"\x7fELF") => Ok((code, Resources::read(&log))),
            _ => self.compile(build, arch),
        }
    }

    /// The machine code of a build.
    ///
    /// # Errors
    /// As for `compile`, if it is not there yet.
    pub fn get(&self, build: &Build, arch: &str) -> Result<Vec<u8>, CudaError> {
        match std::fs::read(self.folder.join(build.file(arch))) {
            Ok(code) if code.starts_with(b"\x7fELF") => Ok(code),
            _ => {
                if let Some(tell) = &self.tell {
                    tell(build);
                }
                Ok(self.compile(build, arch)?.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_fit_their_card_and_have_names_of_their_own() {
        for arch in ["sm_80", "sm_90a", "sm_100"] {
            let limit = shared_limit(arch).unwrap();
            let all = Build::all(limit, &[4096, 1024, 192]);
            let names: std::collections::HashSet<String> = all.iter().map(|b| b.file(arch)).collect();
            assert_eq!(names.len(), all.len());
            for b in all.iter().filter(|b| b.source == Source::Decode) {
                assert!(b.defines.iter().all(|(k, v)| *k != "SHARED" || *v <= limit), "{b}");
            }
        }
        assert_eq!([1, 3, 4, 7, 8, 9, 16].map(group_of), [1, 3, 4, 7, 8, 3, 8]);
    }

    #[test]
    fn the_report_of_the_assembler_is_read() {
        let log = "ptxas info    : Function properties for decode\nptxas         .     48 bytes stack frame, 44 bytes spill stores, 44 bytes spill loads\nptxas info    : Used 128 registers, used 1 barriers, 4608 bytes smem";
        assert_eq!(Resources::read(log), Resources { registers: 128, spilled: 44, shared: 4608 });
    }
}
