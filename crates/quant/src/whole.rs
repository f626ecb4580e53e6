//! Files that are written whole or not at all.

use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Writes a file: first a temporary one beside it, then a rename, so that a failure leaves what was there. What
/// exists and is no file, such as a pipe or a device, is written to directly: a rename would replace it.
///
/// # Errors
/// The folder can't be written, or has no space.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_whole_with(path, |out| out.write_all(bytes))
}

/// [`write_whole`] of what `content` writes.
///
/// # Errors
/// The folder can't be written, has no space, or `content` fails.
pub fn write_whole_with(path: &Path, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let mut out = BufWriter::new(std::fs::OpenOptions::new().write(true).open(path)?);
        content(&mut out)?;
        return out.flush();
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(name);
    let write = || {
        let mut out = BufWriter::new(std::fs::File::create(&partial)?);
        content(&mut out)?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(&partial, path)
    };
    // Best effort: the error that matters is the first.
    write().inspect_err(|_| drop(std::fs::remove_file(&partial)))
}
