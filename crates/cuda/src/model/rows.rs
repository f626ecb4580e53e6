//! Launches of kernels/model.cu: what lies between the products.
#![allow(unsafe_code)]

use cudarc::driver::DeviceRepr;

use crate::CudaError;
use crate::device::{Arg, Buffer, Device, Start};
use crate::modules::{Build, Source};

const THREADS: usize = 256;

/// Constants of a model that these kernels need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Widths {
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub eps: f32,
    pub gelu: bool,
}

#[repr(C)]
struct NormArgs {
    pointers: [u64; 7],
    layer: u32,
    n: u32,
    eps: f32,
}
// SAFETY: plain numbers in the order of kernels/model.cu.
unsafe impl DeviceRepr for NormArgs {}

#[repr(C)]
struct HeadsArgs {
    pointers: [u64; 9],
    heads: u32,
    kv_heads: u32,
    scale: f32,
    eps: f32,
}
// SAFETY: plain numbers in the order of kernels/model.cu.
unsafe impl DeviceRepr for HeadsArgs {}

fn at(b: Option<&Buffer>) -> u64 {
    b.map_or(0, Buffer::at)
}

/// Every buffer that is given has at least so many bytes.
fn room<const N: usize>(needed: [(Option<&Buffer>, usize); N]) -> Result<(), CudaError> {
    let fits = |(b, n): &(Option<&Buffer>, usize)| b.is_none_or(|b| b.bytes() >= *n);
    if needed.iter().all(fits) {
        Ok(())
    } else {
        Err(CudaError::Append { problem: "a buffer of the model is too small" })
    }
}

impl Widths {
    fn function(&self, device: &Device, name: &'static str) -> Result<cudarc::driver::CudaFunction, CudaError> {
        device.function(&Build::plain(Source::Model, self.dim), name, 0)
    }

    /// Channels of a token's queries, keys and values.
    pub fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// x `[rows][hidden]` from the rows of the table that tokens name; they are below the table's length.
    pub fn embed(
        &self,
        device: &Device,
        tokens: &Buffer,
        table: &Buffer,
        x: &Buffer,
        rows: usize,
        scale: f32,
    ) -> Result<(), CudaError> {
        room([(Some(tokens), rows * 4), (Some(x), rows * self.hidden * 4)])?;
        let f = self.function(device, "embed")?;
        let args = [
            Arg::Long(tokens.at()),
            Arg::Long(table.at()),
            Arg::Long(x.at()),
            Arg::Word(self.hidden as u32),
            Arg::Float(scale),
        ];
        // SAFETY: the arguments of `embed`; a row for each block of threads (checked above), tokens name rows of the table
        // (checked by the forward pass).
        unsafe { device.launch(&f, [rows, 1, 1], THREADS, &args, Start::Early) }
    }

    /// x += y, then out = norm(x) in fp16 where there is a weight. `first` is a row of x (y is whole).
    pub fn add_norm(
        &self,
        device: &Device,
        x: (&Buffer, usize),
        added: Option<Added<'_>>,
        weight: Option<&Buffer>,
        out: &Buffer,
        rows: usize,
        (status, layer): (&Buffer, usize),
    ) -> Result<(), CudaError> {
        let (x, first) = x;
        let n = self.hidden;
        let (y, scales, post) = added.map_or((None, None, None), |a| (Some(a.y), a.scales, a.post));
        room([
            (Some(x), (first + rows) * n * 4),
            (y, rows * n * 4),
            (scales, rows * 4),
            (post, n * 4),
            (weight, n * 4),
            (Some(out), rows * n * 2),
            (Some(status), 8),
        ])?;
        let f = self.function(device, "add_norm")?;
        let args = NormArgs {
            pointers: [
                x.at() + (first * n * 4) as u64,
                at(y),
                at(scales),
                at(post),
                at(weight),
                out.at(),
                // The second word: kernels/append.cu has the first.
                status.at() + 4,
            ],
            layer: layer as u32,
            n: n as u32,
            eps: self.eps,
        };
        // SAFETY: the argument of `add_norm`; sizes checked above.
        unsafe { device.launch_early(&f, [rows, 1, 1], THREADS, 0, &args) }
    }

    /// Rows of one product to queries (turned where there are angles, times `scale`), keys and values.
    pub fn heads(
        &self,
        device: &Device,
        qkv: &Buffer,
        with: &HeadWeights<'_>,
        angles: Option<&Buffer>,
        scale: f32,
        [q, k, v]: [&Buffer; 3],
        rows: usize,
    ) -> Result<(), CudaError> {
        let (wide, narrow) = (self.heads * self.dim, self.kv_heads * self.dim);
        room([
            (Some(qkv), rows * self.qkv() * 4),
            (with.bias, self.qkv() * 4),
            (with.q_norm, self.dim * 4),
            (with.k_norm, self.dim * 4),
            (with.q_scale, self.dim * 4),
            (angles, rows * self.dim * 4),
            (Some(q), rows * wide * 4),
            (Some(k), rows * narrow * 4),
            (Some(v), rows * narrow * 4),
        ])?;
        let f = self.function(device, "heads")?;
        let args = HeadsArgs {
            pointers: [
                qkv.at(),
                at(with.bias),
                at(with.q_norm),
                at(with.k_norm),
                at(with.q_scale),
                at(angles),
                q.at(),
                k.at(),
                v.at(),
            ],
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            scale,
            eps: self.eps,
        };
        // SAFETY: the argument of `heads`; sizes checked above.
        unsafe { device.launch_early(&f, [self.heads + 2 * self.kv_heads, rows, 1], self.dim / 2, 0, &args) }
    }

    /// Attention's output to fp16 `[rows][heads][dim]`, from f32 `[heads][rows][dim]`.
    pub fn attended(&self, device: &Device, x: &Buffer, out: &Buffer, rows: usize) -> Result<(), CudaError> {
        let pairs = rows * self.heads * self.dim / 2;
        room([(Some(x), pairs * 8), (Some(out), pairs * 4)])?;
        let f = self.function(device, "attended")?;
        let args = [
            Arg::Long(x.at()),
            Arg::Long(out.at()),
            Arg::Word(rows as u32),
            Arg::Word(self.heads as u32),
            Arg::Word(pairs as u32),
        ];
        // SAFETY: the arguments of `attended`; sizes checked above.
        unsafe { device.launch(&f, [pairs.div_ceil(THREADS), 1, 1], THREADS, &args, Start::Early) }
    }

    /// gate_up `[rows][2][intermediate]` to the input of the last product, `out`, and what each row of that is divided by.
    pub fn gate(
        &self,
        device: &Device,
        gate_up: &Buffer,
        out: &Buffer,
        scales: &Buffer,
        rows: usize,
    ) -> Result<(), CudaError> {
        let n = self.intermediate;
        room([(Some(gate_up), rows * n * 8), (Some(out), rows * n * 2), (Some(scales), rows * 4)])?;
        let f = self.function(device, "gate")?;
        let args = [
            Arg::Long(gate_up.at()),
            Arg::Long(out.at()),
            Arg::Long(scales.at()),
            Arg::Word(n as u32),
            Arg::Word(self.gelu as u32),
        ];
        let threads = (n / 2).div_ceil(32).clamp(1, 32) * 32;
        // SAFETY: the arguments of `gate`; sizes checked above.
        unsafe { device.launch(&f, [rows, 1, 1], threads, &args, Start::Early) }
    }
}

/// What is added to the residual stream: y times its rows' scales, normed where there are weights for that.
pub(crate) struct Added<'a> {
    pub y: &'a Buffer,
    pub scales: Option<&'a Buffer>,
    pub post: Option<&'a Buffer>,
}

/// What heads go through before attention.
pub(crate) struct HeadWeights<'a> {
    pub bias: Option<&'a Buffer>,
    pub q_norm: Option<&'a Buffer>,
    pub k_norm: Option<&'a Buffer>,
    pub q_scale: Option<&'a Buffer>,
}
