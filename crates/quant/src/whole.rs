//! Files that are written whole or not at all.

use std::io::Write;
use std::path::Path;

/// Writes a file: first a temporary one beside it, then a rename, so that a failure leaves what was there. What
/// exists and is no file, such as a pipe or a device, is written to directly: a rename would replace it.
///
/// # Errors
/// The folder can't be written, or has no space.
pub fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        return std::fs::OpenOptions::new().write(true).open(path)?.write_all(bytes);
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(name);
    let write = || {
        let mut file = std::fs::File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    // Best effort: the error that matters is the first.
    write().inspect_err(|_| drop(std::fs::remove_file(&partial)))
}
