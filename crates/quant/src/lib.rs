//! Vectors to codes: cache specs, codebooks, outliers, key and value quantizers, packing, the quantizer file.
mod spec; mod quantizer; mod file; pub mod pack;
pub use spec::*; pub use quantizer::*; pub use file::*;
