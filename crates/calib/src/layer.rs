//! One layer in f32: forward, and the gradients of its keys, values and input.
//!
//! Only gradients of activations are formed, never of weights. The backward pass computes the layer again from
//! its input and the attention output that the forward pass kept: recomputing attention as well would cost two of
//! its nine products per window for the memory of one more `[tokens, hidden]` a layer.

use kvquant_kernels::rope::Rotation;
use kvquant_kernels::rowwise::Activation;
use kvquant_model::{Config, forward::Layer};

use crate::attention::{Attended, Heads};
use crate::ops;

/// A layer's weights as f32, `[outputs, inputs]` row-major; an absent bias, norm or scale is empty.
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
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    query_scale: Vec<f32>,
    o: Vec<f32>,
    post_attn_norm: Vec<f32>,
    ffn_norm: Vec<f32>,
    activation: Activation,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    post_ffn_norm: Vec<f32>,
}

/// What the forward pass keeps of a layer.
pub(crate) struct Kept {
    /// The layer's input `[tokens, hidden]`.
    pub input: Vec<f32>,
    pub attended: Attended,
}

/// Queries and keys: after the bias (before a norm of their heads, where there is one), before and after RoPE.
struct Projected {
    q_raw: Vec<f32>,
    k_raw: Vec<f32>,
    q: Vec<f32>,
    k_pre: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Keys (after bias and norm, before RoPE) and values with their gradients, `[tokens, kv_heads, head_dim]`, and the
/// gradient of the layer's input `[tokens, hidden]`.
pub(crate) struct LayerGrads {
    pub keys: Vec<f32>,
    pub d_keys: Vec<f32>,
    pub values: Vec<f32>,
    pub d_values: Vec<f32>,
    pub d_input: Vec<f32>,
}

impl DenseLayer {
    /// Layer `i` of a model.
    pub(crate) fn new(config: &Config, i: usize, layer: &Layer) -> Self {
        let bias = |b: &Option<Vec<f32>>| b.clone().unwrap_or_default();
        let attention = config.attention[i];
        DenseLayer {
            heads: Heads {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                window: attention.window,
            },
            eps: config.norm_eps,
            hidden: config.hidden,
            attn_norm: layer.attn_norm.clone(),
            q: layer.q.dequant(),
            k: layer.k.dequant(),
            v: layer.v.dequant(),
            q_bias: bias(&layer.q_bias),
            k_bias: bias(&layer.k_bias),
            v_bias: bias(&layer.v_bias),
            q_norm: bias(&layer.q_norm),
            k_norm: bias(&layer.k_norm),
            query_scale: config.rotary[attention.rotary].query_scale.clone(),
            o: layer.o.dequant(),
            post_attn_norm: bias(&layer.post_attn_norm),
            activation: config.family.activation,
            ffn_norm: layer.ffn_norm.clone(),
            gate: layer.gate.dequant(),
            up: layer.up.dequant(),
            down: layer.down.dequant(),
            post_ffn_norm: bias(&layer.post_ffn_norm),
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
        let q_raw = side(&self.q, &self.q_bias, self.q_width());
        let k_raw = side(&self.k, &self.k_bias, self.kv_width());
        let mut v = side(&self.v, &self.v_bias, self.kv_width());
        let mut q = self.norm(&q_raw, &self.q_norm);
        let mut k_pre = self.norm(&k_raw, &self.k_norm);
        edit(&mut k_pre, &mut v);
        ops::scale_rows(&mut q, &self.query_scale);
        let mut k = k_pre.clone();
        ops::rotate(&mut q, self.q_width(), rotations);
        ops::rotate(&mut k, self.kv_width(), rotations);
        Projected { q_raw, k_raw, q, k_pre, k, v }
    }

    /// RMS norm of rows as long as the weight; a copy where there is none.
    fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        if weight.is_empty() { x.to_vec() } else { ops::rms_norm(x, weight, self.eps) }
    }

    /// The input gradient of [`norm`](Self::norm).
    fn norm_back(&self, x: &[f32], weight: &[f32], d: Vec<f32>) -> Vec<f32> {
        if weight.is_empty() {
            return d;
        }
        let mut dx = vec![0.0; x.len()];
        ops::rms_norm_back(x, weight, self.eps, &d, &mut dx);
        dx
    }

    /// Attention output through its projection, before its norm `[tokens, hidden]`.
    fn projected(&self, attended: &Attended) -> Vec<f32> {
        let mut out = vec![0.0; attended.out.len() / self.q_width() * self.hidden];
        ops::linear(&attended.out, &self.o, self.q_width(), &mut out, false);
        out
    }

    /// x + attention output, `[tokens, hidden]`.
    fn after_attention(&self, x: &[f32], projected: &[f32]) -> Vec<f32> {
        let mut mid = self.norm(projected, &self.post_attn_norm);
        mid.iter_mut().zip(x).for_each(|(m, x)| *m += x);
        mid
    }

    /// The MLP's output before its norm, of an activated gate `[tokens, hidden]`.
    fn mlp(&self, act: &[f32]) -> Vec<f32> {
        let width = self.down.len() / self.hidden;
        let mut out = vec![0.0; act.len() / width * self.hidden];
        ops::linear(act, &self.down, width, &mut out, false);
        out
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

    /// The layer's output, and what its backward pass needs. `edit` may change keys and values: tuning
    /// quantizes them there.
    pub(crate) fn forward(
        &self,
        input: Vec<f32>,
        rotations: &[Rotation],
        edit: &dyn Fn(&mut [f32], &mut [f32]),
    ) -> (Vec<f32>, Kept) {
        let p = self.project(&input, rotations, edit);
        let attended = self.heads.forward(&p.q, &p.k, &p.v);
        let mut mid = self.after_attention(&input, &self.projected(&attended));
        let (mut gate, up) = self.gate_up(&mid);
        ops::gated(self.activation, &mut gate, &up);
        let out = self.norm(&self.mlp(&gate), &self.post_ffn_norm);
        mid.iter_mut().zip(&out).for_each(|(m, o)| *m += o);
        (mid, Kept { input, attended })
    }

    /// From the gradient of the layer's output to those of its keys, values and input. `edit` is that of the forward pass;
    /// what it changes counts as passed straight through.
    pub(crate) fn backward(
        &self,
        kept: &Kept,
        d_out: Vec<f32>,
        rotations: &[Rotation],
        edit: &dyn Fn(&mut [f32], &mut [f32]),
    ) -> LayerGrads {
        let Kept { input, attended } = kept;
        let mut d_mid = d_out;
        let mut d_normed = vec![0.0; d_mid.len()];
        let projected = self.projected(attended);
        let mid = self.after_attention(input, &projected);
        {
            let (mut gate, mut up) = self.gate_up(&mid);
            let mut d_act = vec![0.0; gate.len()];
            let back = |d: &[f32], d_act: &mut [f32]| {
                ops::linear_back(d, &self.down, self.down.len() / self.hidden, d_act, false);
            };
            if self.post_ffn_norm.is_empty() {
                back(&d_mid, &mut d_act);
            } else {
                let mut act = gate.clone();
                ops::gated(self.activation, &mut act, &up);
                back(&self.norm_back(&self.mlp(&act), &self.post_ffn_norm, d_mid.clone()), &mut d_act);
            }
            ops::gated_back(self.activation, &mut gate, &mut up, &d_act);
            ops::linear_back(&gate, &self.gate, self.hidden, &mut d_normed, false);
            ops::linear_back(&up, &self.up, self.hidden, &mut d_normed, true);
        }
        ops::rms_norm_back(&mid, &self.ffn_norm, self.eps, &d_normed, &mut d_mid);

        let mut d_attended = vec![0.0; attended.out.len()];
        let d_projected = self.norm_back(&projected, &self.post_attn_norm, d_mid.clone());
        ops::linear_back(&d_projected, &self.o, self.q_width(), &mut d_attended, false);
        let p = self.project(input, rotations, edit);
        let grads = self.heads.backward(&p.q, &p.k, &p.v, attended, &d_attended);
        let mut d_q = ops::rotate_back(&grads.q, self.q_width(), rotations);
        ops::scale_rows(&mut d_q, &self.query_scale);
        let d_keys = ops::rotate_back(&grads.k, self.kv_width(), rotations);
        let d_q = self.norm_back(&p.q_raw, &self.q_norm, d_q);
        let d_k = self.norm_back(&p.k_raw, &self.k_norm, d_keys.clone());
        ops::linear_back(&d_q, &self.q, self.hidden, &mut d_normed, false);
        ops::linear_back(&d_k, &self.k, self.hidden, &mut d_normed, true);
        ops::linear_back(&grads.v, &self.v, self.hidden, &mut d_normed, true);
        ops::rms_norm_back(input, &self.attn_norm, self.eps, &d_normed, &mut d_mid);
        LayerGrads { keys: p.k_pre, d_keys, values: p.v, d_values: grads.v, d_input: d_mid }
    }
}
