//! What can be wrong with a model's files.

use std::io;
use std::path::PathBuf;

use kvquant_kernels::weights::WeightError;

/// A model file can't be used; each variant names the file, the field and, where there is one, the way out.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file is missing or can't be opened.
    #[error("{path}: can't open the model file: {source}; check the path and its permissions, or fetch a known model with `kvquant pull`", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Reading failed where the file's length had promised data.
    #[error("{path}: reading {field}: {source}; the file changed or its disk failed: fetch it again", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Key or tensor that was read.
        field: String,
        /// Why.
        source: io::Error,
    },
    /// The file does not begin with `GGUF`.
    #[error("{path}: not a GGUF file (it begins with {got:02x?}, expected the letters GGUF); convert the model to GGUF first", path = .path.display())]
    Magic {
        /// The file.
        path: PathBuf,
        /// The first four bytes.
        got: [u8; 4],
    },
    /// A version that is not read.
    #[error("{path}: GGUF version {got}{hint}; versions 2 and 3, little-endian, are read: convert the model again", path = .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version field.
        got: u32,
        /// What it looks like, or nothing.
        hint: &'static str,
    },
    /// A field needs more bytes than the file has left.
    #[error("{path}: {field} needs {needed} bytes, {left} are left; the file is cut short or damaged: fetch it again", path = .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What was being read.
        field: String,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes from its start to the end of the file.
        left: u64,
    },
    /// A JSON file does not parse.
    #[error("{path}: not the JSON that it should be: {source}; fetch the file again", path = .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A count or length is beyond what any sound file has.
    #[error("{path}: {field} is {got}, at most {max} is accepted; the file is damaged or not meant for this program", path = .path.display())]
    Cap {
        /// The file.
        path: PathBuf,
        /// Which count.
        field: String,
        /// Its value.
        got: u64,
        /// The cap.
        max: u64,
    },
    /// A key or a tensor name occurs twice.
    #[error("{path}: {what} {name:?} occurs twice; the file is damaged: fetch or convert it again", path = .path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// Metadata key or tensor.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A field breaks a rule of the format, or contradicts another one.
    #[error("{path}: {field}: got {got}, expected {expected}; fetch or convert the file again", path = .path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Key or tensor, and which of its parts.
        field: String,
        /// What would do.
        expected: String,
        /// What is there.
        got: String,
    },
    /// The model needs something that is not implemented.
    #[error("{path}: {field} = {got} is not supported; supported: {supported}", path = .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Metadata key.
        field: String,
        /// Its value.
        got: String,
        /// What would do.
        supported: String,
    },
    /// A metadata key that is needed is missing.
    #[error("{path}: metadata key {key} is missing; fetch the model again, or convert it with a current converter", path = .path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata value is of another kind.
    #[error("{path}: metadata key {key} is {got}, expected {expected}; fetch or convert the model again", path = .path.display())]
    KeyType {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The kind it should have.
        expected: &'static str,
        /// The kind it has.
        got: &'static str,
    },
    /// A tensor that is needed is missing.
    #[error("{path}: tensor {tensor} is missing; the file is incomplete (one part of a split model?) or of another architecture", path = .path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor's shape is not what the metadata promise.
    #[error("{path}: tensor {tensor} has shape {got:?}, the metadata promise {expected:?}; the file contradicts itself: fetch or convert it again", path = .path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// By the metadata, rows first.
        expected: Vec<u64>,
        /// In the file.
        got: Vec<u64>,
    },
    /// A tensor's type has no kernel.
    #[error("{path}: tensor {tensor} is of type {got}; supported: {supported}: use another quantization of the model", path = .path.display())]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        got: String,
        /// Types that would do.
        supported: &'static str,
    },
    /// A vector holds NaN or infinity.
    #[error("{path}: tensor {tensor} is not finite at entry {at}; the weights are broken: fetch or convert the file again", path = .path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first such entry.
        at: usize,
    },
    /// The kernels refuse a tensor's data.
    #[error("{path}: tensor {tensor}: {source}", path = .path.display())]
    Weight {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why.
        source: WeightError,
    },
}
