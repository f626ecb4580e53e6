//! Text to ids and back, built from GGUF metadata.
//!
//! Byte-level BPE with the pre-tokenizers of [`PRE_TOKENIZERS`]; any other is refused by name, since a wrong split gives
//! wrong ids without an error. Checked id by id against an independent implementation (tests/fixtures/make_tokens.py).
//!
//! ```text
//! text ── added tokens cut out ──▶ pieces ── pre-tokenizer's regex ──▶ words ── bytes as letters, merges ──▶ ids
//! ```
//!
//! Added tokens are cut out here and not by the BPE library: control tokens only on request, so that text from outside
//! can't end a turn, and without a second copy of the vocabulary.

mod bytes;
mod vocab;

use aho_corasick::AhoCorasick;
use tokenizers::Tokenizer as Inner;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::gguf::{Gguf, GgufError};
use vocab::{Kind, Vocab};

/// Pre-tokenizers that are understood, as `tokenizer.ggml.pre` names them.
pub const PRE_TOKENIZERS: [&str; 4] = ["smollm", "qwen2", "gpt-2", "llama-bpe"];

const PRE: &str = "tokenizer.ggml.pre";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Control tokens that end a turn, whatever the metadata call the end of text.
const ENDS: [&str; 6] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>"];

/// Longest run of white space, in characters. The regex engine gives up near a million, and would then take the rest of
/// the text for one word.
const MAX_SPACES: usize = 100_000;

/// A tokenizer can't be built, or text can't be tokenized.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The metadata are missing, broken or not supported.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// White space without end.
    #[error("the text has {got} white-space characters in a row, at most {max} are accepted; shorten them")]
    Spaces {
        /// Characters.
        got: usize,
        /// The limit.
        max: usize,
    },
    /// The BPE library refused.
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

/// Finds added tokens in text.
#[derive(Debug)]
struct Finder {
    search: AhoCorasick,
    /// Id of every pattern.
    ids: Vec<u32>,
}

impl Finder {
    /// Nothing when there is nothing to find.
    fn new(vocab: &Vocab<'_>, wanted: &[Kind]) -> Result<Option<Self>, TokenizerError> {
        let found = || vocab.tokens.iter().zip(&vocab.kinds).zip(0u32..).filter(|((_, kind), _)| wanted.contains(kind));
        let ids: Vec<u32> = found().map(|(_, id)| id).collect();
        if ids.is_empty() {
            return Ok(None);
        }
        let search = AhoCorasick::builder()
            .match_kind(aho_corasick::MatchKind::LeftmostLongest)
            .build(found().map(|((token, _), _)| token))
            .map_err(|e| library("index the added tokens")(e.into()))?;
        Ok(Some(Self { search, ids }))
    }
}

/// Text to ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    /// Words to ids; knows nothing of added tokens.
    bpe: Inner,
    /// User-defined tokens, which are always cut out.
    user: Option<Finder>,
    /// User-defined and control tokens.
    special: Option<Finder>,
    /// Bytes of every token.
    bytes: Vec<Vec<u8>>,
    kinds: Vec<Kind>,
    bos: Option<u32>,
    add_bos: bool,
    end_of_turn: Vec<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    ///
    /// # Errors
    /// The kind of tokenizer is not supported (the error says what is), or the metadata are broken.
    pub fn from_gguf(g: &Gguf) -> Result<Self, TokenizerError> {
        const MODEL: &str = "tokenizer.ggml.model";
        match g.str(MODEL)? {
            "gpt2" => {}
            other => return Err(g.unsupported(MODEL, other, "gpt2 (byte-level BPE)").into()),
        }
        let pre = g.str(PRE)?;
        let vocab = Vocab::read(g)?;
        let mut bpe = Inner::new(vocab.bpe(g, pre == "llama-bpe")?);
        bpe.with_pre_tokenizer(Some(pre_tokenizer(g, pre)?));
        if pre == "qwen2" {
            // As the model was trained.
            bpe.with_normalizer(Some(NFC));
        }

        let bos = vocab.id(g, "tokenizer.ggml.bos_token_id")?;
        // Without the key: what each family was trained with.
        let add_bos = g.opt_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(pre == "llama-bpe");
        if add_bos && bos.is_none() {
            return Err(g.field("tokenizer.ggml.bos_token_id", "an id, as add_bos_token is true", "nothing").into());
        }
        let mut end_of_turn = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            end_of_turn.extend(vocab.id(g, key)?);
        }
        let control = vocab.tokens.iter().zip(&vocab.kinds).zip(0u32..);
        end_of_turn.extend(
            control
                .filter(|((token, kind), _)| **kind == Kind::Control && ENDS.contains(&token.as_str()))
                .map(|(_, id)| id),
        );
        end_of_turn.sort_unstable();
        end_of_turn.dedup();

        Ok(Self {
            user: Finder::new(&vocab, &[Kind::UserDefined])?,
            special: Finder::new(&vocab, &[Kind::UserDefined, Kind::Control])?,
            bpe,
            bytes: vocab.bytes(),
            bos,
            add_bos,
            end_of_turn,
            kinds: vocab.kinds,
        })
    }

    /// Ids of a text. With `special`, text such as `<|im_end|>` becomes the control token; without, it stays text. No
    /// beginning-of-text token is added. Bytes that a vocabulary lacks (SmolLM2 has no U+0004) leave no id, as in the
    /// reference implementations.
    ///
    /// # Errors
    /// White space without end; or the library refused.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let got = longest_white(text);
        if got > MAX_SPACES {
            return Err(TokenizerError::Spaces { got, max: MAX_SPACES });
        }
        let mut ids = Vec::new();
        let mut from = 0;
        if let Some(finder) = if special { &self.special } else { &self.user } {
            for found in finder.search.find_iter(text) {
                self.words(&text[from..found.start()], &mut ids)?;
                ids.push(finder.ids[found.pattern()]);
                from = found.end();
            }
        }
        self.words(&text[from..], &mut ids)?;
        Ok(ids)
    }

    fn words(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if !text.is_empty() {
            ids.extend(self.bpe.encode_fast(text, false).map_err(library("tokenize"))?.get_ids());
        }
        Ok(())
    }

    /// Text of ids; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves control tokens out. Ids beyond the
    /// vocabulary have no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let control = |id: u32| self.kinds.get(id as usize) == Some(&Kind::Control);
        let shown = ids.iter().filter(|id| !(skip_special && control(**id)));
        let bytes: Vec<u8> = shown.flat_map(|id| self.token_bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes of one token; a character may be split over several. Empty for an id beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// Number of ids.
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

    /// Ids that end a turn, ascending.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.end_of_turn
    }
}

/// Characters of the longest run of white space.
fn longest_white(text: &str) -> usize {
    let (longest, last) = text.chars().fold((0, 0), |(longest, run), ch| match ch.is_whitespace() {
        true => (longest, run + 1),
        false => (longest.max(run), 0),
    });
    longest.max(last)
}

fn pre_tokenizer(g: &Gguf, pre: &str) -> Result<PreTokenizerWrapper, TokenizerError> {
    let split = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(library("build the split"))
    };
    // Bytes as letters, with or without GPT-2's own split before it.
    let letters = |split: bool| PreTokenizerWrapper::from(ByteLevel::new(false, true, split));
    let parts = match pre {
        "smollm" => vec![Digits::new(true).into(), letters(true)],
        "qwen2" => vec![split(QWEN2)?, letters(false)],
        "gpt-2" => vec![letters(true)],
        "llama-bpe" => vec![split(LLAMA3)?, letters(false)],
        other => return Err(g.unsupported(PRE, other, PRE_TOKENIZERS.join(", ")).into()),
    };
    Ok(Sequence::new(parts).into())
}
