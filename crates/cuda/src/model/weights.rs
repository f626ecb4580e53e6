//! A model's weights on a card, in fp16.

use std::sync::Arc;

use half::f16;
use kvquant_kernels::weights::Weight;
use kvquant_model::{Layer, Model};
use rayon::prelude::*;

use crate::CudaError;
use crate::blas::Matrix;
use crate::device::{Buffer, Device};

/// One layer: matrices that read the same input are one.
pub(crate) struct LayerWeights {
    pub attn_norm: Buffer,
    /// `[heads + 2 * kv_heads][dim]` rows
    pub qkv: Matrix,
    pub bias: Option<Buffer>,
    pub q_norm: Option<Buffer>,
    pub k_norm: Option<Buffer>,
    pub o: Matrix,
    pub post_attn_norm: Option<Buffer>,
    pub ffn_norm: Buffer,
    /// `[2][intermediate]` rows
    pub gate_up: Matrix,
    pub down: Matrix,
    pub post_ffn_norm: Option<Buffer>,
}

/// All of a model.
pub(crate) struct Weights {
    pub embed: Arc<Matrix>,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Buffer,
    pub head: Arc<Matrix>,
    /// What a head's queries are multiplied with, rotation by rotation.
    pub query_scales: Vec<Option<Buffer>>,
}

/// Rows of matrices, one below the other, as fp16: a weight of 4 bits and its scale keep 11 bits of their product.
fn matrix(device: &Device, parts: &[&Weight]) -> Result<Matrix, CudaError> {
    let cols = parts[0].cols();
    let rows: usize = parts.iter().map(|w| w.rows()).sum();
    let mut all = vec![0u16; rows * cols];
    let mut rest = &mut all[..];
    let mut fits = true;
    for w in parts {
        let (part, next) = rest.split_at_mut(w.rows() * cols);
        rest = next;
        fits &= part
            .par_chunks_mut(cols)
            .enumerate()
            .map_init(
                || vec![0.0; cols],
                |row, (r, out)| {
                    w.dequant_row(r, row);
                    out.iter_mut().zip(row.iter()).for_each(|(o, x)| *o = f16::from_f32(*x).to_bits());
                    row.iter().all(|x| x.abs() <= f16::MAX.to_f32())
                },
            )
            .reduce(|| true, |a, b| a & b);
    }
    if !fits {
        return Err(CudaError::Unsupported {
            what: "weights beyond fp16".into(),
            supported: "weights up to 65504, which are kept in fp16",
        });
    }
    Matrix::new(device, &all, cols)
}

fn layer(device: &Device, l: &Layer) -> Result<LayerWeights, CudaError> {
    let some = |v: &Option<Vec<f32>>| v.as_ref().map(|v| device.upload(v)).transpose();
    let biases = [&l.q_bias, &l.k_bias, &l.v_bias];
    let bias = biases.iter().any(|b| b.is_some()).then(|| {
        let of = |(b, w): (&&Option<Vec<f32>>, &Weight)| b.as_ref().cloned().unwrap_or_else(|| vec![0.0; w.rows()]);
        biases.iter().zip([&l.q, &l.k, &l.v]).flat_map(of).collect::<Vec<f32>>()
    });
    Ok(LayerWeights {
        attn_norm: device.upload(&l.attn_norm)?,
        qkv: matrix(device, &[&l.q, &l.k, &l.v])?,
        bias: some(&bias)?,
        q_norm: some(&l.q_norm)?,
        k_norm: some(&l.k_norm)?,
        o: matrix(device, &[&l.o])?,
        post_attn_norm: some(&l.post_attn_norm)?,
        ffn_norm: device.upload(&l.ffn_norm)?,
        gate_up: matrix(device, &[&l.gate, &l.up])?,
        down: matrix(device, &[&l.down])?,
        post_ffn_norm: some(&l.post_ffn_norm)?,
    })
}

impl Weights {
    /// `progress(done, total)` counts layers.
    pub fn new(device: &Device, model: &Model, progress: &mut dyn FnMut(usize, usize)) -> Result<Self, CudaError> {
        let total = model.layers.len();
        let embed = Arc::new(matrix(device, &[&model.embed])?);
        let tied = Arc::ptr_eq(&model.embed, &model.head);
        let head = if tied { embed.clone() } else { Arc::new(matrix(device, &[&model.head])?) };
        let mut layers = Vec::with_capacity(total);
        for (i, l) in model.layers.iter().enumerate() {
            progress(i, total);
            layers.push(layer(device, l)?);
        }
        progress(total, total);
        let scale = |s: &Vec<f32>| (!s.is_empty()).then(|| device.upload(s)).transpose();
        Ok(Weights {
            embed,
            layers,
            final_norm: device.upload(&model.final_norm)?,
            head,
            query_scales: model.config.rotary.iter().map(|r| scale(&r.query_scale)).collect::<Result<_, _>>()?,
        })
    }
}
