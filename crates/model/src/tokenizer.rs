//! Text to ids and back, built from GGUF metadata.
//!
//! Byte-level BPE with the pre-tokenizers listed in [`PRE_TOKENIZERS`]; others are refused by name, since a wrong split
//! gives wrong ids without an error. No beginning-of-text token is added here.

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::gguf::{Gguf, GgufError, Value};

/// Pre-tokenizers that are understood, as `tokenizer.ggml.pre` names them.
pub const PRE_TOKENIZERS: [&str; 4] = ["smollm", "qwen2", "gpt-2", "llama-bpe"];

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer can't be built, or text can't be tokenized.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The metadata are missing, broken or not supported.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The tokenizer library refused.
    #[error("tokenizer: cannot {operation}: {problem}")]
    Library {
        /// What was tried.
        operation: &'static str,
        /// The library's words.
        problem: String,
    },
}

fn library(operation: &'static str) -> impl Fn(tokenizers::Error) -> TokenizerError {
    move |e| TokenizerError::Library { operation, problem: e.to_string() }
}

/// Text to ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    /// Takes special tokens in text as such.
    special: Inner,
    /// Takes them as plain text.
    plain: Inner,
    /// Bytes of every token.
    bytes: Vec<Vec<u8>>,
    is_control: Vec<bool>,
    bos: Option<u32>,
    add_bos: bool,
    end_of_turn: Vec<u32>,
}

/// GGUF token types.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    ///
    /// # Errors
    /// The kind of tokenizer is not supported (the error says what is), or the metadata are broken.
    pub fn from_gguf(g: &Gguf) -> Result<Self, TokenizerError> {
        let model = g.str("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(g.unsupported("tokenizer.ggml.model", format!("`{model}`"), "gpt2 (byte-level BPE)").into());
        }
        let pre = if g.metadata.contains_key("tokenizer.ggml.pre") { g.str("tokenizer.ggml.pre")? } else { "gpt-2" };
        let tokens = g.strings("tokenizer.ggml.tokens")?;
        let types = match g.metadata.get("tokenizer.ggml.token_type") {
            Some(Value::Ints(t)) if t.len() == tokens.len() => t.clone(),
            None => vec![1; tokens.len()],
            Some(_) => return Err(g.field("tokenizer.ggml.token_type", "is no list of a number per token").into()),
        };
        let mut vocab = ahash_map(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if vocab.insert(token.clone(), id as u32).is_some() {
                return Err(g.field("tokenizer.ggml.tokens", format!("`{token}` stands twice")).into());
            }
        }
        let merges = g
            .strings("tokenizer.ggml.merges")?
            .iter()
            .map(|m| {
                // A token may begin with a space only in its byte form, so the first space separates.
                m.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()))
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| g.field("tokenizer.ggml.merges", "holds an entry that is not two tokens"))?;
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(library("build the vocabulary"))?;
        let mut plain = Inner::new(bpe);
        plain.with_pre_tokenizer(Some(pre_tokenizer(g, pre)?));
        plain.with_decoder(Some(ByteLevel::default()));
        if pre == "qwen2" {
            plain.with_normalizer(Some(NFC));
        }
        let added = |special: bool| {
            let of = if special { CONTROL } else { USER_DEFINED };
            let chosen = tokens.iter().zip(&types).filter(move |(_, t)| **t == of);
            chosen.map(move |(t, _)| AddedToken::from(t.clone(), special).normalized(false)).collect::<Vec<_>>()
        };
        plain.add_tokens(&added(false));
        let mut special = plain.clone();
        special.add_special_tokens(&added(true));
        let id = |key: &str| match g.uint(key) {
            Ok(id) if (id as usize) < tokens.len() => Ok(Some(id as u32)),
            Ok(id) => Err(g.field(key, format!("is {id}, beyond {} tokens", tokens.len()))),
            Err(_) if !g.metadata.contains_key(key) => Ok(None),
            Err(e) => Err(e),
        };
        let mut end_of_turn: Vec<u32> = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            end_of_turn.extend(id(key)?);
        }
        const ENDS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>"];
        end_of_turn.extend((0..tokens.len()).filter(|&i| types[i] == CONTROL && ENDS.contains(&tokens[i].as_str())).map(|i| i as u32));
        end_of_turn.sort();
        end_of_turn.dedup();
        let bytes = tokens.iter().zip(&types).map(|(t, ty)| token_bytes(t, matches!(*ty, CONTROL | USER_DEFINED))).collect();
        Ok(Tokenizer {
            special,
            plain,
            bytes,
            is_control: types.iter().map(|t| *t == CONTROL).collect(),
            bos: id("tokenizer.ggml.bos_token_id")?,
            add_bos: matches!(g.metadata.get("tokenizer.ggml.add_bos_token"), Some(Value::Bool(true))),
            end_of_turn,
        })
    }

    /// Ids of a text. With `special`, text such as `<|im_end|>` becomes the control token; without, it stays text.
    ///
    /// # Errors
    /// The library refused.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let inner = if special { &self.special } else { &self.plain };
        Ok(inner.encode_fast(text, false).map_err(library("tokenize"))?.get_ids().to_vec())
    }

    /// Text of ids; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|id| !(skip_special && self.is_control.get(**id as usize).copied().unwrap_or(true)))
            .flat_map(|id| self.token_bytes(*id))
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes of one token; a character may be split over several. Empty for unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The beginning-of-text token, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the model expects it before a prompt.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Ids that end an answer.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.end_of_turn
    }
}

fn ahash_map(n: usize) -> tokenizers::models::bpe::Vocab {
    let mut map = tokenizers::models::bpe::Vocab::default();
    map.reserve(n);
    map
}

fn pre_tokenizer(g: &Gguf, pre: &str) -> Result<PreTokenizerWrapper, TokenizerError> {
    let split = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.into());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::from).map_err(library("build the split"))
    };
    // Byte-level mapping, with or without GPT-2's own split.
    let bytes = |regex: bool| PreTokenizerWrapper::from(ByteLevel::new(false, true, regex));
    let parts = match pre {
        "smollm" => vec![Digits::new(true).into(), bytes(true)],
        "qwen2" => vec![split(QWEN2)?, bytes(false)],
        "gpt-2" | "default" => vec![bytes(true)],
        "llama-bpe" | "llama3" => vec![split(LLAMA3)?, bytes(false)],
        other => return Err(g.unsupported("tokenizer.ggml.pre", format!("`{other}`"), PRE_TOKENIZERS.join(", ")).into()),
    };
    Ok(Sequence::new(parts).into())
}

/// Byte-level tokens spell each byte as a printable character: printable ones as themselves, the others in order from
/// U+0100 on (GPT-2). Added tokens are plain text.
fn token_bytes(token: &str, added: bool) -> Vec<u8> {
    if added {
        return token.as_bytes().to_vec();
    }
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others: Vec<u8> = (0..=255u8).filter(|b| !printable(*b)).collect();
    let mut bytes = Vec::with_capacity(token.len());
    for ch in token.chars() {
        match ch as u32 {
            c if c < 256 && printable(c as u8) => bytes.push(c as u8),
            c if (256..256 + others.len() as u32).contains(&c) => bytes.push(others[c as usize - 256]),
            _ => bytes.extend_from_slice(ch.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    #[test]
    fn byte_characters_map_back() {
        assert_eq!(super::token_bytes("Ġa", false), b" a");
        assert_eq!(super::token_bytes("Ċ", false), b"\n");
        assert_eq!(super::token_bytes("Ã©", false), "é".as_bytes());
        assert_eq!(super::token_bytes("<|im_end|>", true), b"<|im_end|>");
    }
}
