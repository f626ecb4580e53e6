//! The GGUF container: metadata and tensors of a model, read as hostile.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 entries | entries: key, type, value | tensors: name, dims, type, offset
//! | padding to the alignment | data
//! ```
//!
//! Nothing is allocated on the word of a count: strings and arrays must fit into what is left of the file. Tensors
//! must lie inside the file and must not overlap. Their data is read when it is asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use kvquant_kernels::weights::{Weight, WeightType};

/// A metadata value; numbers are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    U64(u64),
    /// Any signed integer.
    I64(i64),
    /// f32 or f64.
    F64(f64),
    /// true or false.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Array of texts.
    Strings(Vec<String>),
    /// Array of integers.
    Ints(Vec<i64>),
    /// Array of floats.
    Floats(Vec<f64>),
    /// Array of booleans.
    Bools(Vec<bool>),
}

/// Where a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Innermost first, as GGUF stores them.
    pub dims: Vec<u64>,
    /// GGUF type number.
    pub ty: u32,
    /// From the start of the file.
    pub offset: u64,
    /// Length of the data; 0 where the type is unknown.
    pub bytes: u64,
}

/// A GGUF file can't be read or used.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file system said no.
    #[error("{path}: cannot read: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The content is broken.
    #[error("{path}: {field}: {problem}; the file is broken or cut short: get it again, for a known model with `kvquant pull`")]
    Broken {
        /// The file.
        path: PathBuf,
        /// Where in it.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// A sound file that this program does not run.
    #[error("{path}: {field} is {got}; supported: {supported}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Which entry.
        field: String,
        /// What it says.
        got: String,
        /// What would do.
        supported: String,
    },
    /// An entry or tensor that must be there is not, or has another type or shape.
    #[error("{path}: {field}: {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Which entry or tensor.
        field: String,
        /// What is wrong.
        problem: String,
    },
}

/// More metadata entries or tensors than any model has.
const MOST_ENTRIES: u64 = 1 << 16;
/// Longest key or tensor name.
const MOST_NAME: u64 = 1 << 16;

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    /// The file.
    pub path: PathBuf,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the file's order.
    pub tensors: Vec<TensorInfo>,
}

struct Reader<'a> {
    path: &'a Path,
    file: BufReader<File>,
    at: u64,
    size: u64,
}

impl Reader<'_> {
    fn broken(&self, field: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Broken { path: self.path.into(), field: field.into(), problem: problem.into() }
    }

    fn bytes<const N: usize>(&mut self, field: &str) -> Result<[u8; N], GgufError> {
        let mut b = [0; N];
        self.fill(field, &mut b)?;
        Ok(b)
    }

    fn fill(&mut self, field: &str, to: &mut [u8]) -> Result<(), GgufError> {
        if to.len() as u64 > self.size - self.at {
            return Err(self.broken(field, format!("the file ends at byte {}", self.size)));
        }
        self.file.read_exact(to).map_err(|source| GgufError::Io { path: self.path.into(), source })?;
        self.at += to.len() as u64;
        Ok(())
    }

    fn u32(&mut self, field: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.bytes(field)?))
    }

    fn u64(&mut self, field: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.bytes(field)?))
    }

    fn string(&mut self, field: &str, most: u64) -> Result<String, GgufError> {
        let n = self.u64(field)?;
        if n > most || n > self.size - self.at {
            return Err(self.broken(field, format!("a text of {n} bytes")));
        }
        let mut b = vec![0; n as usize];
        self.fill(field, &mut b)?;
        String::from_utf8(b).map_err(|_| self.broken(field, "a text that is not UTF-8"))
    }

    fn value(&mut self, field: &str, ty: u32) -> Result<Value, GgufError> {
        Ok(match ty {
            0 => Value::U64(self.bytes::<1>(field)?[0] as u64),
            1 => Value::I64(self.bytes::<1>(field)?[0] as i8 as i64),
            2 => Value::U64(u16::from_le_bytes(self.bytes(field)?) as u64),
            3 => Value::I64(i16::from_le_bytes(self.bytes(field)?) as i64),
            4 => Value::U64(self.u32(field)? as u64),
            5 => Value::I64(self.u32(field)? as i32 as i64),
            6 => Value::F64(f32::from_le_bytes(self.bytes(field)?) as f64),
            7 => Value::Bool(self.bytes::<1>(field)?[0] != 0),
            8 => Value::String(self.string(field, u64::MAX)?),
            9 => self.array(field)?,
            10 => Value::U64(self.u64(field)?),
            11 => Value::I64(self.u64(field)? as i64),
            12 => Value::F64(f64::from_le_bytes(self.bytes(field)?)),
            _ => return Err(self.broken(field, format!("unknown value type {ty}"))),
        })
    }

    fn array(&mut self, field: &str) -> Result<Value, GgufError> {
        let (ty, n) = (self.u32(field)?, self.u64(field)?);
        let least = match ty {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => return Err(self.broken(field, format!("an array of type {ty}"))),
        };
        if n.checked_mul(least).is_none_or(|b| b > self.size - self.at) {
            return Err(self.broken(field, format!("an array of {n} entries")));
        }
        Ok(match ty {
            8 => Value::Strings((0..n).map(|_| self.string(field, u64::MAX)).collect::<Result<_, _>>()?),
            7 => Value::Bools((0..n).map(|_| Ok(self.bytes::<1>(field)?[0] != 0)).collect::<Result<_, GgufError>>()?),
            6 | 12 => Value::Floats(
                (0..n)
                    .map(|_| match self.value(field, ty)? {
                        Value::F64(x) => Ok(x),
                        _ => Err(self.broken(field, "mixed types")),
                    })
                    .collect::<Result<_, GgufError>>()?,
            ),
            _ => Value::Ints(
                (0..n)
                    .map(|_| match self.value(field, ty)? {
                        Value::U64(x) => Ok(x as i64),
                        Value::I64(x) => Ok(x),
                        _ => Err(self.broken(field, "mixed types")),
                    })
                    .collect::<Result<_, GgufError>>()?,
            ),
        })
    }

    fn tensor(&mut self, i: u64) -> Result<TensorInfo, GgufError> {
        let name = self.string(&format!("name of tensor {i}"), MOST_NAME)?;
        let field = format!("tensor {name}");
        let n = self.u32(&field)?;
        if n == 0 || n > 4 {
            return Err(self.broken(&field, format!("{n} dimensions")));
        }
        let dims = (0..n).map(|_| self.u64(&field)).collect::<Result<Vec<_>, _>>()?;
        let elements = dims.iter().try_fold(1u64, |a, &b| a.checked_mul(b)).filter(|&e| e > 0 && e < 1 << 48);
        let elements = elements.ok_or_else(|| self.broken(&field, format!("dimensions {dims:?}")))?;
        let (ty, offset) = (self.u32(&field)?, self.u64(&field)?);
        let bytes = match WeightType::from_ggml(ty) {
            Some(t) => {
                let (weights, bytes) = (t.block().0 as u64, t.block().1 as u64);
                if !dims[0].is_multiple_of(weights) {
                    return Err(self.broken(&field, format!("rows of {} are no whole blocks of {}", dims[0], t.name())));
                }
                elements / weights * bytes
            }
            None => 0,
        };
        Ok(TensorInfo { name, dims, ty, offset, bytes })
    }
}

impl Gguf {
    /// Opens a file and checks all of it but the tensors' data.
    ///
    /// # Errors
    /// It can't be read, is no GGUF, or contradicts itself.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let io = |source| GgufError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        if !about.is_file() {
            let source = std::io::Error::other("not a file; MODEL is a GGUF file or the name of a known model");
            return Err(GgufError::Io { path: path.into(), source });
        }
        let mut r = Reader { path, file: BufReader::new(file), at: 0, size: about.len() };
        if r.bytes::<4>("magic")? != *b"GGUF" {
            return Err(r.broken("magic", "not a GGUF file"));
        }
        let version = r.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Unsupported {
                path: path.into(),
                field: "version".into(),
                got: version.to_string(),
                supported: "2 and 3, little-endian".into(),
            });
        }
        let (tensors, entries) = (r.u64("tensor count")?, r.u64("metadata count")?);
        for (field, n) in [("tensor count", tensors), ("metadata count", entries)] {
            if n > MOST_ENTRIES {
                return Err(r.broken(field, format!("{n}, more than {MOST_ENTRIES}")));
            }
        }
        let mut metadata = BTreeMap::new();
        for i in 0..entries {
            let key = r.string(&format!("metadata key {i}"), MOST_NAME)?;
            let ty = r.u32(&key)?;
            let value = r.value(&key, ty)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(r.broken(&key, "stands twice"));
            }
        }
        let mut infos = (0..tensors).map(|i| r.tensor(i)).collect::<Result<Vec<_>, _>>()?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::U64(a)) if a.is_power_of_two() && *a <= 1 << 20 => *a,
            Some(other) => return Err(r.broken("general.alignment", format!("{other:?}, not a power of two"))),
        };
        let data = r.at.next_multiple_of(alignment);
        let mut names = std::collections::BTreeSet::new();
        let mut spans = Vec::new();
        for t in &mut infos {
            let field = format!("tensor {}", t.name);
            if !names.insert(t.name.clone()) {
                return Err(r.broken(&field, "stands twice"));
            }
            if !t.offset.is_multiple_of(alignment) {
                return Err(r.broken(&field, format!("offset {} is not aligned to {alignment}", t.offset)));
            }
            let end = data.checked_add(t.offset).and_then(|o| o.checked_add(t.bytes)).filter(|e| *e <= r.size);
            let Some(end) = end else {
                return Err(r.broken(&field, format!("its {} bytes lie beyond the file's {}", t.bytes, r.size)));
            };
            t.offset += data;
            spans.push((t.offset, end, &t.name));
        }
        spans.sort();
        if let Some(w) = spans.windows(2).find(|w| w[0].1 > w[1].0) {
            return Err(r.broken(&format!("tensor {}", w[1].2), format!("overlaps {}", w[0].2)));
        }
        Ok(Gguf { path: path.into(), metadata, tensors: infos })
    }

    /// An error about an entry or tensor.
    pub(crate) fn field(&self, field: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Field { path: self.path.clone(), field: field.into(), problem: problem.into() }
    }

    /// An error about something that this program does not do.
    pub(crate) fn unsupported(&self, field: &str, got: impl Into<String>, supported: impl Into<String>) -> GgufError {
        GgufError::Unsupported { path: self.path.clone(), field: field.into(), got: got.into(), supported: supported.into() }
    }

    fn need(&self, key: &str) -> Result<&Value, GgufError> {
        self.metadata.get(key).ok_or_else(|| self.field(key, "is missing"))
    }

    /// A text.
    ///
    /// # Errors
    /// Missing, or not a text.
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        match self.need(key)? {
            Value::String(s) => Ok(s),
            _ => Err(self.field(key, "is not a text")),
        }
    }

    /// A number that is not negative.
    ///
    /// # Errors
    /// Missing, or no such number.
    pub fn uint(&self, key: &str) -> Result<u64, GgufError> {
        match self.need(key)? {
            Value::U64(x) => Ok(*x),
            Value::I64(x) if *x >= 0 => Ok(*x as u64),
            _ => Err(self.field(key, "is not a whole number")),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// Missing, or no such number.
    pub fn float(&self, key: &str) -> Result<f64, GgufError> {
        match self.need(key)? {
            Value::F64(x) if x.is_finite() => Ok(*x),
            Value::U64(x) => Ok(*x as f64),
            _ => Err(self.field(key, "is not a finite number")),
        }
    }

    /// An array of texts.
    ///
    /// # Errors
    /// Missing, or something else.
    pub fn strings(&self, key: &str) -> Result<&[String], GgufError> {
        match self.need(key)? {
            Value::Strings(s) => Ok(s),
            _ => Err(self.field(key, "is not a list of texts")),
        }
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    fn read(&self, name: &str, dims: &[u64]) -> Result<(WeightType, Vec<u8>), GgufError> {
        let field = format!("tensor {name}");
        let t = self.tensor(name).ok_or_else(|| self.field(&field, "is missing"))?;
        if t.dims != dims {
            return Err(self.field(&field, format!("has dimensions {:?}, the metadata ask for {dims:?}", t.dims)));
        }
        let Some(ty) = WeightType::from_ggml(t.ty) else {
            let names: Vec<_> = WeightType::ALL.iter().map(|t| t.name()).collect();
            return Err(self.unsupported(&field, format!("of type number {}", t.ty), names.join(", ")));
        };
        let io = |source| GgufError::Io { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(io)?;
        file.seek(SeekFrom::Start(t.offset)).map_err(io)?;
        let mut data = vec![0; t.bytes as usize];
        file.read_exact(&mut data).map_err(io)?;
        Ok((ty, data))
    }

    /// A matrix `[rows, cols]`.
    ///
    /// # Errors
    /// Missing, of another shape, or of an unknown type.
    pub fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, GgufError> {
        let (ty, data) = self.read(name, &[cols as u64, rows as u64])?;
        Weight::from_gguf(ty, rows, cols, data).map_err(|e| self.field(&format!("tensor {name}"), e.to_string()))
    }

    /// A vector of finite numbers, from F32, F16 or BF16.
    ///
    /// # Errors
    /// Missing, of another length or type, or not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, GgufError> {
        let (ty, data) = self.read(name, &[len as u64])?;
        let x: Vec<f32> = match ty {
            WeightType::F32 => data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            WeightType::F16 => data.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            WeightType::Bf16 => data.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            other => return Err(self.unsupported(&format!("tensor {name}"), other.name(), "F32, F16, BF16")),
        };
        if let Some(bad) = x.iter().find(|x| !x.is_finite()) {
            return Err(self.field(&format!("tensor {name}"), format!("holds {bad}")));
        }
        Ok(x)
    }
}
