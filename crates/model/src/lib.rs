//! Ids to logits, and text around them.
//!
//! ```text
//! gguf       a GGUF file: metadata and tensors           source     that, or a Hugging Face folder
//! family     what distinguishes families of models       config     what a model needs to run
//! tokenizer  text <-> ids                                template   chat messages -> prompt text
//! load       files -> Model                              forward    ids -> logits, filling a cache
//! sampling   logits -> next id                           generate   prompt -> streamed text
//! sequence   tokens after a history, on this CPU or on a device
//! stream     tokens' bytes -> text to show               identity   which weights these are
//! pull       known models by name
//! ```

pub mod config;
pub mod family;
pub mod forward;
pub mod generate;
pub mod gguf;
mod identity;
mod load;
pub mod pull;
pub mod sampling;
pub mod sequence;
pub mod source;
pub mod stream;
pub mod template;
pub mod tokenizer;
mod workspace;

pub use config::Config;
pub use forward::{ForwardError, Layer, Logits, Model, Step};
pub use gguf::Gguf;
pub use kvquant_kernels::weights::Activations;
pub use sequence::{Engine, Sequence};
pub use source::Source;
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
pub use workspace::{Stage, Workspace};
