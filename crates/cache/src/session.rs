//! A cache on disk, blocks as they are in memory.
//!
//! ```text
//! 0         "KVQSESS1"
//! 8         sections, one after another, no gaps:
//!             0        the tokens, u32 each
//!             1        sinks: a layer after another, { dropped u32, bytes u32, rows }
//!             2 + i    block i: a layer after another, { kind u8, bytes u32, data }
//! ..        header: JSON { format, session, sections: [{ length, sha256 }, ..] }
//! end - 48  length of the header u64, SHA-256 of the header, "KVQSESS1"
//! data      rows, tile: keys, then values, fp16 | codes: the block's fixed part, then its outliers (`coded`)
//! ```
//!
//! All numbers are little-endian. The header comes last, so that a file is written in one go. Opening reads the header
//! only; blocks are read when they are asked for. Every byte is under a checksum, and everything that a checksum can't
//! promise (a file may be made by anyone) is checked against the cache that is to hold it.

mod block;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kvquant_quant::pack::BLOCK_TOKENS;
use kvquant_quant::write_whole_with;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::block::Rows;
use crate::error::CacheError;
use crate::layer::Layer;
use crate::sequence::Cache;
use crate::sharing::Segment;
use block::{read_column, read_sinks, write_column, write_sinks};

const MAGIC: &[u8; 8] = b"KVQSESS1";
const FORMAT: u32 = 1;
/// The end of a file: header length, checksum, magic.
const TAIL: u64 = 8 + 32 + 8;
/// A header of a million tokens has 16,000 sections of 90 bytes.
const MOST_HEADER: u64 = 64 << 20;
const MOST_TOKENS: usize = 1 << 24;
/// Sections before the blocks.
const FIRST_BLOCK: usize = 2;

/// What a stored cache can be continued with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionIdentity {
    /// Hash of the model's weights.
    pub weights_sha256: String,
    /// Hash of the quantizer's fit; empty for specs without one.
    pub quantizer_sha256: String,
    /// The cache spec.
    pub spec: String,
}

/// What a session file says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionInfo {
    /// What it can be continued with.
    pub identity: SessionIdentity,
    /// The model's name, for people.
    pub model: String,
    /// Prompt tokens of a pass; blocks of another number differ in their last digits.
    pub prefill_chunk: usize,
    /// Text that ends a turn after what is stored, where the stored text is the beginning of one.
    pub after: String,
    /// Tokens.
    pub tokens: usize,
    /// Seconds since 1970.
    pub created: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: u32,
    session: SessionInfo,
    sections: Vec<Section>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    length: u64,
    sha256: String,
}

/// A session can't be stored or restored.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The file system said no.
    #[error("session {path}: cannot {operation}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `write`.
        operation: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no whole session.
    #[error(
        "session {path}: {part}: {problem}; the file is damaged or not a session: remove it and save the session again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which part.
        part: String,
        /// What is wrong.
        problem: String,
    },
    /// The file is of another model, quantizer or spec.
    #[error(
        "session {path}: its {what} is {got}, this is {expected}; use the one that it was saved with, or save it again"
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What is at hand.
        expected: String,
        /// What the file says.
        got: String,
    },
    /// The cache refused.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A session file. Blocks are read when they are asked for.
#[derive(Debug)]
pub struct SessionFile {
    path: PathBuf,
    file: Mutex<File>,
    info: SessionInfo,
    sections: Vec<Section>,
    /// Where each begins.
    starts: Vec<u64>,
}

/// Stores `cache`, which holds `tokens`. A failure leaves the file that was there.
///
/// # Errors
/// The tokens are not those of the cache, the cache has tables of its own (`+online`), or the file can't be written.
pub fn save_session(path: &Path, cache: &Cache, tokens: &[u32], info: &SessionInfo) -> Result<(), SessionError> {
    if cache.layers.iter().any(Layer::is_online) {
        return Err(CacheError::Online { spec: cache.spec().to_string() }.into());
    }
    for (what, got) in [("stored tokens", tokens.len()), ("tokens of the session's description", info.tokens)] {
        if got != cache.len() {
            return Err(CacheError::Length { what, expected: cache.len(), got }.into());
        }
    }
    let write = |out: &mut dyn std::io::Write| {
        out.write_all(MAGIC)?;
        let mut sections = Vec::new();
        let mut section = |bytes: &[u8]| {
            sections.push(Section { length: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) });
            out.write_all(bytes)
        };
        section(&tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())?;
        section(&write_sinks(cache))?;
        for i in 0..columns(cache, tokens.len()) {
            section(&write_column(cache, i))?;
        }
        let header = Header { format: FORMAT, session: info.clone(), sections };
        let header = serde_json::to_vec(&header)?;
        out.write_all(&header)?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&Sha256::digest(&header))?;
        out.write_all(MAGIC)
    };
    write_whole_with(path, write).map_err(|source| SessionError::Io { path: path.into(), operation: "write", source })
}

/// Blocks of `tokens` tokens.
fn columns(cache: &Cache, tokens: usize) -> usize {
    tokens.saturating_sub(cache.sinks).div_ceil(BLOCK_TOKENS)
}

impl SessionFile {
    /// Reads what a file says of itself, and that it is whole.
    ///
    /// # Errors
    /// It can't be read, or is no whole session.
    pub fn open(path: &Path) -> Result<Self, SessionError> {
        let io = |source| SessionError::Io { path: path.into(), operation: "read", source };
        let damaged =
            |part: &str, problem: String| SessionError::Damaged { path: path.into(), part: part.into(), problem };
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        if size < 8 + TAIL {
            return Err(damaged("size", format!("{size} bytes are too few")));
        }
        let mut first = [0; 8];
        file.read_exact(&mut first).map_err(io)?;
        let mut tail = [0; TAIL as usize];
        file.seek(SeekFrom::End(-(TAIL as i64))).map_err(io)?;
        file.read_exact(&mut tail).map_err(io)?;
        let (length, rest) = tail.split_at(8);
        let (sum, last) = rest.split_at(32);
        if &first != MAGIC {
            return Err(damaged("beginning", "it is not that of a session of this version".into()));
        }
        if last != MAGIC {
            return Err(damaged("end", "it is not that of a session; the file was cut".into()));
        }
        let length = length.iter().rev().fold(0u64, |n, b| n << 8 | *b as u64);
        if length > MOST_HEADER || length > size - 8 - TAIL {
            return Err(damaged("header", format!("{length} bytes do not fit")));
        }
        let sections_end = size - TAIL - length;
        let mut header = vec![0; length as usize];
        file.seek(SeekFrom::Start(sections_end)).map_err(io)?;
        file.read_exact(&mut header).map_err(io)?;
        if Sha256::digest(&header)[..] != *sum {
            return Err(damaged("header", "its checksum differs".into()));
        }
        let header: Header = serde_json::from_slice(&header).map_err(|e| damaged("header", e.to_string()))?;
        if header.format != FORMAT {
            return Err(damaged("format", format!("version {}, and this program reads {FORMAT}", header.format)));
        }
        let info = header.session;
        if info.tokens == 0 || info.tokens > MOST_TOKENS {
            return Err(damaged("tokens", format!("{}, not within 1 to {MOST_TOKENS}", info.tokens)));
        }
        let mut starts = Vec::with_capacity(header.sections.len());
        let mut at = 8u64;
        for s in &header.sections {
            starts.push(at);
            at = at.checked_add(s.length).filter(|end| *end <= sections_end).ok_or_else(|| {
                damaged("sections", format!("section {} ends behind the file's data", starts.len() - 1))
            })?;
        }
        if at != sections_end || header.sections.len() < FIRST_BLOCK {
            return Err(damaged("sections", "they do not fill the file".into()));
        }
        if header.sections[0].length != 4 * info.tokens as u64 {
            return Err(damaged("tokens", "another number of them is stored".into()));
        }
        Ok(SessionFile { path: path.into(), file: Mutex::new(file), info, sections: header.sections, starts })
    }

    /// What the file says of itself.
    pub fn info(&self) -> &SessionInfo {
        &self.info
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of its blocks and tokens.
    pub fn bytes(&self) -> u64 {
        self.sections.iter().map(|s| s.length).sum()
    }

    /// Whether it can be continued with what is at hand.
    ///
    /// # Errors
    /// It can't; the error names what differs.
    pub fn check(&self, identity: &SessionIdentity) -> Result<(), SessionError> {
        let short = |s: &str| s.chars().take(16).collect::<String>();
        let mine = &self.info.identity;
        for (what, expected, got) in [
            ("cache spec", &identity.spec, &mine.spec),
            ("model (hash of its weights)", &identity.weights_sha256, &mine.weights_sha256),
            ("quantizer (hash of its fit)", &identity.quantizer_sha256, &mine.quantizer_sha256),
        ] {
            if expected != got {
                // Specs are short; hashes are told by their beginning.
                let (expected, got) = if what == "cache spec" {
                    (expected.clone(), got.chars().take(60).collect())
                } else {
                    (short(expected), short(got))
                };
                return Err(SessionError::Other { path: self.path.clone(), what, expected, got });
            }
        }
        Ok(())
    }

    fn damaged(&self, part: String, problem: impl Into<String>) -> SessionError {
        SessionError::Damaged { path: self.path.clone(), part, problem: problem.into() }
    }

    fn section(&self, i: usize) -> Result<Vec<u8>, SessionError> {
        let s = self.sections.get(i).ok_or_else(|| self.damaged(format!("section {i}"), "is missing"))?;
        let io = |source| SessionError::Io { path: self.path.clone(), operation: "read", source };
        let mut bytes = Vec::new();
        {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(self.starts[i])).map_err(io)?;
            // The file may have been cut since it was opened: read what there is, not what was promised.
            (&mut *file).take(s.length).read_to_end(&mut bytes).map_err(io)?;
        }
        if bytes.len() as u64 != s.length || hex(&Sha256::digest(&bytes)) != s.sha256 {
            return Err(self.damaged(format!("section {i}"), "its checksum differs"));
        }
        Ok(bytes)
    }

    /// The tokens that are stored.
    ///
    /// # Errors
    /// The file can't be read, or is damaged.
    pub fn tokens(&self) -> Result<Vec<u32>, SessionError> {
        Ok(self.section(0)?.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    /// Segment `i` for a cache like `empty`, as [`Cache::segment`] gives it. `None` where the file has none that could
    /// be shared: beyond its end, a block that is not final, or one that a window had let go.
    ///
    /// # Errors
    /// The file can't be read, is damaged, or is of another kind of cache.
    pub fn segment(&self, empty: &Cache, i: usize) -> Result<Option<Segment>, SessionError> {
        let (layers, sinks) = self.sinks(empty)?;
        let c = empty.shape.channels();
        if i == 0 {
            let whole = sinks.iter().all(|r| r.len(c) == empty.sinks);
            return Ok(whole.then(|| Segment::of_sinks(sinks)));
        }
        let column = i - 1;
        let whole = empty.sinks + (column + 1) * BLOCK_TOKENS <= self.info.tokens;
        if !whole || layers.iter().any(|dropped| *dropped > column) {
            return Ok(None);
        }
        Ok(Segment::of_blocks(empty, self.column(empty, &layers, column)?.into_iter().flatten().collect()))
    }

    fn sinks(&self, empty: &Cache) -> Result<(Vec<usize>, Vec<Rows>), SessionError> {
        if self.sections.len() != FIRST_BLOCK + columns(empty, self.info.tokens) {
            return Err(self.damaged("sections".into(), "there are not as many as the tokens need"));
        }
        let bytes = self.section(1)?;
        read_sinks(empty, &bytes, self.info.tokens).map_err(|p| self.damaged("sinks".into(), p))
    }

    fn column(
        &self,
        empty: &Cache,
        dropped: &[usize],
        i: usize,
    ) -> Result<Vec<Option<crate::block::Block>>, SessionError> {
        let bytes = self.section(FIRST_BLOCK + i)?;
        let len = (self.info.tokens - empty.sinks - i * BLOCK_TOKENS).min(BLOCK_TOKENS);
        read_column(empty, &bytes, i, len, dropped).map_err(|p| self.damaged(format!("block {i}"), p))
    }

    /// The whole cache, of the kind of `empty`. It continues bit for bit like the one that was stored.
    ///
    /// # Errors
    /// The file can't be read, is damaged, or is of another kind of cache.
    pub fn cache(&self, empty: &Cache) -> Result<Cache, SessionError> {
        let (dropped, sinks) = self.sinks(empty)?;
        let mut blocks: Vec<Vec<crate::block::Block>> = vec![Vec::new(); dropped.len()];
        for i in 0..columns(empty, self.info.tokens) {
            for (list, block) in blocks.iter_mut().zip(self.column(empty, &dropped, i)?) {
                list.extend(block);
            }
        }
        let mut layers: Vec<_> = empty.layers.iter().map(|l| l.fresh()).collect();
        for (((layer, sink), dropped), blocks) in layers.iter_mut().zip(sinks).zip(dropped).zip(blocks) {
            layer.resume(sink, dropped, blocks, self.info.tokens);
            // What falls off a window would be missed by the next query.
            if !layer.can_truncate(self.info.tokens) || !layer.is_sealed_in_order() {
                return Err(self.damaged("blocks".into(), "a layer lacks blocks that its window shows"));
            }
        }
        Ok(empty.over(layers, self.info.tokens))
    }
}
