//! A Hugging Face folder: `config.json`, weights in one or several safetensors files, tokenizer, chat template.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use kvquant_kernels::weights::{FileWeight, WeightType};
use safetensors::tensor::Dtype;
use serde_json::Value as Json;

use super::safetensors::{self as shard, Located};
use super::{Fields, SourceError};
use crate::gguf::Value;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The largest tokenizers that are known have 40 MB.
const MAX_JSON: u64 = 512 << 20;
const DTYPES: &str = "F32, F16, BF16";

/// An open folder: its configuration and where its tensors lie.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    config: PathBuf,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Located>,
    files: Vec<(PathBuf, Mutex<File>)>,
}

impl Folder {
    /// Reads `config.json` and the headers of all weight files.
    ///
    /// # Errors
    /// A file is missing, can't be read, or contradicts its format or another one.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let config = path.join("config.json");
        let mut metadata = BTreeMap::new();
        flatten("", &read_json(&config)?, &mut metadata);
        let mut folder = Self { root: path.to_owned(), config, metadata, tensors: BTreeMap::new(), files: Vec::new() };
        let index = path.join(INDEX);
        if !index.exists() {
            folder.add(SINGLE)?;
            return Ok(folder);
        }
        let map = read_json(&index)?;
        let broken = |field: String, expected: &str, got: String| SourceError::Field {
            path: index.clone(),
            field,
            expected: expected.to_owned(),
            got,
        };
        let Some(map) = map.get("weight_map").and_then(Json::as_object) else {
            return Err(broken("weight_map".into(), "an object of tensor names and file names", "none".into()));
        };
        let mut names: Vec<&str> = Vec::new();
        for (tensor, file) in map {
            let plain = file.as_str().filter(|f| Path::new(f).file_name() == Some(std::ffi::OsStr::new(f)));
            let Some(name) = plain else {
                return Err(broken(
                    format!("weight_map of {tensor}"),
                    "the name of a file beside it",
                    file.to_string(),
                ));
            };
            names.push(name);
        }
        names.sort_unstable();
        names.dedup();
        for name in names {
            folder.add(name)?;
        }
        for (tensor, file) in map {
            let found = folder.tensors.get(tensor).and_then(|t| folder.files[t.file].0.file_name()?.to_str());
            if found != file.as_str() {
                let got = found.unwrap_or("no file").to_owned();
                return Err(broken(format!("weight_map of {tensor}"), "the file that holds it", got));
            }
        }
        Ok(folder)
    }

    fn add(&mut self, name: &str) -> Result<(), SourceError> {
        let path = self.root.join(name);
        let (file, tensors) = shard::open(&path, self.files.len())?;
        self.files.push((path.clone(), Mutex::new(file)));
        for (name, tensor) in tensors {
            if self.tensors.contains_key(&name) {
                return Err(SourceError::Duplicate { path, what: "tensor", name });
            }
            self.tensors.insert(name, tensor);
        }
        Ok(())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.root
    }

    /// All metadata of `config.json`, dots between the names of nested objects.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// Another JSON file of the folder; nothing when there is none.
    ///
    /// # Errors
    /// It can't be read, or is no JSON.
    pub fn json(&self, name: &str) -> Result<Option<Json>, SourceError> {
        let path = self.root.join(name);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Another text file of the folder; nothing when there is none.
    ///
    /// # Errors
    /// It can't be read.
    pub fn text(&self, name: &str) -> Result<Option<String>, SourceError> {
        let path = self.root.join(name);
        if path.exists() { read_text(&path).map(Some) } else { Ok(None) }
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's shape, rows first.
    pub fn shape(&self, tensor: &str) -> Option<Vec<u64>> {
        self.tensors.get(tensor).map(|t| t.shape.clone())
    }

    /// Element types, with how many tensors and bytes there are of each.
    pub fn types(&self) -> BTreeMap<String, (usize, u64)> {
        let mut out = BTreeMap::<String, (usize, u64)>::new();
        for t in self.tensors.values() {
            let of = out.entry(format!("{:?}", t.dtype)).or_default();
            *of = (of.0 + 1, of.1 + t.bytes);
        }
        out
    }

    /// A matrix `[rows, cols]`.
    ///
    /// # Errors
    /// The tensor is missing, of another shape or not of f32, f16, bf16, or can't be read.
    pub fn weight(&self, tensor: &str, rows: usize, cols: usize) -> Result<FileWeight, SourceError> {
        let found = self.shaped(tensor, &[rows as u64, cols as u64])?;
        let ty = match found.dtype {
            Dtype::F32 => WeightType::F32,
            Dtype::F16 => WeightType::F16,
            Dtype::BF16 => WeightType::Bf16,
            _ => return Err(self.dtype(tensor, found)),
        };
        let path = self.files[found.file].0.clone();
        FileWeight::new(ty, rows, cols, self.read(tensor, found)?).map_err(|source| SourceError::Weight {
            path,
            tensor: tensor.to_owned(),
            source,
        })
    }

    /// A vector of finite numbers.
    ///
    /// # Errors
    /// As [`Folder::weight`], and when an entry is not finite.
    pub fn vector(&self, tensor: &str, len: usize) -> Result<Vec<f32>, SourceError> {
        let found = self.shaped(tensor, &[len as u64])?;
        let data = self.read(tensor, found)?;
        let (pairs, quads) = (data.as_chunks::<2>().0, data.as_chunks::<4>().0);
        let out: Vec<f32> = match found.dtype {
            Dtype::F32 => quads.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => pairs.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::BF16 => pairs.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => return Err(self.dtype(tensor, found)),
        };
        match out.iter().position(|v| !v.is_finite()) {
            None => Ok(out),
            Some(at) => {
                let path = self.files[found.file].0.clone();
                Err(SourceError::NotFinite { path, tensor: tensor.to_owned(), at })
            }
        }
    }

    /// Whether two tensors hold the same bytes.
    ///
    /// # Errors
    /// One is missing or can't be read.
    pub fn same(&self, a: &str, b: &str) -> Result<bool, SourceError> {
        let of = |name: &str| self.found(name);
        let (ta, tb) = (of(a)?, of(b)?);
        Ok(ta.shape == tb.shape && ta.dtype == tb.dtype && self.read(a, ta)? == self.read(b, tb)?)
    }

    fn found(&self, tensor: &str) -> Result<&Located, SourceError> {
        let missing = || SourceError::MissingTensor { path: self.root.clone(), tensor: tensor.to_owned() };
        self.tensors.get(tensor).ok_or_else(missing)
    }

    fn shaped(&self, tensor: &str, shape: &[u64]) -> Result<&Located, SourceError> {
        let found = self.found(tensor)?;
        if found.shape == shape {
            return Ok(found);
        }
        Err(SourceError::Shape {
            path: self.files[found.file].0.clone(),
            tensor: tensor.to_owned(),
            expected: shape.to_vec(),
            got: found.shape.clone(),
        })
    }

    fn dtype(&self, tensor: &str, found: &Located) -> SourceError {
        SourceError::TensorType {
            path: self.files[found.file].0.clone(),
            tensor: tensor.to_owned(),
            got: format!("{:?}", found.dtype),
            supported: DTYPES,
        }
    }

    fn read(&self, tensor: &str, found: &Located) -> Result<Vec<u8>, SourceError> {
        let (path, file) = &self.files[found.file];
        // `open` has checked that the range lies inside the file, so its length bounds the allocation.
        let mut data = vec![0; found.bytes as usize];
        // A reader that panicked leaves only a file position behind, and the seek sets it anew.
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let done = file.seek(SeekFrom::Start(found.offset)).and_then(|_| file.read_exact(&mut data));
        done.map_err(|source| SourceError::Read { path: path.clone(), field: tensor.to_owned(), source })?;
        Ok(data)
    }
}

impl Fields for Folder {
    fn path(&self) -> &Path {
        &self.config
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }
}

fn read_text(path: &Path) -> Result<String, SourceError> {
    let opened = |source| SourceError::Open { path: path.to_owned(), source };
    let meta = std::fs::metadata(path).map_err(opened)?;
    if meta.len() > MAX_JSON {
        let (path, field) = (path.to_owned(), "length of the file".to_owned());
        return Err(SourceError::Cap { path, field, got: meta.len(), max: MAX_JSON });
    }
    std::fs::read_to_string(path).map_err(opened)
}

fn read_json(path: &Path) -> Result<Json, SourceError> {
    serde_json::from_str(&read_text(path)?).map_err(|source| SourceError::Json { path: path.to_owned(), source })
}

/// Objects become dotted keys; null is no entry; lists of lists and of objects are left out, no key that is read is one.
fn flatten(prefix: &str, json: &Json, out: &mut BTreeMap<String, Value>) {
    let number = |n: &serde_json::Number| {
        let whole = n.as_u64().map(Value::U64).or_else(|| n.as_i64().map(Value::I64));
        whole.or_else(|| n.as_f64().map(Value::F64))
    };
    let value = match json {
        Json::Object(map) => {
            for (name, json) in map {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(&key, json, out);
            }
            None
        }
        Json::Null => None,
        Json::Bool(v) => Some(Value::Bool(*v)),
        Json::String(v) => Some(Value::String(v.clone())),
        Json::Number(n) => number(n),
        Json::Array(all) => {
            let strings: Option<Vec<String>> = all.iter().map(|v| v.as_str().map(str::to_owned)).collect();
            let ints: Option<Vec<i64>> = all.iter().map(Json::as_i64).collect();
            let floats: Option<Vec<f64>> = all.iter().map(Json::as_f64).collect();
            ints.map(Value::Ints).or(floats.map(Value::Floats)).or(strings.map(Value::Strings))
        }
    };
    if let Some(value) = value {
        out.insert(prefix.to_owned(), value);
    }
}
