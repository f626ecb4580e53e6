//! What is asked and what is answered, in OpenAI's shapes.
//!
//! Everything that comes in is checked here and becomes a [`Plan`]. A field that this server does not know is refused by
//! name, and so is one that it knows and can't follow; fields that change nothing about an answer (`user`, `metadata`)
//! are taken.

mod answer;
mod body;
mod error;
mod fields;
mod request;

pub use answer::{Answer, Chunks, Kind};
pub use body::{ChatRequest, CompletionRequest, SessionRequest, TokenizeRequest, parse};
pub use error::ApiError;
pub use request::{Input, Plan};
