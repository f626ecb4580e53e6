//! What a thread works in, kept from call to call: a decode step allocates only what the cache grows by.

use std::cell::Cell;

use crate::attend::Room;

/// Buffers of one call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Queries, keys and values of a layer with a transform.
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub attention: Attention,
}

/// What storing and attending takes of it.
#[derive(Debug, Default)]
pub(crate) struct Attention {
    /// Keys that are kept turned.
    pub turned: Vec<f32>,
    pub queries: Vec<f32>,
    pub room: Room,
}

thread_local! {
    // Taken while in use: a call for another sequence may run on this thread meanwhile.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Lends this thread's buffers, whose content is left over from before.
pub(crate) fn with<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take();
    let result = f(&mut scratch);
    SCRATCH.set(scratch);
    result
}
