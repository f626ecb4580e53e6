//! A side whose channels differ in width: what a fit of it holds, its checks, and its tensors in a quantizer file.

use half::f16;
use safetensors::tensor::{Dtype, SafeTensors};

use crate::file::Fingerprint;
use crate::lut::{TOP, Table};
use crate::pack::{MAX_BITS, UNIT_CHANNELS};
use crate::side::{QuantError, Side};

/// How far a basis may be from orthogonal, in any product of two of its rows.
const ORTHOGONAL: f64 = 1e-3;

/// Widths, signposts and the transform of one side of one layer.
///
/// Places are channels in the order in which they are packed: heads stay apart, four neighbours share a width.
#[derive(Debug, Clone, PartialEq)]
pub struct MixedFit {
    /// Bits of each unit of 4 places `[C / 4]`, 0 to 7.
    pub widths: Vec<u8>,
    /// The channel in its head that each place holds `[C]`. Calibration leaves axes of values in the order of their places,
    /// which kernels then need not look up.
    pub order: Vec<u16>,
    /// Size of a step `[C]`, by place; the same for both channels of a RoPE pair of keys.
    pub steps: Vec<f32>,
    /// Entries of each place's [`Table`], one place after another, in steps.
    pub posts: Vec<i16>,
    /// What is done to a head before it is quantized, and undone afterwards. Keys: the angle by which each pair is
    /// turned `[C / 2]`; it commutes with RoPE. Values: the rows of an orthogonal basis `[kv_heads, head_dim, head_dim]`.
    pub transform: Vec<f32>,
}

/// Whether fp16 holds all numbers, as calibration makes them for bases; they take half the room then.
fn are_halves(numbers: &[f32]) -> bool {
    numbers.iter().all(|x| f16::from_f32(*x).to_f32() == *x)
}

impl MixedFit {
    /// Bytes in a quantizer file.
    pub fn file_bytes(&self) -> usize {
        let number = if are_halves(&self.transform) { 2 } else { 4 };
        let lists = 2 * (self.order.len() + self.posts.len()) + 4 * self.steps.len();
        self.widths.len() + lists + number * self.transform.len()
    }

    /// Refuses what would not decode.
    pub(crate) fn check(&self, side: Side, kv_heads: usize, head_dim: usize) -> Result<(), QuantError> {
        let channels = kv_heads * head_dim;
        let sized = |what, got: usize, expected| {
            if got == expected { Ok(()) } else { Err(QuantError::FitSize { side, what, expected, got }) }
        };
        let wrong = |problem| Err(QuantError::Mixed { side, problem });
        sized("widths", self.widths.len() * UNIT_CHANNELS, channels)?;
        sized("order", self.order.len(), channels)?;
        sized("steps", self.steps.len(), channels)?;
        if self.widths.iter().any(|&b| b as u32 > MAX_BITS) {
            return wrong("a width is above 7 bits");
        }
        let width = |place: usize| self.widths[place / UNIT_CHANNELS] as u32;
        sized("signposts", self.posts.len(), (0..channels).map(|p| Table::entries(width(p))).sum())?;
        let transform = if side == Side::Key { channels / 2 } else { channels * head_dim };
        sized("transform", self.transform.len(), transform)?;
        for head in self.order.chunks_exact(head_dim) {
            let mut seen = vec![false; head_dim];
            for &c in head {
                if c as usize >= head_dim || std::mem::replace(&mut seen[c as usize], true) {
                    return wrong("the order of a head is no permutation");
                }
            }
        }
        if side == Side::Key {
            for (order, steps) in self.order.chunks_exact(head_dim).zip(self.steps.chunks_exact(head_dim)) {
                let mut of_pair = vec![None; head_dim / 2];
                for (&c, &step) in order.iter().zip(steps) {
                    if *of_pair[c as usize / 2].get_or_insert(step) != step {
                        return wrong("a RoPE pair has two steps");
                    }
                }
            }
        }
        if self.steps.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
            return wrong("a step is not a positive number");
        }
        let mut rest = &self.posts[..];
        for place in 0..channels {
            let bits = width(place);
            let (entries, next) = rest.split_at(Table::entries(bits));
            rest = next;
            let table = Table::from_entries(entries);
            let mut before = -TOP;
            for code in 0..1u32 << bits {
                let value = table.value(bits, code as u8);
                if value < before || value > TOP {
                    return wrong("signposts are not in order, or beyond 8191 steps");
                }
                before = value;
            }
        }
        if self.transform.iter().any(|x| !x.is_finite()) {
            return wrong("the transform is not finite");
        }
        if side == Side::Value {
            for basis in self.transform.chunks_exact(head_dim * head_dim) {
                for (i, a) in basis.chunks_exact(head_dim).enumerate() {
                    for (j, b) in basis.chunks_exact(head_dim).enumerate().take(i + 1) {
                        let product: f64 = a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                        if (product - f64::from(u8::from(i == j))).abs() > ORTHOGONAL {
                            return wrong("the basis is not orthogonal");
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Names of the tensors of a side.
pub(crate) const TENSORS: [&str; 5] = ["widths", "order", "steps", "posts", "transform"];

/// Tensors of all layers of a side.
pub(crate) fn tensors(layers: &[MixedFit], prefix: &str) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
    let rows = layers.len();
    let width = |bytes: usize, size: usize| vec![rows, bytes / size / rows.max(1)];
    let name = |part: &str| format!("{prefix}.{part}");
    let widths: Vec<u8> = layers.iter().flat_map(|l| l.widths.clone()).collect();
    let order: Vec<u8> = layers.iter().flat_map(|l| &l.order).flat_map(|x| x.to_le_bytes()).collect();
    let steps: Vec<u8> = layers.iter().flat_map(|l| &l.steps).flat_map(|x| x.to_le_bytes()).collect();
    let posts: Vec<u8> = layers.iter().flat_map(|l| &l.posts).flat_map(|x| x.to_le_bytes()).collect();
    let halves = layers.iter().all(|l| are_halves(&l.transform));
    let (of_transform, transform) = if halves {
        let bytes = layers.iter().flat_map(|l| &l.transform).flat_map(|x| f16::from_f32(*x).to_le_bytes());
        (Dtype::F16, bytes.collect::<Vec<u8>>())
    } else {
        (Dtype::F32, layers.iter().flat_map(|l| &l.transform).flat_map(|x| x.to_le_bytes()).collect())
    };
    vec![
        (name("widths"), Dtype::U8, width(widths.len(), 1), widths),
        (name("order"), Dtype::U16, width(order.len(), 2), order),
        (name("steps"), Dtype::F32, width(steps.len(), 4), steps),
        (name("posts"), Dtype::I16, vec![posts.len() / 2], posts),
        (name("transform"), of_transform, width(transform.len(), if halves { 2 } else { 4 }), transform),
    ]
}

/// Reads and checks all layers of a side; an error is the field and the problem.
pub(crate) fn read(
    file: &SafeTensors<'_>,
    prefix: &str,
    side: Side,
    model: &Fingerprint,
) -> Result<Vec<MixedFit>, (String, String)> {
    let channels = model.kv_heads * model.head_dim;
    let get = |part: &str, dtype: Dtype, width: Option<usize>| {
        let field = format!("{prefix}.{part}");
        let t = file.tensor(&field).map_err(|_| (field.clone(), "is missing".to_string()))?;
        let expected = width.map(|w| vec![model.layers, w]);
        if t.dtype() != dtype || expected.as_ref().map_or(t.shape().len() != 1, |e| t.shape() != e) {
            return Err((field, format!("{:?} {:?}, expected {dtype:?} {expected:?}", t.dtype(), t.shape())));
        }
        Ok(t.data())
    };
    if !channels.is_multiple_of(UNIT_CHANNELS) {
        return Err((prefix.to_string(), format!("{channels} channels, not a multiple of 4")));
    }
    let transform = if side == Side::Key { channels / 2 } else { channels * model.head_dim };
    let widths = get("widths", Dtype::U8, Some(channels / UNIT_CHANNELS))?.chunks_exact(channels / UNIT_CHANNELS);
    let order = get("order", Dtype::U16, Some(channels))?.as_chunks().0.chunks_exact(channels);
    let steps = get("steps", Dtype::F32, Some(channels))?.as_chunks().0.chunks_exact(channels);
    let mut posts = get("posts", Dtype::I16, None)?.as_chunks().0;
    let transforms: Vec<f32> = match get("transform", Dtype::F16, Some(transform)) {
        Ok(halves) => halves.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Err(_) => {
            let floats = get("transform", Dtype::F32, Some(transform))?.as_chunks().0;
            floats.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }
    };
    let mut layers = Vec::with_capacity(model.layers);
    for (l, (((widths, order), steps), transform)) in
        widths.zip(order).zip(steps).zip(transforms.chunks_exact(transform)).enumerate()
    {
        let entries: usize = widths.iter().map(|&b| UNIT_CHANNELS * Table::entries((b as u32).min(MAX_BITS))).sum();
        let of_layer = posts.split_at_checked(entries);
        let (own, rest) = of_layer.ok_or((format!("{prefix}.posts"), format!("ends within layer {l}")))?;
        posts = rest;
        let fit = MixedFit {
            widths: widths.to_vec(),
            order: order.iter().map(|b| u16::from_le_bytes(*b)).collect(),
            steps: steps.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            posts: own.iter().map(|b| i16::from_le_bytes(*b)).collect(),
            transform: transform.to_vec(),
        };
        fit.check(side, model.kv_heads, model.head_dim).map_err(|e| (prefix.to_string(), format!("layer {l}: {e}")))?;
        layers.push(fit);
    }
    if posts.is_empty() {
        Ok(layers)
    } else {
        Err((format!("{prefix}.posts"), "has more entries than the widths".into()))
    }
}
