//! Tokens and merges of a file, checked.

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::{Added, TokenizerError, bytes, library, spm};
use crate::gguf::Gguf;
use crate::source::{Fields, SourceError};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Made by merges.
    Normal,
    /// Steers the model; text becomes one only on request.
    Control,
    /// Text that always becomes this token.
    UserDefined,
    /// A byte of text that no piece has.
    Byte,
    /// Padding of the table, the unknown token: never made from text.
    Unused,
}

pub(super) struct Vocab<'a> {
    pub tokens: &'a [String],
    pub kinds: Vec<Kind>,
    /// Ids of the tokens that merges can make.
    normal: HashMap<&'a str, u32>,
}

impl<'a> Vocab<'a> {
    /// `pieces`: of SentencePiece, where some tokens are single bytes.
    pub fn read(g: &'a Gguf, pieces: bool) -> Result<Self, SourceError> {
        let tokens = g.strings(TOKENS)?;
        let types = g
            .opt_ints(TYPES)?
            .ok_or_else(|| SourceError::MissingKey { path: g.path.clone(), key: TYPES.to_owned() })?;
        if types.len() != tokens.len() {
            let expected = format!("{} entries, one for each token", tokens.len());
            return Err(g.field(TYPES, expected, types.len().to_string()));
        }
        let kinds = types.iter().zip(tokens).enumerate().map(|(id, (ty, token))| match ty {
            6 if pieces => Ok(Kind::Byte),
            1 | 6 => Ok(Kind::Normal),
            3 | 4 if token.is_empty() => {
                Err(g.field(&format!("{TOKENS}, entry {id}"), "text, as it is an added token", "nothing"))
            }
            3 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            // SentencePiece's unknown token is a control token by its nature.
            2 if pieces => Ok(Kind::Control),
            2 | 5 => Ok(Kind::Unused),
            other => Err(g.field(&format!("{TYPES}, entry {id}"), "1 to 6", other.to_string())),
        });
        let kinds = kinds.collect::<Result<Vec<_>, _>>()?;
        // One map for each way in which text finds a token.
        let mut normal = HashMap::with_capacity(tokens.len());
        let mut added = HashMap::new();
        for ((token, kind), id) in tokens.iter().zip(&kinds).zip(0u32..) {
            let before = match kind {
                Kind::Normal => normal.insert(token.as_str(), id),
                Kind::Control | Kind::UserDefined => added.insert(token.as_str(), id),
                Kind::Byte | Kind::Unused => None,
            };
            if let Some(before) = before {
                let field = format!("{TOKENS}, entry {id}");
                return Err(g.field(&field, "a token of its own", format!("{token:?}, which is entry {before} too")));
            }
        }
        Ok(Self { tokens, kinds, normal })
    }

    /// The BPE model. `whole_words`: a word that is a token is taken at once, without merges (llama 3).
    pub fn bpe(&self, g: &Gguf, whole_words: bool) -> Result<BPE, TokenizerError> {
        let merges = g.strings(MERGES)?;
        let mut seen = HashMap::with_capacity(merges.len());
        let mut pairs = Vec::with_capacity(merges.len());
        for (i, merge) in merges.iter().enumerate() {
            let bad = |expected: &str| g.field(&format!("{MERGES}, entry {i}"), expected, format!("{merge:?}"));
            let pair = merge.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' '));
            let (a, b) = pair.ok_or_else(|| bad("two tokens with a space between them"))?;
            let all = [a, b, &format!("{a}{b}")].iter().all(|t| self.normal.contains_key(*t));
            if !all {
                return Err(bad("two tokens of the vocabulary that make a third").into());
            }
            if seen.insert((a, b), i).is_some() {
                return Err(bad("a pair that has not been merged before").into());
            }
            pairs.push((a.to_owned(), b.to_owned()));
        }
        let vocab: BpeVocab = self.normal.iter().map(|(token, id)| ((*token).to_owned(), *id)).collect();
        BPE::builder()
            .vocab_and_merges(vocab, pairs)
            .ignore_merges(whole_words)
            .build()
            .map_err(library("build the vocabulary"))
    }

    /// An id that the metadata name, if they do.
    pub fn id(&self, g: &Gguf, key: &str) -> Result<Option<u32>, SourceError> {
        match g.opt_uint(key)? {
            None => Ok(None),
            Some(id) if id < self.tokens.len() as u64 => Ok(Some(id as u32)),
            Some(id) => Err(g.field(key, format!("an id below {}", self.tokens.len()), id.to_string())),
        }
    }

    /// Control and user-defined tokens.
    pub fn added(&self) -> Vec<Added> {
        let all = self.tokens.iter().zip(&self.kinds).zip(0u32..);
        all.filter(|((_, kind), _)| matches!(kind, Kind::Control | Kind::UserDefined))
            .map(|((text, kind), id)| Added { id, text: text.clone(), kind: *kind, left: false, right: false })
            .collect()
    }

    /// Bytes of every piece: with spaces, of byte tokens the byte, of others as they are.
    pub fn piece_bytes(&self) -> Vec<Vec<u8>> {
        let one = |(token, kind): (&String, &Kind)| match (kind, spm::byte(token)) {
            (Kind::Byte, Some(byte)) => vec![byte],
            (Kind::Normal | Kind::UserDefined, _) => token.replace(spm::SPACE, " ").into_bytes(),
            _ => token.as_bytes().to_vec(),
        };
        self.tokens.iter().zip(&self.kinds).map(one).collect()
    }

    /// Bytes of every token: of normal ones by their letters, of others as they are.
    pub fn bytes(&self) -> Vec<Vec<u8>> {
        let one = |(token, kind): (&String, &Kind)| match kind {
            Kind::Normal => {
                let mut out = Vec::with_capacity(token.len());
                bytes::from_letters(token, &mut out);
                out
            }
            _ => token.as_bytes().to_vec(),
        };
        self.tokens.iter().zip(&self.kinds).map(one).collect()
    }
}
