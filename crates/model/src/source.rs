//! A model's files, whatever their format: metadata under the file's own keys, tensors under the file's own names.
//!
//! ```text
//! a GGUF file (or the first part of a split one)          gguf
//! a Hugging Face folder: config.json, *.safetensors, ...   folder, safetensors
//! ```

mod error;
mod fields;
mod folder;
mod safetensors;

use std::path::Path;

use kvquant_kernels::weights::FileWeight;

use crate::gguf::Gguf;
pub use error::SourceError;
pub use fields::Fields;
pub use folder::Folder;

/// An open model: nothing of its weights is in memory yet.
#[derive(Debug)]
pub enum Source {
    /// A GGUF file.
    Gguf(Gguf),
    /// A Hugging Face folder.
    Folder(Folder),
}

impl Source {
    /// Opens a GGUF file or a folder with `config.json`.
    ///
    /// # Errors
    /// It can't be read, or is broken.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        if path.is_dir() { Folder::open(path).map(Self::Folder) } else { Gguf::open(path).map(Self::Gguf) }
    }

    /// The metadata: of the GGUF file, or of `config.json` with dots between the names of nested objects.
    pub fn fields(&self) -> &dyn Fields {
        match self {
            Self::Gguf(g) => g,
            Self::Folder(f) => f,
        }
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> Vec<&str> {
        match self {
            Self::Gguf(g) => g.tensors.iter().map(|t| t.name.as_str()).collect(),
            Self::Folder(f) => f.tensor_names().collect(),
        }
    }

    /// A tensor's shape, rows first.
    pub fn shape(&self, tensor: &str) -> Option<Vec<u64>> {
        match self {
            Self::Gguf(g) => g.tensor(tensor).map(|t| t.dims.iter().rev().copied().collect()),
            Self::Folder(f) => f.shape(tensor),
        }
    }

    /// A matrix `[rows, cols]`, checked against the shape and read.
    ///
    /// # Errors
    /// The tensor is missing, of another shape or of a type that the kernels lack, or can't be read.
    pub fn weight(&self, tensor: &str, rows: usize, cols: usize) -> Result<FileWeight, SourceError> {
        match self {
            Self::Gguf(g) => g.weight(tensor, rows, cols),
            Self::Folder(f) => f.weight(tensor, rows, cols),
        }
    }

    /// A vector of finite numbers.
    ///
    /// # Errors
    /// As [`Source::weight`], and when an entry is not finite.
    pub fn vector(&self, tensor: &str, len: usize) -> Result<Vec<f32>, SourceError> {
        match self {
            Self::Gguf(g) => g.vector(tensor, len),
            Self::Folder(f) => f.vector(tensor, len),
        }
    }
}
