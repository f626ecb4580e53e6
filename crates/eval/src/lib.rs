//! Quality of a cache against the same model with an fp16 cache: perplexity, KL divergence, top-1 agreement, and the
//! bits that it took.
//!
//! A text is cut into windows of `ctx` tokens from its start; where the model expects a beginning-of-text token, it takes
//! the place of the first. Every position but the last predicts the next token of its window; so the first token is never
//! scored, and early positions have little context. All caches run side by side, chunk by chunk, so that no window's logits
//! are ever held whole.

mod agreement;
mod candidate;
mod evaluate;
mod plot;
mod report;
pub mod retrieval;
mod score;
mod simulated;

pub use agreement::{Agreement, Generation, agree, agree_on};
pub use candidate::{Candidate, Format, FormatError};
pub use evaluate::{EvalError, EvalOptions, evaluate, evaluate_on};
pub use report::{EvalResult, Report, table};
pub use simulated::{Simulation, SimulationError};
