//! Rotary positions. One pairing everywhere: channels (2i, 2i+1) of a head turn by `position * inv_freq[i]`.
//! Families that pair (i, i + D/2) have their q and k rows permuted when they are loaded.
/// `inv_freq` has head_dim / 2 entries (0 for channels that do not turn).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope { pub inv_freq: Vec<f64> }
