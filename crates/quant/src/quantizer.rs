use half::f16;
use crate::{CodedSpec, LayerFit};
/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)] pub enum Side { Key, Value }
/// Decode table: signposts per channel `[C][2^b]` (scale and zero folded in: x = lut[c][code]), or one for all `[2^b]` (x = zero + scale*lut[code] with the token's fp16 scale and zero)
#[derive(Debug, Clone)] pub struct Lut { pub per_channel: bool, pub bits: u32, pub table: Vec<f32> }
/// Residual against the dense reconstruction that is stored: x = dense + residual.
#[derive(Debug, Clone, Copy, PartialEq)] pub struct Outlier { pub channel: u16, pub residual: f16 }
/// One token's quantized K or V of one layer, before packing.
#[derive(Debug, Clone, Default)] pub struct TokenCodes { pub codes: Vec<u8>, pub scale: Vec<f16>, pub zero: Vec<f16>, pub outliers: Vec<Outlier> }
/// Quantizes one layer's keys or values, a token `[C = kv_heads * head_dim]` at a time.
#[derive(Debug, Clone)] pub struct SideQuantizer { lut: Lut, groups: usize, group_channels: usize }
#[derive(Debug, thiserror::Error)] pub enum QuantError { #[error("channel {channel} is not a finite fp16 number ({value})")] NotFinite { channel: usize, value: f32 }, #[error("{0}")] Invalid(String) }
impl SideQuantizer {
    /// `fit`: the layer's calibration, needed when the spec needs one for this side.
    pub fn new(_spec: &CodedSpec, _side: Side, _kv_heads: usize, _head_dim: usize, _fit: Option<&LayerFit>) -> Result<Self, QuantError> { todo!() }
    pub fn lut(&self) -> &Lut { &self.lut }
    /// Scale groups per token (0: all static per channel).
    pub fn groups(&self) -> usize { self.groups }
    /// Channels that share one per-token scale (C for token scope).
    pub fn group_channels(&self) -> usize { self.group_channels }
    /// Whether a zero point is stored beside each scale.
    pub fn has_zero_point(&self) -> bool { todo!() }
    pub fn quantize(&self, _x: &[f32], _out: &mut TokenCodes) -> Result<(), QuantError> { todo!() }
    /// Scalar oracle: what the packed block must decode to, bit for bit.
    pub fn dequantize(&self, _codes: &TokenCodes, _out: &mut [f32]) { todo!() }
}
