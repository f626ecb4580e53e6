//! Test inputs.

use std::sync::Arc;

use kvquant_cache::LayerAttention;
use kvquant_kernels::rope::Rope;
use kvquant_kernels::weights::{Weight, WeightType};
use kvquant_model::config::{Attention, Rotary};
use kvquant_model::family::Family;
use kvquant_model::{Config, Model, forward::Layer};
use kvquant_quant::{CodebookKind, CodedSpec, Fingerprint, FisherWeights, KeyStage, Scope};
use rand::{Rng, SeedableRng};

/// `n` numbers in [-1.5, 1.5], the same for the same seed.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.5f32..1.5)).collect()
}

/// df/dx[i] by central differences.
pub(crate) fn slope(x: &[f32], i: usize, step: f32, f: impl Fn(&[f32]) -> f64) -> f64 {
    let mut x = x.to_vec();
    let at = x[i];
    x[i] = at + step;
    let (high, high_x) = (f(&x), f64::from(x[i]));
    x[i] = at - step;
    let (low, low_x) = (f(&x), f64::from(x[i]));
    (high - low) / (high_x - low_x)
}

fn weight(rows: usize, cols: usize, seed: u64) -> Weight {
    // Scaled so that the output is about as large as the input.
    let scale = 1.2 / (cols as f32).sqrt();
    let bytes = noise(rows * cols, seed).iter().flat_map(|x| (x * scale).to_le_bytes()).collect();
    Weight::from_gguf(WeightType::F32, rows, cols, bytes).unwrap()
}

/// Two layers, four query heads on two KV heads of four channels, hidden 12, vocabulary of 19.
pub(crate) fn tiny_model(qkv_bias: bool) -> Model {
    tiny("llama", qkv_bias)
}

/// The same with all that Gemma 3 has besides: norms of heads and outputs, GELU, a window with a rope of its own, scales
/// of embeddings and queries, capped logits.
pub(crate) fn tiny_gemma() -> Model {
    tiny("gemma3", false)
}

fn tiny(family: &str, qkv_bias: bool) -> Model {
    let family = Family::of_gguf(family).unwrap();
    let gemma = family.post_norms;
    let (layers, hidden, intermediate, heads, kv_heads, head_dim, vocab) = (2, 12, 20, 4, 2, 4, 19);
    let query_scale = if gemma { vec![0.7, 0.7, 1.3, 1.3] } else { vec![] };
    let mut rotary = vec![Rotary { inv_freq: vec![1.0, 0.1], query_scale }];
    let mut attention = vec![Attention { rotary: 0, window: None }; layers];
    if gemma {
        rotary.push(Rotary { inv_freq: vec![0.7, 0.3], query_scale: vec![] });
        attention[0] = Attention { rotary: 1, window: Some(3) };
    }
    let config = Config {
        family,
        name: "tiny".into(),
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocab,
        context: 512,
        norm_eps: 1e-5,
        rotary,
        attention,
        half_split: false,
        rope_dims: head_dim,
        qkv_bias,
        embedding_scale: if gemma { 1.7 } else { 1.0 },
        logit_cap: gemma.then_some(4.0),
    };
    let norm_of = |n: usize, seed| noise(n, seed).iter().map(|x| 1.0 + 0.2 * x).collect::<Vec<f32>>();
    let norm = |seed| norm_of(hidden, seed);
    let bias = |n: usize, seed| qkv_bias.then(|| noise(n, seed));
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let layers = (0..layers as u64)
        .map(|l| l * 100)
        .map(|s| Layer {
            attn_norm: norm(s + 1),
            q: weight(q, hidden, s + 2),
            k: weight(kv, hidden, s + 3),
            v: weight(kv, hidden, s + 4),
            q_bias: bias(q, s + 5),
            k_bias: bias(kv, s + 6),
            v_bias: bias(kv, s + 7),
            q_norm: family.qk_norm.then(|| norm_of(head_dim, s + 13)),
            k_norm: family.qk_norm.then(|| norm_of(head_dim, s + 14)),
            o: weight(hidden, q, s + 8),
            post_attn_norm: gemma.then(|| norm(s + 15)),
            ffn_norm: norm(s + 9),
            gate: weight(intermediate, hidden, s + 10),
            up: weight(intermediate, hidden, s + 11),
            down: weight(hidden, intermediate, s + 12),
            post_ffn_norm: gemma.then(|| norm(s + 16)),
        })
        .collect();
    let fingerprint = Fingerprint {
        architecture: family.gguf.into(),
        layers: config.layers,
        kv_heads,
        head_dim,
        norms_sha256: "00".repeat(32),
    };
    let ropes: Vec<_> = config.rotary.iter().map(|r| Arc::new(Rope { inv_freq: r.inv_freq.clone() })).collect();
    let attention =
        config.attention.iter().map(|a| LayerAttention { rope: ropes[a.rotary].clone(), window: a.window }).collect();
    Model {
        config,
        embed: Arc::new(weight(vocab, hidden, 1001)),
        layers,
        final_norm: norm(1002),
        head: Arc::new(weight(vocab, hidden, 1003)),
        attention,
        activations: kvquant_model::Activations::F32,
        fingerprint,
    }
}

/// The default of the method: nuq, keys per channel before RoPE, values per token.
pub(crate) fn spec(bits: u32, outliers: u32) -> CodedSpec {
    CodedSpec {
        bits,
        codebook: CodebookKind::Nuq,
        outliers,
        keys: Scope::Channel,
        values: Scope::Token,
        stage: KeyStage::PreRope,
        sinks: 1,
        recent: 0,
        qnorm: false,
        weights: FisherWeights::FisherScale2,
        zero_point: true,
        online: false,
    }
}
