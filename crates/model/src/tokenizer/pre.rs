//! The splits that GGUF files name in `tokenizer.ggml.pre`.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::{TokenizerError, library};

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut into words before merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// Digits one by one, then GPT-2's own split.
    DigitsThenGpt2,
    /// GPT-2's own split.
    Gpt2,
    /// A pattern.
    Pattern(&'static str),
}

/// A way to split, and what goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pre {
    name: &'static str,
    cut: Cut,
    /// A word that is a token is taken at once, without merges.
    pub whole_words: bool,
    /// Whether a beginning-of-text token is expected where the file does not say.
    pub add_bos: bool,
    /// Text is brought to NFC first.
    pub nfc: bool,
}

const fn pre(name: &'static str, cut: Cut) -> Pre {
    Pre { name, cut, whole_words: false, add_bos: false, nfc: false }
}

const LLAMA: Pre = Pre { whole_words: true, add_bos: true, ..pre("llama-bpe", Cut::Pattern(LLAMA3)) };
const QWEN: Pre = Pre { nfc: true, ..pre("qwen2", Cut::Pattern(QWEN2)) };

const ALL: [Pre; 10] = [
    pre("smollm", Cut::DigitsThenGpt2),
    QWEN,
    pre("gpt-2", Cut::Gpt2),
    LLAMA,
    Pre { name: "llama3", ..LLAMA },
    Pre { name: "llama-v3", ..LLAMA },
    Pre { name: "deepseek-r1-qwen", ..QWEN },
    pre("dbrx", Cut::Pattern(LLAMA3)),
    pre("gpt-4o", Cut::Pattern(GPT_4O)),
    Pre { whole_words: true, ..pre("tekken", Cut::Pattern(TEKKEN)) },
];

/// The names that are understood.
pub fn pre_tokenizers() -> Vec<&'static str> {
    ALL.iter().map(|p| p.name).collect()
}

impl Pre {
    pub fn find(name: &str) -> Option<&'static Pre> {
        ALL.iter().find(|p| p.name == name)
    }

    pub fn build(&self) -> Result<PreTokenizerWrapper, TokenizerError> {
        // Bytes as letters, with or without GPT-2's own split before it.
        let letters = |split: bool| PreTokenizerWrapper::from(ByteLevel::new(false, true, split));
        let parts = match self.cut {
            Cut::DigitsThenGpt2 => vec![Digits::new(true).into(), letters(true)],
            Cut::Gpt2 => vec![letters(true)],
            Cut::Pattern(pattern) => {
                let pattern = SplitPattern::Regex(pattern.to_owned());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
                vec![split.map_err(library("build the split"))?.into(), letters(false)]
            }
        };
        Ok(Sequence::new(parts).into())
    }
}
