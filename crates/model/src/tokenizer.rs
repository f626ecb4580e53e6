//! Text to ids and back, built from GGUF metadata or `tokenizer.json`.
//!
//! Byte-level BPE with the pre-tokenizers of [`pre_tokenizers`] (any other is refused by name, since a wrong split gives
//! wrong ids without an error), SentencePiece's BPE, and what a folder's `tokenizer.json` describes with a BPE model.
//! Checked id by id against an independent implementation (tests/fixtures/make_tokens.py, make_vocabs.py).
//!
//! ```text
//! text ── added tokens cut out ──▶ pieces ──┬─ pre-tokenizer's regex ──▶ words ── bytes as letters, merges ──▶ ids
//!                                           └─ spaces as U+2581, pairs by score (spm) ────────────────────────▶ ids
//! ```
//!
//! Added tokens are cut out here and not by the BPE library: control tokens only on request, so that text from outside
//! can't end a turn, and without a second copy of the vocabulary.

mod bytes;
mod json;
mod pre;
mod spm;
mod vocab;

use aho_corasick::AhoCorasick;
use tokenizers::Tokenizer as Inner;
use tokenizers::normalizers::unicode::NFC;

use crate::gguf::Gguf;
use crate::source::{Fields, Source, SourceError};
pub(crate) use json::token as json_token;
use pre::Pre;
pub use pre::pre_tokenizers;
use spm::Spm;
use vocab::{Kind, Vocab};

const PRE: &str = "tokenizer.ggml.pre";

/// Control tokens that end a turn, whatever the metadata call the end of text.
const ENDS: [&str; 7] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>"];

/// Longest run of white space, in characters. The regex engine gives up near a million, and would then take the rest of
/// the text for one word.
const MAX_SPACES: usize = 100_000;

/// A tokenizer can't be built, or text can't be tokenized.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The metadata are missing, broken or not supported.
    #[error(transparent)]
    Source(#[from] SourceError),
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

/// A token that is cut out of text before anything else.
#[derive(Debug, Clone)]
struct Added {
    id: u32,
    text: String,
    kind: Kind,
    /// Takes the white space before it along.
    left: bool,
    /// Takes the white space behind it along.
    right: bool,
}

/// Finds added tokens in text.
#[derive(Debug)]
struct Finder {
    search: AhoCorasick,
    /// By pattern.
    tokens: Vec<Added>,
}

impl Finder {
    /// Nothing when there is nothing to find.
    fn new(added: &[Added], wanted: &[Kind]) -> Result<Option<Self>, TokenizerError> {
        let tokens: Vec<Added> = added.iter().filter(|a| wanted.contains(&a.kind)).cloned().collect();
        if tokens.is_empty() {
            return Ok(None);
        }
        let search = AhoCorasick::builder()
            .match_kind(aho_corasick::MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|a| &a.text))
            .map_err(|e| library("index the added tokens")(e.into()))?;
        Ok(Some(Self { search, tokens }))
    }
}

/// What makes ids of text between added tokens.
#[derive(Debug)]
enum Words {
    /// Merges; knows nothing of added tokens. `later` is for text that does not begin, where that differs.
    Bpe { first: Box<Inner>, later: Option<Box<Inner>> },
    /// Pieces with scores.
    Spm(Spm),
}

/// Text to ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    words: Words,
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
    /// Builds the tokenizer that comes with a model.
    ///
    /// # Errors
    /// The kind of tokenizer is not supported (the error says what is), or its description is broken.
    pub fn from_source(source: &Source) -> Result<Self, TokenizerError> {
        match source {
            Source::Gguf(g) => Self::from_gguf(g),
            Source::Folder(f) => Self::from_folder(f),
        }
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// The kind of tokenizer is not supported (the error says what is), or the metadata are broken.
    pub fn from_gguf(g: &Gguf) -> Result<Self, TokenizerError> {
        const MODEL: &str = "tokenizer.ggml.model";
        let pieces = match g.str(MODEL)? {
            "gpt2" => false,
            "llama" => true,
            other => {
                return Err(g.unsupported(MODEL, other, "gpt2 (byte-level BPE), llama (SentencePiece BPE)").into());
            }
        };
        let vocab = Vocab::read(g, pieces)?;
        let (words, bytes, adds_bos) = if pieces {
            (Words::Spm(Spm::read(g, &vocab)?), vocab.piece_bytes(), true)
        } else {
            let name = g.str(PRE)?;
            let pre = Pre::find(name).ok_or_else(|| g.unsupported(PRE, name, pre_tokenizers().join(", ")))?;
            let mut bpe = Inner::new(vocab.bpe(g, pre.whole_words)?);
            bpe.with_pre_tokenizer(Some(pre.build()?));
            if pre.nfc {
                // As the model was trained.
                bpe.with_normalizer(Some(NFC));
            }
            (Words::Bpe { first: Box::new(bpe), later: None }, vocab.bytes(), pre.add_bos)
        };

        let bos = vocab.id(g, "tokenizer.ggml.bos_token_id")?;
        // Without the key: what each family was trained with.
        let add_bos = g.opt_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
        if add_bos && bos.is_none() {
            return Err(g.field("tokenizer.ggml.bos_token_id", "an id, as add_bos_token is true", "nothing").into());
        }
        let mut end_of_turn = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            end_of_turn.extend(vocab.id(g, key)?);
        }
        let mut added = vocab.added();
        if pieces && g.opt_str("general.architecture")? == Some("phi3") {
            // Files do not say it: added tokens of this family take the white space behind them along.
            const OTHERS: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];
            added.iter_mut().filter(|a| !OTHERS.contains(&a.text.as_str())).for_each(|a| a.right = true);
        }
        let ends = added.iter().filter(|a| a.kind == Kind::Control && ENDS.contains(&a.text.as_str()));
        end_of_turn.extend(ends.map(|a| a.id));
        end_of_turn.sort_unstable();
        end_of_turn.dedup();

        Ok(Self {
            user: Finder::new(&added, &[Kind::UserDefined])?,
            special: Finder::new(&added, &[Kind::UserDefined, Kind::Control])?,
            words,
            bytes,
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
        // A text begins, and begins anew after an added token.
        let (mut from, mut first) = (0, true);
        if let Some(finder) = if special { &self.special } else { &self.user } {
            for found in finder.search.find_iter(text) {
                let token = &finder.tokens[found.pattern()];
                // White space that the token before took may reach up to here.
                let before = &text[from.min(found.start())..found.start()];
                self.words(if token.left { before.trim_end() } else { before }, from == 0, &mut first, &mut ids)?;
                ids.push(token.id);
                first = true;
                from = found.end();
                if token.right {
                    from += text[from..].len() - text[from..].trim_start().len();
                }
            }
        }
        self.words(&text[from..], from == 0, &mut first, &mut ids)?;
        Ok(ids)
    }

    /// Ids of text between added tokens. `begins`: it is the beginning of all; `first`: of text after an added token.
    fn words(&self, text: &str, begins: bool, first: &mut bool, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        match &self.words {
            Words::Bpe { first, later } => {
                let bpe = later.as_ref().filter(|_| !begins).unwrap_or(first);
                ids.extend(bpe.encode_fast(text, false).map_err(library("tokenize"))?.get_ids());
            }
            Words::Spm(spm) => spm.encode(text, *first, ids),
        }
        *first = false;
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
