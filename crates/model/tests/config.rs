//! Configurations: a real model's, small made-up ones, and what must be refused.

mod common;

use common::gguf::{Builder, Meta};
use common::{model_path, source};
use kvquant_model::{Config, Source};

const HIDDEN: u64 = 8;
const LAYERS: u32 = 2;

/// A model of two layers with 4 query heads and 2 KV heads of 4 channels.
fn small(arch: &str) -> Builder {
    let key = |k: &str| format!("{arch}.{k}");
    let mut b = Builder::new()
        .meta("general.architecture", Meta::String(arch.to_owned()))
        .meta(&key("block_count"), Meta::U32(LAYERS))
        .meta(&key("context_length"), Meta::U32(64))
        .meta(&key("embedding_length"), Meta::U32(HIDDEN as u32))
        .meta(&key("feed_forward_length"), Meta::U32(12))
        .meta(&key("attention.head_count"), Meta::U32(4))
        .meta(&key("attention.head_count_kv"), Meta::U32(2))
        .meta(&key("attention.key_length"), Meta::U32(4))
        .meta(&key("attention.value_length"), Meta::U32(4))
        .meta(&key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5))
        .meta(&key("rope.freq_base"), Meta::F32(10_000.0));
    let f32s = |dims: &[u64]| vec![0; 4 * dims.iter().product::<u64>() as usize];
    let mut add = |name: &str, dims: &[u64]| {
        let taken = std::mem::replace(&mut b, Builder::new());
        b = taken.tensor(name, dims, 0, &f32s(dims));
    };
    add("token_embd.weight", &[HIDDEN, 10]);
    add("output_norm.weight", &[HIDDEN]);
    for i in 0..LAYERS {
        let mut layer = |name: &str, dims: &[u64]| add(&format!("blk.{i}.{name}"), dims);
        layer("attn_norm.weight", &[HIDDEN]);
        layer("attn_q.weight", &[HIDDEN, 16]);
        layer("attn_k.weight", &[HIDDEN, 8]);
        layer("attn_v.weight", &[HIDDEN, 8]);
        layer("attn_output.weight", &[16, HIDDEN]);
        layer("ffn_norm.weight", &[HIDDEN]);
        layer("ffn_gate.weight", &[HIDDEN, 12]);
        layer("ffn_up.weight", &[HIDDEN, 12]);
        layer("ffn_down.weight", &[12, HIDDEN]);
        if arch == "qwen2" {
            layer("attn_q.bias", &[16]);
            layer("attn_k.bias", &[8]);
            layer("attn_v.bias", &[8]);
        }
    }
    b
}

fn config(b: Builder) -> Config {
    Config::read(&source(&b), None).expect("supported")
}

fn refused(b: Builder) -> String {
    Config::read(&source(&b), None).expect_err("refused").to_string()
}

#[test]
fn smollm2_reads_as_it_is() {
    let g = Source::open(&model_path("smollm2-135m")).expect("opens");
    let c = Config::read(&g, None).expect("supported");
    assert_eq!((c.family.gguf, c.layers, c.hidden, c.intermediate), ("llama", 30, 576, 1536));
    assert_eq!((c.heads, c.kv_heads, c.head_dim, c.vocab, c.context), (9, 3, 64, 49_152, 8192));
    assert_eq!((c.half_split, c.qkv_bias, c.norm_eps), (false, false, 1e-5));
    assert_eq!(c.rotary[0].inv_freq.len(), 32);
    assert_eq!(c.rotary[0].inv_freq[0], 1.0);
    assert!((c.rotary[0].inv_freq[31] - 1e5f64.powf(-62.0 / 64.0)).abs() < 1e-12);
    let embedding = g.weight("token_embd.weight", c.vocab, c.hidden).expect("reads");
    assert_eq!((embedding.rows(), embedding.cols()), (49_152, 576));
    assert!(g.weight("token_embd.weight", c.hidden, c.vocab).is_err());
}

#[test]
#[ignore = "fetches 491 MB"]
fn qwen_reads_as_it_is() {
    let g = Source::open(&model_path("qwen2.5-coder-0.5b")).expect("opens");
    let c = Config::read(&g, None).expect("supported");
    assert_eq!((c.family.gguf, c.layers, c.hidden, c.intermediate), ("qwen2", 24, 896, 4864));
    assert_eq!((c.heads, c.kv_heads, c.head_dim, c.vocab, c.context), (14, 2, 64, 151_936, 32_768));
    assert_eq!((c.half_split, c.qkv_bias), (true, true));
}

#[test]
fn families_differ_in_pairing_and_biases() {
    let c = config(small("llama"));
    assert_eq!((c.half_split, c.qkv_bias, c.heads, c.kv_heads, c.head_dim), (false, false, 4, 2, 4));
    let c = config(small("qwen2"));
    assert_eq!((c.half_split, c.qkv_bias), (true, true));
    let e = refused(small("mamba"));
    assert!(e.contains("mamba") && e.contains("llama, qwen2, qwen3, gemma3, phi3"), "{e}");
    // Biases where a llama has them; all three or none.
    let f32s = |n: usize| vec![0; 4 * n];
    let mut b = small("llama").tensor("blk.0.attn_q.bias", &[16], 0, &f32s(16));
    assert!(refused(b.clone()).contains("blk.0.attn_k.bias is missing"));
    b = b.tensor("blk.0.attn_k.bias", &[8], 0, &f32s(8)).tensor("blk.0.attn_v.bias", &[8], 0, &f32s(8));
    b = b.tensor("blk.1.attn_q.bias", &[16], 0, &f32s(16)).tensor("blk.1.attn_k.bias", &[8], 0, &f32s(8));
    assert!(config(b.tensor("blk.1.attn_v.bias", &[8], 0, &f32s(8))).qkv_bias);
}

#[test]
fn frequencies_follow_base_scaling_and_factors() {
    let near = |b: Builder, expected: &[f64]| {
        let got = config(b).rotary[0].inv_freq.clone();
        assert!(got.len() == expected.len() && got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{got:?}");
    };
    let key = |k: &str| format!("llama.rope.{k}");
    near(small("llama"), &[1.0, 0.01]);
    near(small("llama").replace(&key("freq_base"), None), &[1.0, 0.01]);
    near(small("llama").meta(&key("dimension_count"), Meta::U32(2)), &[1.0, 0.0]);
    let linear = |b: Builder| b.meta(&key("scaling.type"), Meta::Str("linear"));
    near(linear(small("llama")).meta(&key("scaling.factor"), Meta::F32(4.0)), &[0.25, 0.0025]);
    near(small("llama").meta(&key("scaling.factor"), Meta::F32(4.0)), &[0.25, 0.0025]);
    near(small("llama").meta(&key("scale_linear"), Meta::F32(2.0)), &[0.5, 0.005]);
    let none = small("llama").meta(&key("scaling.type"), Meta::Str("none"));
    near(none.meta(&key("scaling.factor"), Meta::F32(4.0)), &[1.0, 0.01]);
    let factors = |v: [f32; 2]| v.iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<u8>>();
    near(small("llama").tensor("rope_freqs.weight", &[2], 0, &factors([1.0, 8.0])), &[1.0, 0.00125]);
    assert!(refused(small("llama").tensor("rope_freqs.weight", &[2], 0, &factors([1.0, 0.0]))).contains("entry 1"));
    assert!(refused(small("llama").tensor("rope_freqs.weight", &[1], 0, &[0; 4])).contains("rope_freqs.weight"));
    let other = refused(small("llama").meta(&key("scaling.type"), Meta::Str("xpos")));
    assert!(other.contains("xpos") && other.contains("none, linear, yarn, longrope"), "{other}");
    assert!(refused(small("llama").meta(&key("dimension_count"), Meta::U32(6))).contains("dimension_count"));
    assert!(refused(small("llama").meta(&key("dimension_count"), Meta::U32(3))).contains("dimension_count"));
    let part = config(small("qwen2").meta("qwen2.rope.dimension_count", Meta::U32(2)));
    assert_eq!((part.rope_dims, part.rotary[0].inv_freq.as_slice()), (2, &[1.0, 0.0][..]));
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(refused(small("llama").replace(&key("freq_base"), Some(Meta::F32(bad)))).contains("freq_base"));
    }
}

#[test]
fn features_that_are_not_implemented_are_refused_by_name() {
    let with = |key: &str, value| refused(small("llama").replace(&format!("llama.{key}"), Some(value)));
    for (key, value) in [
        ("expert_count", Meta::U32(8)),
        ("logit_scale", Meta::F32(0.5)),
        ("embedding_scale", Meta::F32(12.0)),
        ("attn_logit_softcapping", Meta::F32(50.0)),
        ("attention.value_length", Meta::U32(8)),
        ("attention.causal", Meta::Bool(0)),
    ] {
        let e = with(key, value);
        assert!(e.contains(&format!("llama.{key}")) && e.contains("supported"), "{e}");
    }
    let e = refused(small("qwen2").meta("qwen2.attention.sliding_window", Meta::U32(32)));
    assert!(e.contains("qwen2.attention.sliding_window") && e.contains("full attention"), "{e}");
    // Values that change nothing.
    config(small("llama").meta("llama.expert_count", Meta::U32(0)).meta("llama.logit_scale", Meta::F32(1.0)));
    let whole = config(small("llama").meta("llama.attention.sliding_window", Meta::U32(64)));
    assert!(whole.attention.iter().all(|a| a.window.is_none()));
    let near = config(small("llama").meta("llama.attention.sliding_window", Meta::U32(32)));
    assert!(near.attention.iter().all(|a| a.window == Some(32)));
    assert_eq!(config(small("llama").meta("llama.final_logit_softcapping", Meta::F32(30.0))).logit_cap, Some(30.0));
    // A tensor that the forward pass would not use.
    let e = refused(small("llama").tensor("blk.0.attn_q_norm.weight", &[4], 0, &[0; 16]));
    assert!(e.contains("blk.0.attn_q_norm.weight"), "{e}");
}

#[test]
fn contradictions_are_refused() {
    let with = |key: &str, value| refused(small("llama").replace(&format!("llama.{key}"), Some(value)));
    assert!(with("block_count", Meta::U32(3)).contains("blk.2.attn_norm.weight is missing"));
    assert!(with("block_count", Meta::U32(1)).contains("blk.1."));
    assert!(with("block_count", Meta::U32(0)).contains("block_count"));
    assert!(with("block_count", Meta::U32(u32::MAX)).contains("missing"));
    assert!(with("embedding_length", Meta::U32(16)).contains("token_embd.weight"));
    assert!(with("feed_forward_length", Meta::U32(13)).contains("ffn_gate.weight"));
    assert!(with("attention.head_count", Meta::U32(8)).contains("attn_q.weight"));
    assert!(with("attention.head_count_kv", Meta::U32(3)).contains("head_count_kv"));
    assert!(with("attention.head_count_kv", Meta::U32(0)).contains("head_count_kv"));
    assert!(with("attention.head_count_kv", Meta::I32s(vec![2, 2])).contains("an array of integers"));
    assert!(with("attention.key_length", Meta::U32(u32::MAX)).contains("key_length"));
    assert!(with("attention.layer_norm_rms_epsilon", Meta::F32(0.0)).contains("epsilon"));
    assert!(with("vocab_size", Meta::U32(11)).contains("vocab_size"));
    let e = refused(small("llama").meta("tokenizer.ggml.tokens", Meta::Strs(vec!["a"; 9])));
    assert!(e.contains("tokenizer.ggml.tokens") && e.contains("got 9"), "{e}");
    let no_key = small("llama").replace("llama.attention.key_length", None);
    // 8 / 4 heads is 2, unlike value_length.
    assert!(refused(no_key).contains("value_length"));
    for key in ["general.architecture", "llama.block_count", "llama.context_length"] {
        assert!(refused(small("llama").replace(key, None)).contains(&format!("{key} is missing")));
    }
}
