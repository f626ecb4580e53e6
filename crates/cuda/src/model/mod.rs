//! A model's forward pass on a card, with a cache of this crate.
//!
//! ```text
//! weights    matrices in fp16, those with the same input as one
//! rows       what lies between the products: norms, heads, gates   (kernels/model.cu)
//! work       buffers of a pass
//! history    what layers have stored, and attention over it
//! sequence   tokens after a history, to logits
//! ```
//!
//! The residual stream and all sums are f32; products read fp16 and sum in f32 (`blas`).

mod history;
mod rows;
mod sequence;
mod weights;
mod work;

use std::sync::Arc;

use kvquant_kernels::rowwise::Activation;
use kvquant_model::sequence::{Engine, Sequence};
use kvquant_model::{Config, ForwardError, Model};
use kvquant_quant::{Fingerprint, Quantizer, Spec};

use crate::CudaError;
use crate::blas::{self, Blas};
use crate::device::Device;
use rows::Widths;
pub use sequence::OnGpu;
use weights::Weights;

/// A model whose weights lie on a card. Clones share them.
#[derive(Clone)]
pub struct GpuModel {
    parts: Arc<Parts>,
}

/// What all sequences on a model share.
pub struct Parts {
    device: Device,
    blas: Blas,
    weights: Weights,
    config: Config,
    widths: Widths,
    fingerprint: Fingerprint,
}

impl std::ops::Deref for GpuModel {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

/// Whether a model and a cache can be on a card; needs none.
///
/// # Errors
/// Names what can't, and what can.
pub fn supports(model: &Model, spec: Option<&Spec>) -> Result<(), CudaError> {
    let c = &model.config;
    let refused = |what: String, supported| Err(CudaError::Unsupported { what, supported });
    if let Some(layer) = model.attention.iter().position(|a| a.window.is_some()) {
        return refused(
            format!("sliding windows (layer {layer} of {})", c.name),
            "models whose layers see the whole context; compute on the CPU (--device cpu)",
        );
    }
    if ![64, 128, 256].contains(&c.head_dim) {
        return refused(format!("a head dimension of {}", c.head_dim), "64, 128 and 256");
    }
    if c.kv_heads * c.head_dim > 8192 {
        return refused(format!("{} channels of keys", c.kv_heads * c.head_dim), "up to 8192");
    }
    if !c.hidden.is_multiple_of(8) || !c.intermediate.is_multiple_of(8) {
        return refused(format!("widths of {} and {}", c.hidden, c.intermediate), "multiples of 8");
    }
    spec.map_or(Ok(()), history::check_spec)
}

impl GpuModel {
    /// Brings a model to a card; `progress(done, total)` counts layers.
    ///
    /// # Errors
    /// The model is not supported, cuBLASLt is missing, or the card's memory is short.
    pub fn new(device: Device, model: &Model, progress: &mut dyn FnMut(usize, usize)) -> Result<Self, CudaError> {
        supports(model, None)?;
        let c = &model.config;
        let widths = Widths {
            hidden: c.hidden,
            intermediate: c.intermediate,
            heads: c.heads,
            kv_heads: c.kv_heads,
            dim: c.head_dim,
            eps: c.norm_eps,
            gelu: c.family.activation == Activation::GeluTanh,
        };
        let blas = Blas::new(&device)?;
        let weights = Weights::new(&device, model, progress)?;
        let (config, fingerprint) = (c.clone(), model.fingerprint.clone());
        Ok(GpuModel { parts: Arc::new(Parts { device, blas, weights, config, widths, fingerprint }) })
    }

    /// The card.
    pub fn device(&self) -> &Device {
        &self.parts.device
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// The spec is not supported, its quantizer is missing or of another model, or memory is short.
    pub fn start(&self, spec: &Spec, quantizer: Option<&Quantizer>) -> Result<OnGpu, ForwardError> {
        OnGpu::new(self.clone(), spec, quantizer)
    }
}

impl Engine for GpuModel {
    fn sequence(&self, spec: &Spec, quantizer: Option<&Quantizer>) -> Result<Box<dyn Sequence + '_>, ForwardError> {
        Ok(Box::new(self.start(spec, quantizer)?))
    }
}

/// Whether the libraries that a forward pass needs can be loaded, apart from the driver.
///
/// # Errors
/// Names the one that is missing.
pub fn check_libraries() -> Result<(), CudaError> {
    blas::find()
}

impl From<CudaError> for ForwardError {
    fn from(e: CudaError) -> Self {
        ForwardError::Device(Box::new(e))
    }
}
