//! Chat messages to prompt text, by the model's own Jinja template, rendered as Hugging Face does: block tags take their
//! line with them, Python's string methods work, `tools` and `documents` are none.
//!
//! A template comes with the file and is as hostile as the file: it has no loader, and its steps and its output are
//! bounded.

mod clock;
mod json;

use std::io;

use minijinja::{Environment, Error, ErrorKind, context};

use crate::gguf::Gguf;
use crate::source::{Fields, Folder, Source, SourceError};
use crate::tokenizer::json_token;

const KEY: &str = "tokenizer.chat_template";
const NAME: &str = "chat";
/// Instructions of the template engine; a chat of a thousand messages takes some hundred thousand.
const MAX_STEPS: u64 = 10_000_000;
/// Bytes of output beyond those of the messages.
const MAX_GROWTH: usize = 16 << 20;

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A chat can't be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model has no template, or names tokens that it has not.
    #[error("{0}; use the model without a chat template (--raw)")]
    Source(#[from] SourceError),
    /// The template refuses the messages, with its own reason.
    #[error("the model's chat template refuses these messages (line {line}): {reason}")]
    Raised {
        /// Line in the template, from 1; 0 when it is not known.
        line: usize,
        /// What the template says.
        reason: String,
    },
    /// The template does not parse, or fails.
    #[error("the model's chat template, line {line}: {problem}; use the model without it (--raw)")]
    Template {
        /// Line in the template, from 1; 0 when it is not known.
        line: usize,
        /// Why.
        problem: String,
    },
}

/// Marks an error as the template's own words.
const RAISED: &str = "raised by the template: ";

impl From<Error> for TemplateError {
    fn from(e: Error) -> Self {
        let line = e.line().unwrap_or(0);
        let detail = e.detail().unwrap_or_default();
        if let Some(reason) = detail.strip_prefix(RAISED) {
            return Self::Raised { line, reason: reason.to_owned() };
        }
        let problem = match (e.kind(), detail) {
            (ErrorKind::WriteFailure, _) => {
                format!("its output is more than {MAX_GROWTH} bytes longer than the messages")
            }
            (kind, "") => kind.to_string(),
            (kind, detail) => format!("{kind}: {detail}"),
        };
        Self::Template { line, problem }
    }
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template that comes with a model.
    ///
    /// # Errors
    /// There is none, it does not parse, or its file is broken.
    pub fn from_source(source: &Source) -> Result<Self, TemplateError> {
        match source {
            Source::Gguf(g) => Self::from_gguf(g),
            Source::Folder(f) => Self::from_folder(f),
        }
    }

    /// The template of a folder: `chat_template.jinja`, or in `tokenizer_config.json`.
    ///
    /// # Errors
    /// There is none, it does not parse, or a file is broken.
    pub fn from_folder(folder: &Folder) -> Result<Self, TemplateError> {
        const CONFIG: &str = "tokenizer_config.json";
        let config = folder.json(CONFIG)?.unwrap_or_default();
        let stated = &config["chat_template"];
        // Some list several, one of them by the name of default.
        let named = || stated.as_array()?.iter().find(|t| t["name"] == "default")?["template"].as_str();
        let source = match folder.text("chat_template.jinja")? {
            Some(text) => Some(text),
            None => stated.as_str().or_else(named).map(str::to_owned),
        };
        let source = source.ok_or_else(|| SourceError::MissingKey {
            path: folder.folder().join(CONFIG),
            key: "chat_template".to_owned(),
        })?;
        let token = |name: &str| json_token(&config[name]).unwrap_or_default();
        Self::new(&source, token("bos_token"), token("eos_token"))
    }

    /// The template of a GGUF file.
    ///
    /// # Errors
    /// There is none, it does not parse, or the metadata are broken.
    pub fn from_gguf(g: &Gguf) -> Result<Self, TemplateError> {
        let token = |key: &str| -> Result<String, SourceError> {
            let Some(id) = g.opt_uint(key)? else { return Ok(String::new()) };
            let tokens = g.strings("tokenizer.ggml.tokens")?;
            let found = usize::try_from(id).ok().and_then(|id| tokens.get(id));
            found.cloned().ok_or_else(|| g.field(key, format!("an id below {}", tokens.len()), id.to_string()))
        };
        Self::new(g.str(KEY)?, token("tokenizer.ggml.bos_token_id")?, token("tokenizer.ggml.eos_token_id")?)
    }

    /// A template from its source; `bos` and `eos` are the texts of these tokens, or empty.
    ///
    /// # Errors
    /// The source does not parse.
    pub fn new(source: &str, bos: String, eos: String) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{reason}")))
        });
        environment.add_function("strftime_now", clock::strftime_now);
        environment.add_filter("tojson", json::tojson);
        environment.add_template_owned(NAME, source.to_owned())?;
        Ok(Self { environment, bos, eos })
    }

    /// The prompt of a chat; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// The template refuses the messages, or fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let values = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
            tools => (),
            documents => (),
        };
        let given: usize = messages.iter().map(|m| m.content.len()).sum();
        let mut out = Bounded { text: Vec::new(), left: given.saturating_add(MAX_GROWTH) };
        self.environment.get_template(NAME)?.render_captured_to(values, &mut out)?;
        String::from_utf8(out.text).map_err(|e| TemplateError::Template { line: 0, problem: e.to_string() })
    }
}

/// Collects output up to a length.
struct Bounded {
    text: Vec<u8>,
    left: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len()).ok_or_else(|| io::Error::other("too long"))?;
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
