//! One layer in f32: forward, and the gradients of its keys, values and input.
//!
//! Only gradients of activations are formed, never of weights. The backward pass computes the layer again from
//! its input and the attention output that the forward pass kept: recomputing attention as well would cost two of
//! its nine products per window for the memory of one more `[tokens, hidden]` a layer.

use kvquant_kernels::rope::Rotation;
use kvquant_model::{Config, forward::Layer};

use crate::attention::{Attended, Heads};
use crate::ops;

/// A layer's weights as f32, `[outputs, inputs]` row-major; an absent bias is empty.
pub(crate) struct DenseLayer {
    heads: Heads,
    eps: f32,
    hidden: usize,
    attn_norm: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q_bias: Vec<f32>,
    k_bias: Vec<f32>,
    v_bias: Vec<f32>,
    o: Vec<f32>,
    ffn_norm: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

/// What the forward pass keeps of a layer.
pub(crate) struct Kept {
    /// The layer's input `[tokens, hidden]`.
    pub input: Vec<f32>,
    pub attended: Attended,
}

/// Queries and keys after the bias; keys and queries also turned to their positions.
struct Projected {
    q: Vec<f32>,
    k_pre: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Keys (after the bias, before RoPE) and values with their gradients, `[tokens, kv_heads, head_dim]`, and the
/// gradient of the layer's input `[tokens, hidden]`.
pub(crate) struct LayerGrads {
    pub keys: Vec<f32>,
    pub d_keys: Vec<f32>,
    pub values: Vec<f32>,
    pub d_values: Vec<f32>,
    pub d_input: Vec<f32>,
}

impl DenseLayer {
    pub(crate) fn new(config: &Config, layer: &Layer) -> Self {
        let bias = |b: &Option<Vec<f32>>| b.clone().unwrap_or_default();
        DenseLayer {
            heads: Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim },
            eps: config.norm_eps,
            hidden: config.hidden,
            attn_norm: layer.attn_norm.clone(),
            q: layer.q.dequant(),
            k: layer.k.dequant(),
            v: layer.v.dequant(),
            q_bias: bias(&layer.q_bias),
            k_bias: bias(&layer.k_bias),
            v_bias: bias(&layer.v_bias),
            o: layer.o.dequant(),
            ffn_norm: layer.ffn_norm.clone(),
            gate: layer.gate.dequant(),
            up: layer.up.dequant(),
            down: layer.down.dequant(),
        }
    }

    fn q_width(&self) -> usize {
        self.heads.heads * self.heads.head_dim
    }

    fn kv_width(&self) -> usize {
        self.heads.kv_heads * self.heads.head_dim
    }

    fn project(&self, x: &[f32], rotations: &[Rotation], edit: &dyn Fn(&mut [f32], &mut [f32])) -> Projected {
        let tokens = x.len() / self.hidden;
        let normed = ops::rms_norm(x, &self.attn_norm, self.eps);
        let side = |weight: &[f32], bias: &[f32], width: usize| {
            let mut y = vec![0.0; tokens * width];
            ops::linear(&normed, weight, self.hidden, &mut y, false);
            ops::add_bias(&mut y, bias);
            y
        };
        let mut q = side(&self.q, &self.q_bias, self.q_width());
        let mut k_pre = side(&self.k, &self.k_bias, self.kv_width());
        let mut v = side(&self.v, &self.v_bias, self.kv_width());
        edit(&mut k_pre, &mut v);
        let mut k = k_pre.clone();
        ops::rotate(&mut q, self.q_width(), rotations);
        ops::rotate(&mut k, self.kv_width(), rotations);
        Projected { q, k_pre, k, v }
    }

    /// x + attention output, `[tokens, hidden]`.
    fn after_attention(&self, x: &[f32], attended: &Attended) -> Vec<f32> {
        let mut mid = x.to_vec();
        ops::linear(&attended.out, &self.o, self.q_width(), &mut mid, true);
        mid
    }

    /// Gate and up projections `[tokens, intermediate]`.
    fn gate_up(&self, mid: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let normed = ops::rms_norm(mid, &self.ffn_norm, self.eps);
        let size = mid.len() / self.hidden * (self.gate.len() / self.hidden);
        let (mut gate, mut up) = (vec![0.0; size], vec![0.0; size]);
        ops::linear(&normed, &self.gate, self.hidden, &mut gate, false);
        ops::linear(&normed, &self.up, self.hidden, &mut up, false);
        (gate, up)
    }

    /// The layer's output, and what its backward pass needs. `edit` may change keys and values: the finite
    /// differences of the tests do.
    pub(crate) fn forward(
        &self,
        input: Vec<f32>,
        rotations: &[Rotation],
        edit: &dyn Fn(&mut [f32], &mut [f32]),
    ) -> (Vec<f32>, Kept) {
        let p = self.project(&input, rotations, edit);
        let attended = self.heads.forward(&p.q, &p.k, &p.v);
        let mut mid = self.after_attention(&input, &attended);
        let (mut gate, up) = self.gate_up(&mid);
        ops::swiglu(&mut gate, &up);
        ops::linear(&gate, &self.down, self.down.len() / self.hidden, &mut mid, true);
        (mid, Kept { input, attended })
    }

    /// From the gradient of the layer's output to those of its keys, values and input.
    pub(crate) fn backward(&self, kept: &Kept, d_out: Vec<f32>, rotations: &[Rotation]) -> LayerGrads {
        let Kept { input, attended } = kept;
        let mut d_mid = d_out;
        let mut d_normed = vec![0.0; d_mid.len()];
        let mid = self.after_attention(input, attended);
        {
            let (mut gate, mut up) = self.gate_up(&mid);
            let mut d_act = vec![0.0; gate.len()];
            ops::linear_back(&d_mid, &self.down, self.down.len() / self.hidden, &mut d_act, false);
            ops::swiglu_back(&mut gate, &mut up, &d_act);
            ops::linear_back(&gate, &self.gate, self.hidden, &mut d_normed, false);
            ops::linear_back(&up, &self.up, self.hidden, &mut d_normed, true);
        }
        ops::rms_norm_back(&mid, &self.ffn_norm, self.eps, &d_normed, &mut d_mid);

        let mut d_attended = vec![0.0; attended.out.len()];
        ops::linear_back(&d_mid, &self.o, self.q_width(), &mut d_attended, false);
        let p = self.project(input, rotations, &|_, _| {});
        let grads = self.heads.backward(&p.q, &p.k, &p.v, attended, &d_attended);
        let d_q = ops::rotate_back(&grads.q, self.q_width(), rotations);
        let d_keys = ops::rotate_back(&grads.k, self.kv_width(), rotations);
        ops::linear_back(&d_q, &self.q, self.hidden, &mut d_normed, false);
        ops::linear_back(&d_keys, &self.k, self.hidden, &mut d_normed, true);
        ops::linear_back(&grads.v, &self.v, self.hidden, &mut d_normed, true);
        ops::rms_norm_back(input, &self.attn_norm, self.eps, &d_normed, &mut d_mid);
        LayerGrads { keys: p.k_pre, d_keys, values: p.v, d_values: grads.v, d_input: d_mid }
    }
}
