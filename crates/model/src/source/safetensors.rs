//! The header of a safetensors file, read as hostile; data are read when they are asked for.
//!
//! ```text
//! u64 length | JSON header: name, dtype, shape, data_offsets | data, without gaps
//! ```
//!
//! The library's own reader wants the whole file in memory, which for a model is what a quantized copy is to avoid. So
//! its header type is parsed here and the layout checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata};

use super::SourceError;

/// What the format itself allows.
const MAX_HEADER: u64 = 100_000_000;

/// Where a tensor lies.
#[derive(Debug, Clone)]
pub(super) struct Located {
    /// Index of the file.
    pub file: usize,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// Opens file number `index` of a model; returns it with its tensors.
pub(super) fn open(path: &Path, index: usize) -> Result<(File, BTreeMap<String, Located>), SourceError> {
    let opened = |source| SourceError::Open { path: path.to_owned(), source };
    // Asked before opening, which would wait on a pipe.
    if !std::fs::metadata(path).map_err(opened)?.is_file() {
        return Err(opened(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let mut file = File::open(path).map_err(opened)?;
    let len = file.metadata().map_err(opened)?.len();
    let need = |field: &str, needed: u64, left: u64| {
        if needed <= left {
            return Ok(());
        }
        Err(SourceError::Truncated { path: path.to_owned(), field: field.to_owned(), needed, left })
    };
    let read = |file: &mut File, field: &str, out: &mut [u8]| {
        file.read_exact(out).map_err(|source| SourceError::Read {
            path: path.to_owned(),
            field: field.to_owned(),
            source,
        })
    };
    need("header length", 8, len)?;
    let mut start = [0; 8];
    read(&mut file, "header length", &mut start)?;
    let header = u64::from_le_bytes(start);
    if header > MAX_HEADER {
        let field = "header length".to_owned();
        return Err(SourceError::Cap { path: path.to_owned(), field, got: header, max: MAX_HEADER });
    }
    need("header", header, len - 8)?;
    let mut json = vec![0; header as usize];
    read(&mut file, "header", &mut json)?;
    let metadata: Metadata =
        serde_json::from_slice(&json).map_err(|source| SourceError::Json { path: path.to_owned(), source })?;

    let field = |name: &str, expected: String, got: String| SourceError::Field {
        path: path.to_owned(),
        field: format!("tensor {name}"),
        expected,
        got,
    };
    let (data, mut out) = (8 + header, BTreeMap::new());
    for (name, info) in metadata.tensors() {
        let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let shape: Vec<u64> = info.shape.iter().map(|d| *d as u64).collect();
        let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        let bytes = elements.and_then(|n| n.checked_mul(info.dtype.bitsize() as u64)).map(|bits| bits / 8);
        if from > to || bytes != Some(to - from) {
            let expected = format!("as many bytes as {:?} of {:?} take", shape, info.dtype);
            return Err(field(&name, expected, format!("{from} to {to}")));
        }
        need(&format!("tensor {name}"), to, len - data)?;
        out.insert(name, Located { file: index, dtype: info.dtype, shape, offset: data + from, bytes: to - from });
    }
    let mut order: Vec<(&String, &Located)> = out.iter().collect();
    order.sort_by_key(|(_, t)| (t.offset, t.bytes));
    for pair in order.windows(2) {
        let end = pair[0].1.offset + pair[0].1.bytes;
        if pair[1].1.offset < end {
            let expected = format!("a place behind tensor {}", pair[0].0);
            return Err(field(pair[1].0, expected, format!("byte {} of the file", pair[1].1.offset)));
        }
    }
    Ok((file, out))
}
