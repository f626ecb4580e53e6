//! Prefixes on disk.
//!
//! A folder of session files. Each file's blocks are known by the same keys as those in memory, so that a prompt that
//! begins like a stored one finds them; they are read when they are found, not before. Files of another model, quantizer
//! or spec, and damaged ones, are left alone and said in the log.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvquant_cache::{Cache, SessionError, SessionFile, SessionIdentity};
use serde::Serialize;

use crate::prefixes::{Key, key};

/// How session files end.
pub const EXTENSION: &str = "kvs";

/// A name that can't be one of a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no name for a session: use 1 to 100 letters, digits, `.`, `_`, `-`, and begin with a letter or digit"
)]
pub struct NameError(String);

/// Where a session of a name lies.
///
/// # Errors
/// The name would lead elsewhere.
pub fn session_path(dir: &Path, name: &str) -> Result<PathBuf, NameError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if !first || name.len() > 100 || !name.chars().all(fine) {
        return Err(NameError(name.chars().take(100).collect()));
    }
    Ok(dir.join(format!("{name}.{EXTENSION}")))
}

/// Session files of a folder: name and path, sorted.
///
/// # Errors
/// The folder can't be read.
pub fn list(dir: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|n| n.to_str()).map(str::to_owned);
        if let Some(name) = name.filter(|_| path.extension().is_some_and(|e| e == EXTENSION) && path.is_file()) {
            all.push((name, path));
        }
    }
    all.sort();
    Ok(all)
}

/// A session, as clients see it.
#[derive(Debug, Clone, Serialize)]
pub struct Card {
    /// Its name.
    pub id: String,
    /// Always `session`.
    pub object: &'static str,
    /// The model's name when it was saved.
    pub model: String,
    /// How it is stored.
    pub kv_cache: String,
    /// Tokens.
    pub tokens: usize,
    /// Bytes on disk, without the description.
    pub bytes: u64,
    /// Seconds since 1970.
    pub created: u64,
}

/// What a file tells of itself.
pub fn card(name: &str, file: &SessionFile) -> Card {
    let info = file.info();
    Card {
        id: name.into(),
        object: "session",
        model: info.model.clone(),
        kv_cache: info.identity.spec.clone(),
        tokens: info.tokens,
        bytes: file.bytes(),
        created: info.created,
    }
}

/// What sessions must have in common with the server.
#[derive(Debug, Clone)]
pub struct Kind {
    /// Model, quantizer and spec.
    pub identity: SessionIdentity,
    /// The key of an empty text.
    pub root: Key,
    /// Prompt tokens of a pass.
    pub prefill_chunk: usize,
}

#[derive(Debug, Default)]
struct Index {
    files: BTreeMap<String, Arc<SessionFile>>,
    blocks: HashMap<Key, (String, usize)>,
}

/// The sessions of a server.
#[derive(Debug)]
pub struct Sessions {
    dir: PathBuf,
    kind: Kind,
    index: Mutex<Index>,
}

impl Sessions {
    /// The sessions of a folder, which is made where it is missing.
    ///
    /// # Errors
    /// The folder can't be made or read.
    pub fn open(dir: &Path, kind: Kind, empty: &Cache) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let sessions = Sessions { dir: dir.into(), kind, index: Mutex::default() };
        for (name, path) in list(dir)? {
            match SessionFile::open(&path).and_then(|file| sessions.add(&name, file, empty)) {
                Ok(card) => tracing::info!(session = name, tokens = card.tokens, "found"),
                Err(e) => tracing::warn!(session = name, error = %e, "not used"),
            }
        }
        Ok(sessions)
    }

    /// What all of them have in common.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Where a session of a name lies.
    ///
    /// # Errors
    /// The name would lead elsewhere.
    pub fn path(&self, name: &str) -> Result<PathBuf, NameError> {
        session_path(&self.dir, name)
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a file's blocks known, in place of those of an older file of that name.
    ///
    /// # Errors
    /// It is damaged, or of another kind.
    pub fn add(&self, name: &str, file: SessionFile, empty: &Cache) -> Result<Card, SessionError> {
        file.check(&self.kind.identity)?;
        let (mine, its) = (self.kind.prefill_chunk, file.info().prefill_chunk);
        if mine != its {
            return Err(SessionError::Other {
                path: file.path().into(),
                what: "prefill chunk",
                expected: mine.to_string(),
                got: its.to_string(),
            });
        }
        let tokens = file.tokens()?;
        let mut keys = Vec::new();
        let mut parent = self.kind.root;
        for i in 0.. {
            let range = empty.segment_tokens(i)..empty.segment_tokens(i + 1);
            let Some(of_block) = tokens.get(range) else { break };
            parent = key(&parent, of_block);
            keys.push(parent);
        }
        let card = card(name, &file);
        let mut index = self.lock();
        forget(&mut index, name);
        index.blocks.extend(keys.into_iter().enumerate().map(|(i, k)| (k, (name.to_owned(), i))));
        index.files.insert(name.to_owned(), Arc::new(file));
        Ok(card)
    }

    /// The file that has a block, and which one.
    pub fn find(&self, key: &Key) -> Option<(String, Arc<SessionFile>, usize)> {
        let index = self.lock();
        let (name, i) = index.blocks.get(key)?;
        Some((name.clone(), index.files.get(name)?.clone(), *i))
    }

    /// No longer uses a file, which stays where it is.
    pub fn forget(&self, name: &str) {
        forget(&mut self.lock(), name);
    }

    /// Removes a session and its file. False where there is none.
    ///
    /// # Errors
    /// The file can't be removed.
    pub fn remove(&self, name: &str) -> std::io::Result<bool> {
        let Ok(path) = self.path(name) else { return Ok(false) };
        self.forget(name);
        match std::fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// All that can be used, by name.
    pub fn cards(&self) -> Vec<Card> {
        self.lock().files.iter().map(|(name, file)| card(name, file)).collect()
    }
}

fn forget(index: &mut Index, name: &str) {
    if index.files.remove(name).is_some() {
        index.blocks.retain(|_, (of, _)| of != name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_the_folder() {
        let dir = Path::new("/s");
        assert_eq!(session_path(dir, "book-1.v2").unwrap(), Path::new("/s/book-1.v2.kvs"));
        for wrong in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "ä", "a\0", &"x".repeat(101)] {
            assert!(session_path(dir, wrong).is_err(), "{wrong}");
        }
    }
}
