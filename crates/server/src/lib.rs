//! An OpenAI-compatible server on a compressed cache.
//!
//! ```text
//! http       requests in, events out, on tokio          api       what is asked and answered, checked
//! engine     one thread that computes: it admits by memory, mixes chunks of prompts with decode steps, samples
//! prefixes   blocks by the tokens that they hold        sessions  prefixes on disk
//! metrics    figures for Prometheus                     stats     a picture of the cache, for the page
//! load       a load test against a running server       notify    word to systemd
//! ```
//!
//! HTTP and computing meet in two places only: a job goes to the engine through a channel, and its events come back
//! through one of its own. A client that goes away drops its end; the engine sees that before its next pass and frees
//! the sequence's blocks.

pub mod api;
pub mod engine;
pub mod http;
pub mod load;
pub mod metrics;
pub mod notify;
pub mod prefixes;
pub mod sessions;
pub mod stats;

pub use engine::{Limits, Served};
pub use http::{HttpOptions, Loaded, ServeError, run, serve};
