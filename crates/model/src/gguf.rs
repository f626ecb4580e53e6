//! The GGUF container (versions 2 and 3, little-endian), read as hostile: nothing of the file is believed before
//! it is checked, and no count of the file decides how much memory is taken.
//!
//! ```text
//! magic, version, counts | metadata: key, type, value | tensor infos | padding | tensor data
//! ```
//!
//! The header is parsed at once. A tensor's data is read when it is asked for, into memory of its own: a file that
//! shrinks under a running program is then an error, where with a memory map it would be a signal.

mod error;
mod read;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kvquant_kernels::weights::{Weight, WeightType};

pub use error::GgufError;

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
    data_start: u64,
    file: Mutex<File>,
}

impl Gguf {
    /// Parses and checks the header and the tensor table.
    ///
    /// # Errors
    /// When the file can't be read, is cut short, or contradicts the format or itself.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        read::open(path)
    }

    /// The value of a key, of whatever kind.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A string.
    ///
    /// # Errors
    /// When the key is missing or of another kind; so for the accessors below.
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        self.required(key, self.opt_str(key)?)
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// When the key is missing or of another kind.
    pub fn uint(&self, key: &str) -> Result<u64, GgufError> {
        self.required(key, self.opt_uint(key)?)
    }

    /// A float.
    ///
    /// # Errors
    /// When the key is missing or of another kind.
    pub fn float(&self, key: &str) -> Result<f64, GgufError> {
        self.required(key, self.opt_float(key)?)
    }

    /// An array of strings.
    ///
    /// # Errors
    /// When the key is missing or of another kind.
    pub fn strings(&self, key: &str) -> Result<&[String], GgufError> {
        match self.required(key, self.get(key))? {
            Value::Strings(v) => Ok(v),
            other => Err(self.kind(key, "an array of strings", other)),
        }
    }

    /// A string, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind; so for the accessors below.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(self.kind(key, "a string", other)),
        }
    }

    /// A non-negative integer, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    pub fn opt_uint(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::U64(v)) => Ok(Some(*v)),
            Some(Value::I64(v)) if *v >= 0 => Ok(Some(*v as u64)),
            Some(other) => Err(self.kind(key, "a non-negative integer", other)),
        }
    }

    /// A float, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    pub fn opt_float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F64(v)) => Ok(Some(*v)),
            Some(other) => Err(self.kind(key, "a float", other)),
        }
    }

    /// A bool, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(self.kind(key, "a bool", other)),
        }
    }

    /// An array of integers, or nothing when the key is missing.
    ///
    /// # Errors
    /// When the key is of another kind.
    pub fn opt_ints(&self, key: &str) -> Result<Option<&[i64]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Ints(v)) => Ok(Some(v)),
            Some(other) => Err(self.kind(key, "an array of integers", other)),
        }
    }

    /// The table entry of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|i| self.tensors.get(*i))
    }

    /// A matrix [rows, cols], checked against the expected shape and read from the file.
    ///
    /// # Errors
    /// When the tensor is missing, of another shape, of a type that the kernels lack, or can't be read.
    pub fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, GgufError> {
        let info = self.shaped(name, &[cols as u64, rows as u64])?;
        let ty = self.weight_type(info)?;
        let data = self.read(info)?;
        Weight::from_gguf(ty, rows, cols, data).map_err(|source| GgufError::Weight {
            path: self.path.clone(),
            tensor: name.to_owned(),
            source,
        })
    }

    /// A vector of finite f32 (F32, F16 or BF16 in the file).
    ///
    /// # Errors
    /// As [`Gguf::weight`], and when an entry is not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, GgufError> {
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
                return Err(GgufError::TensorType {
                    path: self.path.clone(),
                    tensor: name.to_owned(),
                    got: read::type_name(ty),
                    supported: "F32, F16, BF16 for a vector",
                });
            }
        };
        match out.iter().position(|v| !v.is_finite()) {
            None => Ok(out),
            Some(at) => Err(GgufError::NotFinite { path: self.path.clone(), tensor: name.to_owned(), at }),
        }
    }

    fn weight_type(&self, info: &TensorInfo) -> Result<WeightType, GgufError> {
        WeightType::from_ggml(info.ty).ok_or_else(|| GgufError::TensorType {
            path: self.path.clone(),
            tensor: info.name.clone(),
            got: read::type_name(info.ty),
            supported: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K",
        })
    }

    /// The entry of a tensor whose dims, but for trailing ones of 1, are `dims`.
    fn shaped(&self, name: &str, dims: &[u64]) -> Result<&TensorInfo, GgufError> {
        let info = self
            .tensor(name)
            .ok_or_else(|| GgufError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() })?;
        let fits = info.dims.len() >= dims.len()
            && info.dims.iter().zip(dims).all(|(a, b)| a == b)
            && info.dims[dims.len()..].iter().all(|d| *d == 1);
        if fits {
            return Ok(info);
        }
        Err(GgufError::Shape {
            path: self.path.clone(),
            tensor: name.to_owned(),
            expected: dims.to_vec(),
            got: info.dims.clone(),
        })
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, GgufError> {
        // `open` has checked that the range lies inside the file, so its length bounds the allocation.
        let mut data = vec![0; info.bytes as usize];
        // A reader that panicked leaves only a file position behind, and the seek sets it anew.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.data_start + info.offset))
            .and_then(|_| file.read_exact(&mut data))
            .map_err(|source| GgufError::Read { path: self.path.clone(), field: info.name.clone(), source })?;
        Ok(data)
    }

    /// An error about a key or tensor that breaks a rule.
    pub(crate) fn field(&self, field: &str, expected: impl Into<String>, got: impl Into<String>) -> GgufError {
        GgufError::Field {
            path: self.path.clone(),
            field: field.to_owned(),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// An error about something that this program does not do.
    pub(crate) fn unsupported(&self, field: &str, got: impl Into<String>, supported: impl Into<String>) -> GgufError {
        let (field, got, supported) = (field.into(), got.into(), supported.into());
        GgufError::Unsupported { path: self.path.clone(), field, got, supported }
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, GgufError> {
        value.ok_or_else(|| GgufError::MissingKey { path: self.path.clone(), key: key.to_owned() })
    }

    fn kind(&self, key: &str, expected: &'static str, got: &Value) -> GgufError {
        GgufError::KeyType { path: self.path.clone(), key: key.to_owned(), expected, got: got.kind() }
    }
}
