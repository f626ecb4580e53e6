//! Tokenizer from GGUF metadata.
use crate::Gguf;
#[derive(Debug, thiserror::Error)] pub enum TokenizerError { #[error("{0}")] Invalid(String) }
pub struct Tokenizer { }
impl Tokenizer {
    pub fn from_gguf(_g: &Gguf) -> Result<Self, TokenizerError> { todo!() }
    /// `special`: whether text such as `<|im_end|>` becomes the special token. BOS is never added here.
    pub fn encode(&self, _text: &str, _special: bool) -> Result<Vec<u32>, TokenizerError> { todo!() }
    pub fn decode(&self, _ids: &[u32], _skip_special: bool) -> Result<String, TokenizerError> { todo!() }
    /// the bytes of one token (byte-level tokens may split a character)
    pub fn token_bytes(&self, _id: u32) -> Vec<u8> { todo!() }
    pub fn vocab_size(&self) -> usize { todo!() }
    pub fn bos(&self) -> Option<u32> { todo!() }
    pub fn add_bos(&self) -> bool { todo!() }
    /// Ids that end a turn: eos, eot, im_end...
    pub fn end_of_turn(&self) -> &[u32] { todo!() }
}
