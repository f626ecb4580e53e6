//! The GGUF container (versions 2 and 3, little-endian), read as hostile: nothing of the file is believed before
//! it is checked, and no count of the file decides how much memory is taken.
//!
//! ```text
//! magic, version, counts | metadata: key, type, value | tensor infos | padding | tensor data
//! ```
//!
//! The header is parsed at once. A tensor's data is read when it is asked for, into memory of its own: a file that
//! shrinks under a running program is then an error, where with a memory map it would be a signal.

mod read;
mod split;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kvquant_kernels::weights::{FileWeight, WeightType};

use crate::source::{Fields, SourceError};

/// A metadata value; integers and floats are widened, so that callers need not know a writer's choice of width.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// u8 to u64.
    U64(u64),
    /// i8 to i64.
    I64(i64),
    /// f32 or f64.
    F64(f64),
    /// A byte that is 0 or 1.
    Bool(bool),
    /// UTF-8.
    String(String),
    /// An array of strings.
    Strings(Vec<String>),
    /// An array of integers of any width.
    Ints(Vec<i64>),
    /// An array of floats.
    Floats(Vec<f64>),
    /// An array of bools.
    Bools(Vec<bool>),
}

impl Value {
    /// The kind, in words, for error messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::U64(_) => "an unsigned integer",
            Self::I64(_) => "a signed integer",
            Self::F64(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::String(_) => "a string",
            Self::Strings(_) => "an array of strings",
            Self::Ints(_) => "an array of integers",
            Self::Floats(_) => "an array of floats",
            Self::Bools(_) => "an array of bools",
        }
    }
}

/// Where a tensor lies and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the file.
    pub name: String,
    /// As GGUF stores them: innermost first, so a matrix is [cols, rows].
    pub dims: Vec<u64>,
    /// ggml's type id; one that is not known is refused only when the tensor is used.
    pub ty: u32,
    /// Which file of a split model holds it, from 0.
    pub part: usize,
    /// From the start of the file's tensor data, in bytes.
    pub offset: u64,
    /// Length of the data; 0 for an unknown type, whose block size nobody here knows.
    pub bytes: u64,
}

/// An open GGUF file: its metadata, its tensor table, and access to the tensors.
#[derive(Debug)]
pub struct Gguf {
    /// As given to [`Gguf::open`].
    pub path: PathBuf,
    /// Every key-value pair.
    pub metadata: BTreeMap<String, Value>,
    /// In the order of the file.
    pub tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    /// The file itself; of a split model, all its files.
    parts: Vec<Part>,
}

/// A file with tensor data.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    data_start: u64,
    file: Mutex<File>,
}

impl Gguf {
    /// Parses and checks the header and the tensor table. Of a split model, `path` is the first file; the others lie
    /// beside it.
    ///
    /// # Errors
    /// When a file can't be read, is cut short, or contradicts the format, itself or the other files.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let mut first = read::open(path)?;
        split::join(&mut first)?;
        Ok(first)
    }

    /// The table entry of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|i| self.tensors.get(*i))
    }

    /// A matrix [rows, cols], checked against the expected shape and read from the file.
    ///
    /// # Errors
    /// When the tensor is missing, of another shape, of a type that the kernels lack, or can't be read.
    pub fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<FileWeight, SourceError> {
        let info = self.shaped(name, &[cols as u64, rows as u64])?;
        let ty = self.weight_type(info)?;
        let data = self.read(info)?;
        FileWeight::new(ty, rows, cols, data).map_err(|source| SourceError::Weight {
            path: self.path.clone(),
            tensor: name.to_owned(),
            source,
        })
    }

    /// A vector of finite f32 (F32, F16 or BF16 in the file).
    ///
    /// # Errors
    /// As [`Gguf::weight`], and when an entry is not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, SourceError> {
        let info = self.shaped(name, &[len as u64])?;
        let pairs = |data: Vec<u8>, f: fn(u16) -> f32| -> Vec<f32> {
            data.chunks_exact(2).map(|b| f(u16::from_le_bytes([b[0], b[1]]))).collect()
        };
        let out: Vec<f32> = match info.ty {
            read::F32 => {
                self.read(info)?.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            read::F16 => pairs(self.read(info)?, |b| half::f16::from_bits(b).to_f32()),
            read::BF16 => pairs(self.read(info)?, |b| half::bf16::from_bits(b).to_f32()),
            ty => {
                return Err(SourceError::TensorType {
                    path: self.path.clone(),
                    tensor: name.to_owned(),
                    got: read::type_name(ty),
                    supported: "F32, F16, BF16 for a vector",
                });
            }
        };
        match out.iter().position(|v| !v.is_finite()) {
            None => Ok(out),
            Some(at) => Err(SourceError::NotFinite { path: self.path.clone(), tensor: name.to_owned(), at }),
        }
    }

    fn weight_type(&self, info: &TensorInfo) -> Result<WeightType, SourceError> {
        WeightType::from_ggml(info.ty).ok_or_else(|| SourceError::TensorType {
            path: self.path.clone(),
            tensor: info.name.clone(),
            got: read::type_name(info.ty),
            supported: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K",
        })
    }

    /// The entry of a tensor whose dims, but for trailing ones of 1, are `dims`.
    fn shaped(&self, name: &str, dims: &[u64]) -> Result<&TensorInfo, SourceError> {
        let info = self
            .tensor(name)
            .ok_or_else(|| SourceError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() })?;
        let fits = info.dims.len() >= dims.len()
            && info.dims.iter().zip(dims).all(|(a, b)| a == b)
            && info.dims[dims.len()..].iter().all(|d| *d == 1);
        if fits {
            return Ok(info);
        }
        Err(SourceError::Shape {
            path: self.path.clone(),
            tensor: name.to_owned(),
            expected: dims.iter().rev().copied().collect(),
            got: info.dims.iter().rev().copied().collect(),
        })
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, SourceError> {
        // `open` has checked that the range lies inside the file, so its length bounds the allocation.
        let mut data = vec![0; info.bytes as usize];
        // A reader that panicked leaves only a file position behind, and the seek sets it anew.
        let part = &self.parts[info.part];
        let mut file = part.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(part.data_start + info.offset))
            .and_then(|_| file.read_exact(&mut data))
            .map_err(|source| SourceError::Read { path: part.path.clone(), field: info.name.clone(), source })?;
        Ok(data)
    }
}

impl Gguf {
    /// An error about a key or tensor that breaks a rule.
    pub(crate) fn field(&self, field: &str, expected: impl AsRef<str>, got: impl AsRef<str>) -> SourceError {
        Fields::field(self, field, expected.as_ref(), got.as_ref())
    }

    /// An error about something that this program does not do.
    pub(crate) fn unsupported(&self, field: &str, got: impl AsRef<str>, supported: impl AsRef<str>) -> SourceError {
        Fields::unsupported(self, field, got.as_ref(), supported.as_ref())
    }
}

impl Fields for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }
}
