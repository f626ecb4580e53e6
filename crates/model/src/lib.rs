//! Ids to logits.
pub mod gguf; pub mod tokenizer; pub mod template; pub mod config; pub mod forward; pub mod sampling; pub mod generate;
pub use forward::{Model, Step, Logits, ForwardError}; pub use tokenizer::Tokenizer; pub use template::ChatTemplate; pub use config::Config; pub use gguf::Gguf;
