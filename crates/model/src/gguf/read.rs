//! The parser: every length is compared with what the file has left before memory is taken for it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::{Gguf, Part, TensorInfo, Value};
use crate::source::SourceError;

pub(super) const F32: u32 = 0;
pub(super) const F16: u32 = 1;
pub(super) const BF16: u32 = 30;

const MAX_KEYS: u64 = 65_536;
const MAX_TENSORS: u64 = 131_072;
const MAX_DIMS: u32 = 4;
const MAX_NAME: u64 = 65_535;
const MAX_STRING: u64 = 16 << 20;
/// Array entries of all keys together: vocabularies have some 300,000 tokens and as many merges. Entries grow in
/// memory (a byte becomes an i64), so that the file's length alone would bound them badly.
const MAX_ENTRIES: u64 = 1 << 24;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// (id, name, elements of a block, bytes of a block) of every ggml type with a known layout. More than the kernels
/// can use: sizes are needed to check that tensors do not overlap.
const TYPES: &[(u32, &str, u64, u64)] = &[
    (F32, "F32", 1, 4),
    (F16, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (BF16, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
];

pub(super) fn type_name(id: u32) -> String {
    TYPES.iter().find(|t| t.0 == id).map_or_else(|| format!("{id} (unknown)"), |t| t.1.to_owned())
}

struct Reader<'a> {
    path: &'a Path,
    file: BufReader<File>,
    at: u64,
    len: u64,
    entries_left: u64,
}

pub(super) fn open(path: &Path) -> Result<Gguf, SourceError> {
    let opened = |source| SourceError::Open { path: path.to_owned(), source };
    // Asked before opening, which would wait on a pipe.
    if !std::fs::metadata(path).map_err(opened)?.is_file() {
        return Err(opened(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = File::open(path).map_err(opened)?;
    let meta = file.metadata().map_err(opened)?;
    let mut r = Reader { path, file: BufReader::new(file), at: 0, len: meta.len(), entries_left: MAX_ENTRIES };

    let magic: [u8; 4] = r.bytes("magic")?;
    if magic != *b"GGUF" {
        return Err(SourceError::Magic { path: path.to_owned(), got: magic });
    }
    let version = r.u32("version")?;
    if !matches!(version, 2 | 3) {
        let hint = if matches!(version.swap_bytes(), 2 | 3) { " (a big-endian file)" } else { "" };
        return Err(SourceError::Version { path: path.to_owned(), got: version, hint });
    }
    let tensor_count = r.u64("tensor count")?;
    r.cap("tensor count", tensor_count, MAX_TENSORS)?;
    let key_count = r.u64("metadata count")?;
    r.cap("metadata count", key_count, MAX_KEYS)?;

    let metadata = r.metadata(key_count)?;
    let alignment = r.alignment(&metadata)?;
    let (tensors, index) = r.tensors(tensor_count)?;
    // Padding may be missing in a file without tensors.
    let data_start = r.at.next_multiple_of(alignment);
    check_layout(path, &tensors, alignment, r.len.saturating_sub(data_start))?;

    Ok(Gguf {
        path: path.to_owned(),
        metadata,
        tensors,
        index,
        parts: vec![Part { path: path.to_owned(), data_start, file: Mutex::new(r.file.into_inner()) }],
    })
}

/// Every tensor aligned, inside the file, and apart from every other.
fn check_layout(path: &Path, tensors: &[TensorInfo], alignment: u64, data_len: u64) -> Result<(), SourceError> {
    for t in tensors {
        if !t.offset.is_multiple_of(alignment) {
            return Err(SourceError::Field {
                path: path.to_owned(),
                field: format!("offset of tensor {}", t.name),
                expected: format!("a multiple of the alignment {alignment}"),
                got: t.offset.to_string(),
            });
        }
        let left = data_len.checked_sub(t.offset);
        if left.is_none_or(|left| t.bytes > left) {
            return Err(SourceError::Truncated {
                path: path.to_owned(),
                field: format!("tensor {}", t.name),
                needed: t.bytes,
                left: left.unwrap_or(0),
            });
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| (t.offset, t.bytes));
    for pair in order.windows(2) {
        let end = pair[0].offset + pair[0].bytes;
        // Two tensors at one place overlap even when the length of the first is not known.
        if pair[1].offset < end || pair[1].offset == pair[0].offset {
            return Err(SourceError::Field {
                path: path.to_owned(),
                field: format!("offset of tensor {}", pair[1].name),
                expected: format!("at least {end}, where tensor {} ends", pair[0].name),
                got: pair[1].offset.to_string(),
            });
        }
    }
    Ok(())
}

impl Reader<'_> {
    fn path(&self) -> PathBuf {
        self.path.to_owned()
    }

    fn cap(&self, field: &str, got: u64, max: u64) -> Result<(), SourceError> {
        if got <= max {
            return Ok(());
        }
        Err(SourceError::Cap { path: self.path(), field: field.to_owned(), got, max })
    }

    fn need(&self, field: &str, needed: u64) -> Result<(), SourceError> {
        let left = self.len.saturating_sub(self.at);
        if needed <= left {
            return Ok(());
        }
        Err(SourceError::Truncated { path: self.path(), field: field.to_owned(), needed, left })
    }

    fn fill(&mut self, field: &str, out: &mut [u8]) -> Result<(), SourceError> {
        self.need(field, out.len() as u64)?;
        self.file.read_exact(out).map_err(|source| SourceError::Read {
            path: self.path(),
            field: field.to_owned(),
            source,
        })?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, field: &str) -> Result<[u8; N], SourceError> {
        let mut out = [0; N];
        self.fill(field, &mut out)?;
        Ok(out)
    }

    fn u32(&mut self, field: &str) -> Result<u32, SourceError> {
        self.bytes(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &str) -> Result<u64, SourceError> {
        self.bytes(field).map(u64::from_le_bytes)
    }

    fn string(&mut self, field: &str, max: u64) -> Result<String, SourceError> {
        let len = self.u64(field)?;
        self.need(field, len)?;
        self.cap(field, len, max)?;
        let mut bytes = vec![0; len as usize];
        self.fill(field, &mut bytes)?;
        String::from_utf8(bytes).map_err(|e| {
            let valid = e.utf8_error().valid_up_to();
            self.field(field, "UTF-8", format!("an invalid sequence at byte {valid}"))
        })
    }

    fn field(&self, field: &str, expected: impl Into<String>, got: impl Into<String>) -> SourceError {
        SourceError::Field { path: self.path(), field: field.to_owned(), expected: expected.into(), got: got.into() }
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>, SourceError> {
        let mut out = BTreeMap::new();
        for i in 0..count {
            let key = self.string(&format!("metadata key {i}"), MAX_NAME)?;
            let ty = self.u32(&key)?;
            let value = if ty == 9 { self.array(&key)? } else { self.scalar(&key, ty)? };
            if out.contains_key(&key) {
                return Err(SourceError::Duplicate { path: self.path(), what: "metadata key", name: key });
            }
            out.insert(key, value);
        }
        Ok(out)
    }

    fn scalar(&mut self, key: &str, ty: u32) -> Result<Value, SourceError> {
        Ok(match ty {
            0 => Value::U64(u8::from_le_bytes(self.bytes(key)?).into()),
            1 => Value::I64(i8::from_le_bytes(self.bytes(key)?).into()),
            2 => Value::U64(u16::from_le_bytes(self.bytes(key)?).into()),
            3 => Value::I64(i16::from_le_bytes(self.bytes(key)?).into()),
            4 => Value::U64(self.u32(key)?.into()),
            5 => Value::I64(i32::from_le_bytes(self.bytes(key)?).into()),
            6 => Value::F64(f32::from_le_bytes(self.bytes(key)?).into()),
            7 => match self.bytes(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.field(key, "a bool, 0 or 1", other.to_string())),
            },
            8 => Value::String(self.string(key, MAX_STRING)?),
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.bytes(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes(key)?)),
            _ => return Err(self.field(key, "a value type from 0 to 12", ty.to_string())),
        })
    }

    fn array(&mut self, key: &str) -> Result<Value, SourceError> {
        let ty = self.u32(key)?;
        let count = self.u64(key)?;
        // The fewest bytes that an entry takes; a string is at least its length.
        let least: u64 = match ty {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.field(key, "an array of plain values", "an array of arrays")),
            _ => return Err(self.field(key, "an array entry type from 0 to 12", ty.to_string())),
        };
        self.need(key, count.saturating_mul(least))?;
        self.cap(&format!("{key}: array entries"), count, self.entries_left)?;
        self.entries_left -= count;
        let n = count as usize;
        match ty {
            8 => (0..n).map(|_| self.string(key, MAX_STRING)).collect::<Result<_, _>>().map(Value::Strings),
            6 | 12 => {
                self.entries(key, ty, n, |v| if let Value::F64(v) = v { Some(v) } else { None }).map(Value::Floats)
            }
            7 => self.entries(key, ty, n, |v| if let Value::Bool(v) = v { Some(v) } else { None }).map(Value::Bools),
            _ => self
                .entries(key, ty, n, |v| match v {
                    Value::I64(v) => Some(v),
                    Value::U64(v) => i64::try_from(v).ok(),
                    _ => None,
                })
                .map(Value::Ints),
        }
    }

    fn entries<T>(
        &mut self,
        key: &str,
        ty: u32,
        n: usize,
        narrow: impl Fn(Value) -> Option<T>,
    ) -> Result<Vec<T>, SourceError> {
        (0..n)
            .map(|i| {
                let value = self.scalar(key, ty)?;
                narrow(value)
                    .ok_or_else(|| self.field(&format!("{key}, entry {i}"), "an integer below 2^63", "a larger one"))
            })
            .collect()
    }

    fn alignment(&self, metadata: &BTreeMap<String, Value>) -> Result<u64, SourceError> {
        const KEY: &str = "general.alignment";
        let expected = || format!("a power of two up to {MAX_ALIGNMENT}");
        match metadata.get(KEY) {
            None => Ok(32),
            Some(Value::U64(v)) if v.is_power_of_two() && *v <= MAX_ALIGNMENT => Ok(*v),
            Some(Value::U64(v)) => Err(self.field(KEY, expected(), v.to_string())),
            Some(other) => Err(self.field(KEY, expected(), other.kind())),
        }
    }

    fn tensors(&mut self, count: u64) -> Result<(Vec<TensorInfo>, HashMap<String, usize>), SourceError> {
        let mut tensors = Vec::new();
        let mut index = HashMap::new();
        for i in 0..count {
            let info = self.tensor(i)?;
            if index.insert(info.name.clone(), tensors.len()).is_some() {
                return Err(SourceError::Duplicate { path: self.path(), what: "tensor", name: info.name });
            }
            tensors.push(info);
        }
        Ok((tensors, index))
    }

    fn tensor(&mut self, i: u64) -> Result<TensorInfo, SourceError> {
        let name = self.string(&format!("name of tensor {i}"), MAX_NAME)?;
        let field = format!("dims of tensor {name}");
        let rank = self.u32(&field)?;
        if !(1..=MAX_DIMS).contains(&rank) {
            return Err(self.field(&field, format!("1 to {MAX_DIMS} dims"), rank.to_string()));
        }
        let dims = (0..rank).map(|_| self.u64(&field)).collect::<Result<Vec<_>, _>>()?;
        let ty = self.u32(&format!("type of tensor {name}"))?;
        let offset = self.u64(&format!("offset of tensor {name}"))?;
        let elements = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n > 0);
        let Some(elements) = elements else {
            return Err(self.field(&field, "dims above 0 with a product below 2^64", format!("{dims:?}")));
        };
        let bytes = match TYPES.iter().find(|t| t.0 == ty) {
            None => 0,
            Some((_, type_name, block, size)) => {
                if !dims[0].is_multiple_of(*block) {
                    let expected = format!("rows of a multiple of {block} entries, for type {type_name}");
                    return Err(self.field(&field, expected, format!("{dims:?}")));
                }
                (elements / block)
                    .checked_mul(*size)
                    .ok_or_else(|| self.field(&field, "a size below 2^64 bytes", format!("{dims:?}")))?
            }
        };
        Ok(TensorInfo { name, dims, ty, part: 0, offset, bytes })
    }
}
