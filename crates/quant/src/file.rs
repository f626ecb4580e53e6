//! The quantizer file: what calibration learned about a model.
//!
//! ```text
//! safetensors (u64 header length, JSON header, tensors), with one metadata entry "kvquant": JSON
//!   { "format": 1, "rope_layout": "adjacent", "model": {..}, "provenance": {..}, "fits": ["nuq3-1%+sink1", ..] }
//! per fit F and side s in {k, v}, L layers, C = kv_heads * head_dim:
//!   F/s.lower, F/s.upper     f32 [L, C]        thresholds; only for sides quantized per channel
//!   F/s.encode, F/s.decode   f32 [L, 2^bits]   codebooks; only for nuq
//!   F/s.widths  u8 [L, C/4]   F/s.order  u16 [L, C]   F/s.steps  f32 [L, C]   F/s.posts  i16 [entries]
//!   F/s.transform            f32 [L, C/2] for keys, f16 or f32 [L, C * head_dim] for values; these five only for mix
//! ```
//!
//! A file is hostile until checked: its size is capped, shapes must follow from the metadata, numbers must be finite,
//! thresholds ordered and signposts sorted.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::mixed::MixedFit;
use crate::side::Side;
use crate::spec::{CodebookKind, Scope, Spec};
use crate::whole::write_whole;

/// Version of the format that this code writes and reads.
const FORMAT: u32 = 1;
/// A file of 80 layers, 1024 channels and 10 fits is 13 MB.
const MOST_BYTES: u64 = 256 << 20;
const METADATA: &str = "kvquant";

/// What a model is, as far as its keys and values go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Family, such as `llama`.
    pub architecture: String,
    /// Layers.
    pub layers: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Hex SHA-256 over all layers' attention norm weights as little-endian f32: the same for every quantization of
    /// a model's weights.
    pub norms_sha256: String,
}

/// Where a quantizer comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The calibration text.
    pub text: String,
    /// Windows of it.
    pub windows: usize,
    /// Tokens of a window.
    pub ctx: usize,
    /// What made the file.
    pub tool: String,
}

/// The fit of one side of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct SideFit {
    /// Lower thresholds `[C]`; empty unless the side is quantized per channel.
    pub lower: Vec<f32>,
    /// Upper thresholds `[C]`; empty unless the side is quantized per channel.
    pub upper: Vec<f32>,
    /// Sorted signposts to encode with `[2^bits]`, normalised; empty unless nuq.
    pub encode: Vec<f32>,
    /// Signposts to decode with `[2^bits]`; they differ from `encode` by Q-Norm only.
    pub decode: Vec<f32>,
    /// Only for mixed widths; `lower` and `upper` are then what calibration saw, and what lies outside is an outlier.
    pub mixed: Option<MixedFit>,
}

impl SideFit {
    /// Bytes in a quantizer file.
    pub fn file_bytes(&self) -> usize {
        let plain = 4 * (self.lower.len() + self.upper.len() + self.encode.len() + self.decode.len());
        plain + self.mixed.as_ref().map_or(0, MixedFit::file_bytes)
    }
}

/// The fit of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerFit {
    /// Keys.
    pub keys: SideFit,
    /// Values.
    pub values: SideFit,
}

/// The calibration of one spec; the spec's recent window does not matter.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The spec.
    pub spec: Spec,
    /// One entry a layer.
    pub layers: Vec<LayerFit>,
}

impl Fit {
    /// Bytes of its numbers in a quantizer file, all layers.
    pub fn file_bytes(&self) -> usize {
        self.layers.iter().flat_map(|l| [&l.keys, &l.values]).map(SideFit::file_bytes).sum()
    }
}

/// Fits of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantizer {
    /// The model.
    pub model: Fingerprint,
    /// Where the fits come from.
    pub provenance: Provenance,
    /// The fits, no two of the same key.
    pub fits: Vec<Fit>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    format: u32,
    rope_layout: String,
    model: Fingerprint,
    provenance: Provenance,
    fits: Vec<String>,
}

/// A quantizer file can't be read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system said no.
    #[error("quantizer file {path}: cannot {operation}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `write`.
        operation: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The content is not a quantizer.
    #[error("quantizer file {name}: {field}: {problem}; make a new one with `kvquant calibrate`")]
    Content {
        /// The file.
        name: String,
        /// Where in it.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// No fit for the spec.
    #[error(
        "the quantizer has no fit for {spec}; it has: {available}. Make one with `kvquant calibrate MODEL --self --kv {spec} -o FILE`, or do without by `+online` (nuq, int, nf)"
    )]
    NoFit {
        /// The spec as asked for.
        spec: String,
        /// What there is.
        available: String,
    },
    /// The file is of another model.
    #[error(
        "the quantizer is of another model: it was fitted to {expected}, this is {got}. Make one for this model with `kvquant calibrate MODEL --self --kv SPEC -o FILE`"
    )]
    OtherModel {
        /// What it was fitted to.
        expected: String,
        /// The model at hand.
        got: String,
    },
}

impl Fingerprint {
    fn describe(&self) -> String {
        let hash = self.norms_sha256.get(..12).unwrap_or(&self.norms_sha256);
        format!(
            "{} with {} layers, {} KV heads of {} (weights {hash})",
            self.architecture, self.layers, self.kv_heads, self.head_dim
        )
    }
}

/// Which tensors a side has: (thresholds, codebooks).
fn parts(spec: &Spec, key: bool) -> (bool, bool) {
    match spec {
        Spec::Fp16 => (false, false),
        Spec::Coded(c) => ((if key { c.keys } else { c.values }) == Scope::Channel, c.codebook == CodebookKind::Nuq),
    }
}

fn is_mixed(spec: &Spec) -> bool {
    matches!(spec, Spec::Coded(c) if matches!(c.codebook, CodebookKind::Mix { .. }))
}

fn signposts(spec: &Spec) -> usize {
    if let Spec::Coded(c) = spec { 1 << c.bits } else { 0 }
}

impl Quantizer {
    /// Reads a file.
    ///
    /// # Errors
    /// It can't be read, or is not a sound quantizer.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let io = |source| FileError::Io { path: path.into(), operation: "read", source };
        let name = path.display().to_string();
        let mut bytes = Vec::new();
        // A pipe or a file that grows says its size only by being read.
        std::fs::File::open(path).and_then(|f| f.take(MOST_BYTES + 1).read_to_end(&mut bytes)).map_err(io)?;
        if bytes.len() as u64 > MOST_BYTES {
            let problem = format!("more than the {MOST_BYTES} bytes that a quantizer may have");
            return Err(FileError::Content { name, field: "size".into(), problem });
        }
        Self::from_bytes(&bytes, &name)
    }

    /// Reads a file's content; `name` is for errors.
    ///
    /// # Errors
    /// It is not a sound quantizer.
    pub fn from_bytes(bytes: &[u8], name: &str) -> Result<Self, FileError> {
        let err = |field: &str, problem: String| FileError::Content { name: name.into(), field: field.into(), problem };
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|e| err("header", format!("not a safetensors file: {e}")))?;
        let json = header.metadata().as_ref().and_then(|m| m.get(METADATA));
        let json = json.ok_or_else(|| err("metadata", format!("has no entry `{METADATA}`, so it is no quantizer")))?;
        let metadata: Metadata = serde_json::from_str(json).map_err(|e| err("metadata", e.to_string()))?;
        if metadata.format != FORMAT {
            return Err(err("format", format!("version {}, and this program reads version {FORMAT}", metadata.format)));
        }
        if metadata.rope_layout != "adjacent" {
            return Err(err("rope_layout", format!("`{}`; supported: adjacent", metadata.rope_layout)));
        }
        let model = metadata.model;
        let channels = model.kv_heads.checked_mul(model.head_dim).filter(|c| (1..=1 << 16).contains(c));
        let channels = channels.ok_or_else(|| err("model", "kv_heads * head_dim is not within 1 to 65536".into()))?;
        if !(1..=4096).contains(&model.layers) {
            return Err(err("model.layers", format!("{}, not within 1 to 4096", model.layers)));
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| err("tensors", e.to_string()))?;
        let wanted = Cell::new(0);
        let read = |field: String, width: usize| -> Result<Vec<Vec<f32>>, FileError> {
            wanted.set(wanted.get() + 1);
            let t = tensors.tensor(&field).map_err(|_| err(&field, "is missing".into()))?;
            if t.dtype() != Dtype::F32 || t.shape() != [model.layers, width] {
                return Err(err(
                    &field,
                    format!("{:?} {:?}, expected F32 [{}, {width}]", t.dtype(), t.shape(), model.layers),
                ));
            }
            let numbers: Vec<f32> = t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            // Thresholds and signposts meet fp16 data: anything larger is no number of ours.
            if let Some(x) = numbers.iter().find(|x| !crate::fits_half(**x)) {
                return Err(err(&field, format!("holds {x}, not a finite fp16 number")));
            }
            Ok(numbers.chunks_exact(width).map(<[f32]>::to_vec).collect())
        };
        let mut fits: Vec<Fit> = Vec::new();
        for key in &metadata.fits {
            let spec: Spec = key.parse().map_err(|e| err("fits", format!("{e}")))?;
            if spec.fit_key() != *key {
                return Err(err("fits", format!("`{key}` is not canonical: `{}`", spec.fit_key())));
            }
            if fits.iter().any(|f| f.spec == spec) {
                return Err(err("fits", format!("`{key}` stands twice")));
            }
            let mut sides = Vec::new();
            for (side, is_key) in [("k", true), ("v", false)] {
                let (thresholds, codebooks) = parts(&spec, is_key);
                let get = |part: &str, there: bool, width| {
                    if there { read(format!("{key}/{side}.{part}"), width) } else { Ok(vec![vec![]; model.layers]) }
                };
                let (lower, upper) = (get("lower", thresholds, channels)?, get("upper", thresholds, channels)?);
                let n = signposts(&spec);
                let (encode, decode) = (get("encode", codebooks, n)?, get("decode", codebooks, n)?);
                for (l, (low, high)) in lower.iter().zip(&upper).enumerate() {
                    if let Some(c) = low.iter().zip(high).position(|(a, b)| a > b) {
                        return Err(err(
                            &format!("{key}/{side}.lower"),
                            format!("layer {l}, channel {c} is above the upper threshold"),
                        ));
                    }
                }
                for (l, book) in encode.iter().enumerate() {
                    if !book.is_sorted() {
                        return Err(err(&format!("{key}/{side}.encode"), format!("layer {l} is not sorted")));
                    }
                }
                let mixed = if is_mixed(&spec) {
                    let side_kind = if is_key { Side::Key } else { Side::Value };
                    wanted.set(wanted.get() + crate::mixed::TENSORS.len());
                    let all = crate::mixed::read(&tensors, &format!("{key}/{side}"), side_kind, &model)
                        .map_err(|(field, problem)| err(&field, problem))?;
                    all.into_iter().map(Some).collect()
                } else {
                    vec![None; model.layers]
                };
                let zipped = lower.into_iter().zip(upper).zip(encode.into_iter().zip(decode));
                sides.push(
                    zipped
                        .zip(mixed)
                        .map(|(((lower, upper), (encode, decode)), mixed)| SideFit {
                            lower,
                            upper,
                            encode,
                            decode,
                            mixed,
                        })
                        .collect::<Vec<_>>(),
                );
            }
            let values = sides.pop().unwrap_or_default();
            let keys = sides.pop().unwrap_or_default();
            let layers = keys.into_iter().zip(values).map(|(keys, values)| LayerFit { keys, values }).collect();
            fits.push(Fit { spec, layers });
        }
        if tensors.len() != wanted.get() {
            return Err(err("tensors", format!("{} of them, the metadata names {}", tensors.len(), wanted.get())));
        }
        Ok(Quantizer { model, provenance: metadata.provenance, fits })
    }

    /// The file's content.
    ///
    /// # Errors
    /// The content can't be written in the format.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FileError> {
        let err =
            |field: &str, problem: String| FileError::Content { name: "(new)".into(), field: field.into(), problem };
        for (i, fit) in self.fits.iter().enumerate() {
            if self.fits[..i].iter().any(|f| f.spec.fit_key() == fit.spec.fit_key()) {
                return Err(err("fits", format!("`{}` stands twice", fit.spec.fit_key())));
            }
        }
        let metadata = Metadata {
            format: FORMAT,
            rope_layout: "adjacent".into(),
            model: self.model.clone(),
            provenance: self.provenance.clone(),
            fits: self.fits.iter().map(|f| f.spec.fit_key()).collect(),
        };
        let json = serde_json::to_string(&metadata).map_err(|e| err("metadata", e.to_string()))?;
        let mut data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for fit in &self.fits {
            for (side, is_key) in [("k", true), ("v", false)] {
                let (thresholds, codebooks) = parts(&fit.spec, is_key);
                let of = |l: &LayerFit| if is_key { l.keys.clone() } else { l.values.clone() };
                let mut add = |part: &str, there: bool, get: fn(SideFit) -> Vec<f32>| {
                    if there {
                        let rows: Vec<Vec<f32>> = fit.layers.iter().map(|l| get(of(l))).collect();
                        let width = rows.first().map_or(0, Vec::len);
                        let bytes = rows.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
                        let name = format!("{}/{side}.{part}", fit.spec.fit_key());
                        data.push((name, Dtype::F32, vec![rows.len(), width], bytes));
                    }
                };
                add("lower", thresholds, |f| f.lower);
                add("upper", thresholds, |f| f.upper);
                add("encode", codebooks, |f| f.encode);
                add("decode", codebooks, |f| f.decode);
                if is_mixed(&fit.spec) {
                    let of = |l: &LayerFit| if is_key { l.keys.mixed.clone() } else { l.values.mixed.clone() };
                    let all: Option<Vec<MixedFit>> = fit.layers.iter().map(of).collect();
                    let all = all.ok_or_else(|| err(&fit.spec.fit_key(), "a layer has no mixed widths".into()))?;
                    data.extend(crate::mixed::tensors(&all, &format!("{}/{side}", fit.spec.fit_key())));
                }
            }
        }
        let views: Result<Vec<_>, FileError> = data
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| err(name, e.to_string()))?;
                Ok((name.clone(), view))
            })
            .collect();
        safetensors::serialize(views?, Some(HashMap::from([(METADATA.to_string(), json)])))
            .map_err(|e| err("tensors", e.to_string()))
    }

    /// Writes a file: first a temporary one beside it, then a rename, so that a failure leaves what was there.
    ///
    /// # Errors
    /// The folder can't be written, or has no space.
    pub fn save(&self, path: &Path) -> Result<(), FileError> {
        write_whole(path, &self.to_bytes()?).map_err(|source| FileError::Io {
            path: path.into(),
            operation: "write",
            source,
        })
    }

    /// The fit for a spec: of the same number of sinks, otherwise of any.
    ///
    /// # Errors
    /// There is none; the error lists what there is.
    pub fn fit(&self, spec: &Spec) -> Result<&Fit, FileError> {
        let sinkless = |s: &Spec| match s {
            Spec::Fp16 => s.fit_key(),
            Spec::Coded(c) => Spec::Coded(crate::CodedSpec { sinks: 0, ..c.clone() }).fit_key(),
        };
        let same = self.fits.iter().find(|f| f.spec.fit_key() == spec.fit_key());
        same.or_else(|| self.fits.iter().find(|f| sinkless(&f.spec) == sinkless(spec))).ok_or_else(|| {
            FileError::NoFit {
                spec: spec.to_string(),
                available: self.fits.iter().map(|f| f.spec.fit_key()).collect::<Vec<_>>().join(", "),
            }
        })
    }

    /// Whether the quantizer was fitted to this model.
    ///
    /// # Errors
    /// It was not; the error names both.
    pub fn check_model(&self, model: &Fingerprint) -> Result<(), FileError> {
        if self.model == *model {
            return Ok(());
        }
        Err(FileError::OtherModel { expected: self.model.describe(), got: model.describe() })
    }
}

#[cfg(test)]
mod tests;
