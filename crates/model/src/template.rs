//! Chat template (Jinja) of the GGUF.
use crate::Gguf;
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)] pub struct Message { pub role: String, pub content: String }
#[derive(Debug, thiserror::Error)] pub enum TemplateError { #[error("{0}")] Invalid(String) }
pub struct ChatTemplate { }
impl ChatTemplate {
    pub fn from_gguf(_g: &Gguf) -> Result<Self, TemplateError> { todo!() }
    pub fn render(&self, _messages: &[Message], _add_generation_prompt: bool) -> Result<String, TemplateError> { todo!() }
}
