//! A side in the axes in which it is quantized, with books of all widths for every channel.

use half::f16;
use kvquant_quant::Side;
use rayon::prelude::*;

use super::channel::Channel;
use super::transform;
use crate::fit::SideData;

/// Codebooks of one side of one layer.
pub(crate) struct Books {
    pub side: Side,
    pub head_dim: usize,
    /// See [`kvquant_quant::MixedFit`].
    pub transform: Vec<f32>,
    /// `[C]`, after the transform.
    pub channels: Vec<Channel>,
}

impl Books {
    /// Fits all widths; the first `sinks` tokens of each window are left out.
    pub(crate) fn new(mut data: SideData, sinks: usize) -> Self {
        let width = data.kv_heads * data.head_dim;
        let keep = |x: &[f32]| -> Vec<f32> {
            x.chunks_exact(data.ctx * width).flat_map(|window| &window[sinks * width..]).copied().collect()
        };
        (data.values, data.gradients) = (keep(&data.values), keep(&data.gradients));
        let transform = match data.side {
            Side::Key => {
                let angles = transform::key_angles(&data.values, width);
                for x in [&mut data.values, &mut data.gradients] {
                    transform::turn(x, &angles);
                }
                angles
            }
            Side::Value => {
                let mut bases = transform::value_bases(&data.values, width, data.head_dim);
                // As they are stored.
                bases.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
                // The basis is orthogonal: gradients turn as values do.
                for x in [&mut data.values, &mut data.gradients] {
                    transform::project(x, &bases, data.head_dim);
                }
                bases
            }
        };
        let channels = (0..width)
            .into_par_iter()
            .map(|c| {
                let column = |x: &[f32]| -> Vec<f32> { x.iter().skip(c).step_by(width).copied().collect() };
                Channel::new(&column(&data.values), &column(&data.gradients))
            })
            .collect();
        Books { side: data.side, head_dim: data.head_dim, transform, channels }
    }
}
