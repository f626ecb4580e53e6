//! Chat messages to prompt text, by the model's own Jinja template.

use minijinja::{Environment, Error, ErrorKind, context};

use crate::gguf::{Gguf, GgufError, Value};

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
    /// The model has no template.
    #[error("{0}; use the model without a chat template (--raw)")]
    Gguf(#[from] GgufError),
    /// The template failed.
    #[error("the model's chat template, line {line}: {problem}")]
    Template {
        /// Line in the template, from 1.
        line: usize,
        /// Why.
        problem: String,
    },
}

impl From<Error> for TemplateError {
    fn from(e: Error) -> Self {
        TemplateError::Template { line: e.line().unwrap_or(0), problem: e.detail().map_or_else(|| e.to_string(), str::to_string) }
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
    /// The template of a model file.
    ///
    /// # Errors
    /// There is none, or it does not parse.
    pub fn from_gguf(g: &Gguf) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // As Hugging Face renders templates.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |m: String| -> Result<String, Error> { Err(Error::new(ErrorKind::InvalidOperation, m)) });
        environment.add_template_owned("chat", g.str("tokenizer.chat_template")?.to_string())?;
        let token = |key: &str| match (g.uint(key), g.metadata.get("tokenizer.ggml.tokens")) {
            (Ok(id), Some(Value::Strings(tokens))) => tokens.get(id as usize).cloned().unwrap_or_default(),
            _ => String::new(),
        };
        Ok(ChatTemplate {
            environment,
            bos: token("tokenizer.ggml.bos_token_id"),
            eos: token("tokenizer.ggml.eos_token_id"),
        })
    }

    /// The prompt of a chat; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// The template refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let values = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        Ok(self.environment.get_template("chat")?.render(values)?)
    }
}
