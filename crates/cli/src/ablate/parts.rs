//! Results of a long report, kept in a file as they come.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::failure::Input;
use crate::output::write;

/// What is measured so far, by all that it follows from.
pub struct Parts {
    path: Option<PathBuf>,
    done: BTreeMap<String, Value>,
}

impl Parts {
    /// Those of a file, which may not exist yet; without a file nothing is kept.
    pub fn open(path: Option<&Path>) -> Result<Parts> {
        let done = match path {
            Some(path) if path.exists() => {
                let bytes =
                    std::fs::read(path).map_err(|e| Input(format!("{}: cannot be read: {e}", path.display())))?;
                serde_json::from_slice(&bytes).map_err(|e| {
                    Input(format!("{}: holds no parts of a report ({e}); name another file", path.display()))
                })?
            }
            _ => BTreeMap::new(),
        };
        Ok(Parts { path: path.map(Path::to_path_buf), done })
    }

    /// The part that follows from `key`, if it is there.
    pub fn get<T: DeserializeOwned>(&self, key: &impl Serialize) -> Result<Option<T>> {
        let value = self.done.get(&serde_json::to_string(key)?);
        Ok(value.map(|v| serde_json::from_value(v.clone())).transpose()?)
    }

    /// Takes in the part that follows from `key`; [`keep`](Parts::keep) writes it.
    pub fn put(&mut self, key: &impl Serialize, part: &impl Serialize) -> Result<()> {
        self.done.insert(serde_json::to_string(key)?, serde_json::to_value(part)?);
        Ok(())
    }

    /// Writes all parts.
    pub fn keep(&self) -> Result<()> {
        self.path.as_ref().map_or(Ok(()), |path| write(path, &serde_json::to_string_pretty(&self.done)?))
    }

    /// The part that follows from `key`, made and kept unless it is there already.
    pub fn part<T: Serialize + DeserializeOwned>(
        &mut self,
        key: &impl Serialize,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if let Some(part) = self.get(key)? {
            return Ok(part);
        }
        let made = make()?;
        self.put(key, &made)?;
        self.keep()?;
        Ok(made)
    }
}

/// A short name for bytes.
pub fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes)[..8].iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parts.json");
        let mut made = 0;
        for _ in 0..2 {
            let mut parts = Parts::open(Some(&path)).unwrap();
            for key in [("a", 1), ("a", 2)] {
                let got: usize = parts
                    .part(&key, || {
                        made += 1;
                        Ok(10 * key.1)
                    })
                    .unwrap();
                assert_eq!(got, 10 * key.1);
            }
        }
        assert_eq!(made, 2);
        std::fs::write(&path, "no JSON").unwrap();
        assert!(Parts::open(Some(&path)).err().unwrap().to_string().contains("name another file"));
    }
}
