//! Hugging Face folders that are broken, contradict themselves or ask for what is not there.

use std::path::{Path, PathBuf};

use kvquant_model::{Config, Model, Source};
use proptest::prelude::*;
use serde_json::{Value, json};

fn parity(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity").join(name).join("model")
}

/// A copy of a fixture.
fn copy(name: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().expect("a folder");
    for file in std::fs::read_dir(parity(name)).expect("lists").map(|f| f.expect("an entry")) {
        std::fs::copy(file.path(), to.path().join(file.file_name())).expect("copies");
    }
    to
}

fn read(path: &Path) -> Result<Config, String> {
    let source = Source::open(path).map_err(|e| e.to_string())?;
    Config::read(&source, None).map_err(|e| e.to_string())
}

/// Reads a fixture whose configuration was changed at a key (removed by null).
fn with(name: &str, key: &str, value: Value) -> Result<Config, String> {
    let dir = copy(name);
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).expect("reads")).expect("JSON");
    let mut at = &mut config;
    for part in key.split('.') {
        at = &mut at[part];
    }
    *at = value;
    std::fs::write(&path, config.to_string()).expect("writes");
    read(dir.path())
}

fn refused(name: &str, key: &str, value: Value, words: &[&str]) {
    let e = with(name, key, value).expect_err(key);
    assert!(words.iter().all(|w| e.contains(w)), "{key}: {e}");
}

#[test]
fn what_is_not_supported_is_refused_with_what_is() {
    let families = ["model_type = mixtral", "llama, mistral, qwen2, qwen3, gemma3_text, phi3"];
    refused("llama", "model_type", json!("mixtral"), &families);
    refused("llama", "hidden_act", json!("relu"), &["hidden_act = relu", "silu"]);
    refused("gemma3", "hidden_activation", json!("silu"), &["hidden_activation = silu", "gelu_pytorch_tanh"]);
    refused("llama", "num_local_experts", json!(8), &["num_local_experts = 8"]);
    refused("llama", "quantization_config", json!({"quant_method": "gptq"}), &["gptq", "GGUF"]);
    refused("gemma3", "attn_logit_softcapping", json!(50.0), &["attn_logit_softcapping = 50"]);
    refused("gemma3", "use_bidirectional_attention", json!(true), &["use_bidirectional_attention"]);
    let kinds = json!(["full_attention", "chunked_attention", "full_attention"]);
    refused("gemma3", "layer_types", kinds, &["chunked_attention", "full_attention"]);
    let types = ["xpos", "none (default), linear, dynamic, yarn, llama3, longrope"];
    refused("llama", "rope_parameters.rope_type", json!("xpos"), &types);
    refused("llama", "head_dim", json!(6), &["head_dim = 6", "multiples of 4"]);
}

#[test]
fn contradictions_are_refused() {
    refused("llama", "num_hidden_layers", json!(3), &["model.layers.2.input_layernorm.weight is missing"]);
    refused("llama", "num_hidden_layers", json!(1), &["model.layers.1."]);
    refused("llama", "hidden_size", json!(32), &["model.", "shape"]);
    refused("llama", "num_attention_heads", json!(8), &["q_proj.weight", "shape"]);
    refused("llama", "num_key_value_heads", json!(3), &["num_key_value_heads"]);
    refused("llama", "intermediate_size", json!(31), &["mlp.", "shape"]);
    refused("llama", "vocab_size", json!(47), &["vocab_size", "47"]);
    refused("llama", "vocab_size", json!(-1), &["vocab_size", "non-negative"]);
    refused("llama", "rms_norm_eps", json!(0), &["rms_norm_eps"]);
    refused("llama", "max_position_embeddings", Value::Null, &["max_position_embeddings is missing"]);
    refused("llama", "rope_parameters.low_freq_factor", json!(4.0), &["high_freq_factor"]);
    refused("llama", "rope_parameters.factor", json!("8"), &["rope_parameters.factor", "a string"]);
    refused("llama", "tie_word_embeddings", json!(true), &["lm_head.weight", "tie_word_embeddings"]);
    refused("llama-linear", "tie_word_embeddings", json!(false), &["lm_head.weight is missing"]);
    refused("gemma3", "layer_types", json!(["full_attention"]), &["layer_types", "3 entries"]);
    refused("gemma3", "sliding_window", Value::Null, &["sliding_window", "layer_types"]);
    refused("phi3", "rope_parameters.long_factor", json!([1.0]), &["long_factor", "2 numbers"]);
    refused("phi3", "rope_parameters.partial_rotary_factor", json!(0.4), &["partial_rotary_factor"]);
    // A tensor of another family.
    refused("qwen3", "model_type", json!("llama"), &["k_norm.weight", "supported"]);
    refused("llama", "model_type", json!("qwen2"), &["q_proj.bias is missing"]);
    // A tied head that is there and the same is one model.
    assert!(with("llama-linear", "tie_word_embeddings", json!(true)).is_ok());
}

#[test]
fn files_must_agree() {
    let dir = copy("llama");
    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).expect("removes");
    assert!(read(dir.path()).expect_err("gone").contains("model-00002-of-00002.safetensors"));
    let dir = copy("llama");
    let index = dir.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).expect("reads");
    std::fs::write(&index, text.replace("model.norm.weight", "model.morn.weight")).expect("writes");
    assert!(read(dir.path()).expect_err("not there").contains("weight_map of model.morn.weight"));
    std::fs::remove_file(&index).expect("removes");
    assert!(read(dir.path()).expect_err("no weights").contains("model.safetensors"));
    std::fs::remove_file(dir.path().join("config.json")).expect("removes");
    assert!(read(dir.path()).expect_err("no config").contains("config.json"));
}

/// A safetensors file with this header, and `data` bytes behind it.
fn single(header: &str, data: usize) -> Result<Config, String> {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::copy(parity("llama").join("config.json"), dir.path().join("config.json")).expect("copies");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    std::fs::write(dir.path().join("model.safetensors"), bytes).expect("writes");
    read(dir.path())
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let e = |header: &str, data: usize| single(header, data).expect_err(header);
    assert!(e("{", 0).contains("JSON"));
    assert!(e(r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#, 3).contains("tensor a needs"));
    for wrong in ["[0, 3]", "[4, 0]", "[0, 18446744073709551615]"] {
        let header = format!(r#"{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": {wrong}}}}}"#);
        assert!(!e(&header, 8).is_empty());
    }
    let huge = r#"{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4], "data_offsets": [0, 0]}}"#;
    assert!(!e(huge, 0).is_empty());
    let overlap = r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}"#;
    assert!(!e(overlap, 12).is_empty());
    let dir = copy("llama");
    let file = dir.path().join("model-00001-of-00002.safetensors");
    std::fs::write(&file, u64::MAX.to_le_bytes()).expect("writes");
    assert!(read(dir.path()).expect_err("huge").contains("header length"));
    std::fs::write(&file, [1, 2]).expect("writes");
    assert!(read(dir.path()).expect_err("short").contains("cut short"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever bytes of the configuration or of a header change, the answer is a model or an error.
    #[test]
    fn changed_bytes_never_panic(edits in prop::collection::vec((0usize..2000, any::<u8>()), 1..4), config in any::<bool>()) {
        let dir = copy("qwen2");
        let path = dir.path().join(if config { "config.json" } else { "model-00001-of-00002.safetensors" });
        let mut bytes = std::fs::read(&path).expect("reads");
        let n = bytes.len();
        for (at, byte) in edits {
            bytes[at % n] = byte;
        }
        std::fs::write(&path, bytes).expect("writes");
        let _ = Model::load(dir.path(), &mut |_, _| {});
    }
}
