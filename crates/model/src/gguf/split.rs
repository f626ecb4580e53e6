//! Models in several files: `NAME-00001-of-00003.gguf` and so on. The first has the metadata, each has tensors.

use std::path::PathBuf;

use super::{Gguf, SourceError, read};
use crate::source::Fields;

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
/// What the names have digits for.
const MAX_PARTS: u64 = 99_999;

/// Adds the tensors of the other files, if there are any.
pub(super) fn join(first: &mut Gguf) -> Result<(), SourceError> {
    let Some(count) = first.opt_uint(COUNT)?.filter(|n| *n > 1) else { return Ok(()) };
    if count > MAX_PARTS {
        return Err(first.field(COUNT, format!("at most {MAX_PARTS}"), count.to_string()));
    }
    let name = first.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = name.strip_suffix(&ending(1, count));
    let (Some(stem), 0) = (stem, first.opt_uint(NUMBER)?.unwrap_or(0)) else {
        let expected = format!("the first file of a split model, named NAME{}", ending(1, count));
        return Err(first.field(NUMBER, expected, format!("the file {name}")));
    };
    for number in 1..count {
        let path: PathBuf = first.path.with_file_name(format!("{stem}{}", ending(number + 1, count)));
        let other = read::open(&path)?;
        for (key, expected) in [(NUMBER, number), (COUNT, count)] {
            let got = other.uint(key)?;
            if got != expected {
                return Err(other.field(key, expected.to_string(), got.to_string()));
            }
        }
        let part = first.parts.len();
        first.parts.extend(other.parts);
        for mut tensor in other.tensors {
            tensor.part = part;
            if first.index.insert(tensor.name.clone(), first.tensors.len()).is_some() {
                return Err(SourceError::Duplicate { path, what: "tensor", name: tensor.name });
            }
            first.tensors.push(tensor);
        }
    }
    match first.opt_uint(TENSORS)? {
        Some(stated) if stated != first.tensors.len() as u64 => {
            Err(first.field(TENSORS, format!("{}, the tensors of all files", first.tensors.len()), stated.to_string()))
        }
        _ => Ok(()),
    }
}

fn ending(number: u64, count: u64) -> String {
    format!("-{number:05}-of-{count:05}.gguf")
}
