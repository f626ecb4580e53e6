//! What a forward pass works in: buffers for so many rows, kept from pass to pass.

use super::GpuModel;
use super::rows::Widths;
use crate::CudaError;
use crate::device::Buffer;
use crate::exact::ExactCache;
use crate::layer::BLOCK;
use crate::prefill::{Prefill, SECTION};

pub(super) struct Work {
    /// Rows that there is room for.
    pub rows: usize,
    pub tokens: Buffer,
    /// The residual stream `[rows][hidden]`
    pub x: Buffer,
    /// What is added to it next
    pub y: Buffer,
    /// fp16 `[rows][hidden]`
    pub normed: Buffer,
    pub qkv: Buffer,
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    /// Attention's output in fp16
    pub attended: Buffer,
    pub gate_up: Buffer,
    pub gated: Buffer,
    /// What rows of `gated` are divided by
    pub scales: Buffer,
    /// cos and sin of the rows' positions, one for each rotation of the model
    pub angles: Vec<Buffer>,
    pub prefill: Prefill,
    /// A chunk's own keys and values in fp16, for exact prefill over codes
    pub own: Option<ExactCache>,
    /// Blocks decoded for prefill
    pub dense: Option<Buffer>,
    pub logits: Buffer,
}

impl Work {
    pub fn new(model: &GpuModel, rows: usize, coded: bool) -> Result<Self, CudaError> {
        let (d, c) = (model.device(), &model.config);
        let Widths { hidden, intermediate, heads, kv_heads, dim, .. } = model.widths;
        let (wide, narrow) = (heads * dim, kv_heads * dim);
        let room = |width: usize, bytes: usize| d.room(rows * width * bytes);
        let prefill = coded && rows > 1;
        Ok(Work {
            rows,
            tokens: room(1, 4)?,
            x: room(hidden, 4)?,
            y: room(hidden, 4)?,
            normed: room(hidden, 2)?,
            qkv: room(model.widths.qkv(), 4)?,
            q: room(wide, 4)?,
            k: room(narrow, 4)?,
            v: room(narrow, 4)?,
            attended: room(wide, 2)?,
            gate_up: room(2 * intermediate, 4)?,
            gated: room(intermediate, 2)?,
            scales: room(1, 4)?,
            angles: c.rotary.iter().map(|_| room(dim, 4)).collect::<Result<_, _>>()?,
            prefill: Prefill::room(d, if rows > 1 { rows } else { 0 }, heads, kv_heads, dim)?,
            own: prefill.then(|| ExactCache::new(d, kv_heads, dim, rows)).transpose()?,
            dense: prefill.then(|| d.room(2 * narrow * SECTION * BLOCK * 2)).transpose()?,
            logits: d.room(c.vocab * 4)?,
        })
    }
}
