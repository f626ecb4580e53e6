//! SentencePiece's BPE as GGUF files have it: pieces with scores and no list of merges. Spaces are written as U+2581;
//! of all neighbours that make a piece, the pair with the highest score is joined first (the leftmost of equals); what
//! is no piece in the end becomes byte tokens.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::vocab::{Kind, Vocab};
use crate::gguf::{Gguf, Value};
use crate::source::{Fields, SourceError};

const SCORES: &str = "tokenizer.ggml.scores";
/// What a space is written as.
pub(super) const SPACE: &str = "\u{2581}";

/// Pieces by text, with scores.
#[derive(Debug)]
pub(super) struct Spm {
    pieces: HashMap<Box<str>, (u32, f32)>,
    bytes: Box<[u32; 256]>,
    /// Text that begins, or follows an added token, gets a space before it.
    prefix: bool,
}

/// Two neighbours that make a piece.
#[derive(Debug, PartialEq)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both when they were found.
    len: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A piece of the text under way: a range of bytes, and its neighbours; empty when it was joined to the one before.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    before: usize,
    after: usize,
}

const NONE: usize = usize::MAX;

impl Spm {
    pub fn read(g: &Gguf, vocab: &Vocab<'_>) -> Result<Self, SourceError> {
        let scores = match g.get(SCORES) {
            Some(Value::Floats(v)) if v.len() == vocab.tokens.len() => v,
            Some(Value::Floats(v)) => {
                let expected = format!("{} entries, one for each token", vocab.tokens.len());
                return Err(g.field(SCORES, expected, v.len().to_string()));
            }
            Some(other) => return Err(g.field(SCORES, "an array of floats", other.kind())),
            None => return Err(SourceError::MissingKey { path: g.path.clone(), key: SCORES.to_owned() }),
        };
        let mut pieces = HashMap::with_capacity(vocab.tokens.len());
        let mut bytes = Box::new([u32::MAX; 256]);
        for (((token, kind), score), id) in vocab.tokens.iter().zip(&vocab.kinds).zip(scores).zip(0u32..) {
            match kind {
                Kind::Byte => {
                    let byte = byte(token).ok_or_else(|| {
                        let field = format!("tokenizer.ggml.tokens, entry {id}");
                        g.field(&field, "a byte as <0x00> to <0xFF>", format!("{token:?}"))
                    })?;
                    bytes[usize::from(byte)] = id;
                }
                Kind::Normal | Kind::UserDefined => {
                    pieces.insert(token.as_str().into(), (id, *score as f32));
                }
                Kind::Control | Kind::Unused => {}
            }
        }
        if let Some(missing) = bytes.iter().position(|id| *id == u32::MAX) {
            return Err(g.field("tokenizer.ggml.tokens", "a token for every byte", format!("none for {missing:#04x}")));
        }
        Ok(Self { pieces, bytes, prefix: g.opt_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) })
    }

    /// Ids of a text between added tokens; `first`: it begins, or follows one.
    pub fn encode(&self, text: &str, first: bool, ids: &mut Vec<u32>) {
        let mut spelled = if self.prefix && first { SPACE.to_owned() } else { String::new() };
        spelled.push_str(&text.replace(' ', SPACE));
        let mut symbols: Vec<Symbol> = spelled
            .char_indices()
            .enumerate()
            .map(|(i, (start, ch))| Symbol {
                start,
                len: ch.len_utf8(),
                before: i.checked_sub(1).unwrap_or(NONE),
                after: i + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.after = NONE;
        }
        let mut queue = BinaryHeap::new();
        let find = |symbols: &[Symbol], left: usize, right: usize| {
            let (a, b) = (symbols.get(left)?, symbols.get(right)?);
            let (_, score) = self.pieces.get(&spelled[a.start..a.start + a.len + b.len])?;
            Some(Pair { score: *score, left, right, len: a.len + b.len })
        };
        queue.extend((1..symbols.len()).filter_map(|i| find(&symbols, i - 1, i)));
        while let Some(Pair { left, right, len, .. }) = queue.pop() {
            let (a, b) = (symbols[left], symbols[right]);
            // One of them may have been joined to another since.
            if a.len == 0 || b.len == 0 || a.len + b.len != len {
                continue;
            }
            symbols[left] = Symbol { len, after: b.after, ..a };
            symbols[right].len = 0;
            if let Some(next) = symbols.get_mut(b.after) {
                next.before = left;
            }
            queue.extend(find(&symbols, a.before, left));
            queue.extend(find(&symbols, left, b.after));
        }
        for s in symbols.iter().filter(|s| s.len > 0) {
            let piece = &spelled[s.start..s.start + s.len];
            match self.pieces.get(piece) {
                Some((id, _)) => ids.push(*id),
                None => ids.extend(piece.bytes().map(|b| self.bytes[usize::from(b)])),
            }
        }
    }
}

/// The byte of `<0xAB>`.
pub(super) fn byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}
