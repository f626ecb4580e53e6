//! Text, tables and files.

use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::failure::Input;

/// Reads a UTF-8 text.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Input(format!("{}: cannot read the text: {e}", path.display())))?;
    let text =
        String::from_utf8(bytes).map_err(|_| Input(format!("{}: not UTF-8 text; convert it first", path.display())))?;
    if text.trim().is_empty() {
        return Err(Input(format!("{}: the text is empty", path.display())).into());
    }
    Ok(text)
}

/// Writes a file whole or not at all.
pub fn write(path: &Path, content: &str) -> Result<()> {
    kvquant_quant::write_whole(path, content.as_bytes()).with_context(|| format!("{}: cannot write", path.display()))
}

/// `1.5 MB`, in powers of 1000.
pub fn bytes(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        n => format!("{n:.0} B"),
    }
}

/// The most memory that this process has held, where the system tells.
pub fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kb| kb * 1024.0)
}

/// `println!` that ends the program where nobody reads on (`kvquant inspect FILE | head`), instead of panicking.
macro_rules! say {
    ($($part:tt)*) => { $crate::output::line(format_args!($($part)*)) };
}
pub(crate) use say;

/// Writes a line.
pub fn line(text: std::fmt::Arguments<'_>) {
    if let Err(e) = writeln!(std::io::stdout().lock(), "{text}") {
        if e.kind() == ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        eprintln!("error: standard output can't be written: {e}");
        std::process::exit(1);
    }
}
