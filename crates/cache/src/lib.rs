//! The compressed history of one sequence: blocks of packed codes, sinks, recent window, exact byte accounting.
//!
//! ```text
//! position   0 .. sinks | sinks .. sinks+64 | .. +64 | ...            | len
//! a layer    sink rows  | block 0           | block 1| ... open block |
//!            fp16       | codes             | codes  | codes, or fp16 rows while in the recent window
//! ```
//!
//! A block holds 64 tokens of one layer, all KV heads, keys and values. It owns its codes, per-token scales and
//! outliers, so that an append never moves older data and a rollback is a truncation. What the cache holds
//! depends on the tokens alone, not on how they were split into calls.
//!
//! A layer that attends to a window only lets whole blocks fall off its front once no query can see them (`trim`, at the
//! end of a forward pass); its sinks go with them. `edge` attends to the block in which a window begins.
//!
//! Blocks are reference counted: `sharing` lets sequences with a common beginning hold the same ones, and the block that
//! a sequence writes to is copied first when others hold it.
//!
//! `online` makes the quantizers of a layer from its own tokens, where there is no calibration.
//!
//! `session` stores a cache as a file, blocks as they are.
//!
//! `attend` is the way from the model to the kernels: it turns queries to their positions, splits the work over
//! KV heads, query rows and runs of blocks, and merges the partial states.

mod attend;
mod block;
mod bytes;
mod coded;
mod edge;
mod error;
mod layer;
mod online;
mod scratch;
mod sequence;
mod session;
mod sharing;
mod transform;
mod turns;

pub use bytes::Bytes;
pub use error::CacheError;
pub use sequence::{Cache, CacheShape, LayerAttention, Prefill};
pub use session::{SessionError, SessionFile, SessionIdentity, SessionInfo, save_session};
pub use sharing::Segment;
