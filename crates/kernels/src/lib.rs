//! Codes to partial attention, and weights to products.
pub mod weights; pub mod rope; pub mod linalg;
