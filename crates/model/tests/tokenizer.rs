//! Ids against an independent implementation, and hostile vocabularies.

mod common;

use common::gguf::{Builder, Meta};
use common::{fixture, model_path, open};
use kvquant_model::{Gguf, Tokenizer};
use proptest::prelude::*;

fn ids(case: &serde_json::Value, key: &str) -> Vec<u32> {
    case[key].as_array().expect("an array").iter().map(|v| v.as_u64().expect("an id") as u32).collect()
}

fn check(name: &str) -> Tokenizer {
    let t = Tokenizer::from_gguf(&Gguf::open(&model_path(name)).expect("opens")).expect("supported");
    let cases = fixture(&format!("tokens-{name}.json"));
    let cases = cases.as_array().expect("an array");
    assert!(cases.len() >= 100);
    let mut wrong = Vec::new();
    for case in cases {
        let text = case["text"].as_str().expect("a string");
        for (key, special) in [("plain", false), ("special", true)] {
            let (got, expected) = (t.encode(text, special).expect("encodes"), ids(case, key));
            if got != expected {
                wrong.push(format!("{text:?} {key}: got {got:?}, expected {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    t
}

#[test]
fn smollm2_has_the_ids_of_the_reference() {
    let t = check("smollm2-135m");
    assert_eq!(t.vocab_size(), 49_152);
    assert_eq!((t.bos(), t.add_bos()), (Some(1), false));
    assert_eq!(t.end_of_turn(), [0, 2]);
    // A control token is made on request only, and comes back as its text.
    assert_eq!(t.encode("<|im_end|>", true).expect("encodes"), [2]);
    assert!(!t.encode("<|im_end|>", false).expect("encodes").contains(&2));
    assert_eq!(t.decode(&[1, 2], false), "<|im_start|><|im_end|>");
    assert_eq!(t.decode(&[1, 2], true), "");
    assert_eq!(t.token_bytes(u32::MAX), b"");
    // A character may be split over tokens: bytes join to it.
    let bird = t.encode("🐦", false).expect("encodes");
    assert!(bird.len() > 1);
    assert_eq!(bird.iter().flat_map(|id| t.token_bytes(*id)).copied().collect::<Vec<_>>(), "🐦".as_bytes());
    round_trips(&t);
    long_runs(&t);
}

#[test]
#[ignore = "fetches 491 MB"]
fn qwen_has_the_ids_of_the_reference() {
    let t = check("qwen2.5-coder-0.5b");
    assert_eq!(t.vocab_size(), 151_936);
    assert!(!t.add_bos());
    assert_eq!(t.end_of_turn(), [151_643, 151_645]);
    round_trips(&t);
    long_runs(&t);
}

#[test]
#[ignore = "fetches 253 MB"]
fn gemma_has_the_ids_of_the_reference() {
    let t = check("gemma3-270m");
    assert_eq!((t.vocab_size(), t.bos(), t.add_bos()), (262_144, Some(2), true));
    assert_eq!(t.end_of_turn(), [1, 106]);
    round_trips(&t);
    long_runs(&t);
}

/// A small vocabulary of the fixtures as a file.
fn small(head: &serde_json::Value) -> Builder {
    let strings = |key: &str| -> Vec<String> {
        head[key].as_array().expect("an array").iter().map(|v| v.as_str().expect("text").to_owned()).collect()
    };
    let types = ids(head, "types").into_iter().map(|t| t as i32).collect();
    let b = Builder::new()
        .meta("tokenizer.ggml.tokens", Meta::Strings(strings("tokens")))
        .meta("tokenizer.ggml.token_type", Meta::I32s(types));
    if let Some(scores) = head["scores"].as_array() {
        let scores = scores.iter().flat_map(|s| (s.as_f64().expect("a score") as f32).to_le_bytes());
        let count = (head["tokens"].as_array().expect("an array").len() as u64).to_le_bytes();
        let raw = [6u32.to_le_bytes().to_vec(), count.to_vec(), scores.collect()].concat();
        return b.meta("tokenizer.ggml.model", Meta::Str("llama")).meta("tokenizer.ggml.scores", Meta::Raw(9, raw));
    }
    b.meta("tokenizer.ggml.model", Meta::Str("gpt2")).meta("tokenizer.ggml.merges", Meta::Strings(strings("merges")))
}

/// Compares with `ids.NAME` of every case: without and with control tokens made of text.
fn compare(t: &Tokenizer, name: &str, head: &serde_json::Value) {
    let cases = head["cases"].as_array().expect("an array");
    assert!(cases.len() >= 100);
    let mut wrong = Vec::new();
    for case in cases {
        let text = case["text"].as_str().expect("a string");
        for (special, expected) in [(false, &case["ids"][name][0]), (true, &case["ids"][name][1])] {
            let expected: Vec<u32> = serde_json::from_value(expected.clone()).expect("ids");
            let got = t.encode(text, special).expect("encodes");
            if got != expected {
                wrong.push(format!("{name} {text:?} {special}: got {got:?}, expected {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_pre_tokenizer_has_the_ids_of_the_reference() {
    let head = fixture("vocab-bpe.json");
    for pre in ["smollm", "qwen2", "gpt-2", "llama-bpe", "dbrx", "gpt-4o", "tekken"] {
        let b =
            small(&head).meta("tokenizer.ggml.pre", Meta::Str(pre)).meta("tokenizer.ggml.bos_token_id", Meta::U32(700));
        compare(&build(b).expect("sound"), pre, &head);
    }
}

#[test]
fn sentencepiece_has_the_ids_of_the_reference() {
    let head = fixture("vocab-spm.json");
    for (name, prefix) in [("false", 0), ("true", 1), ("phi3", 1)] {
        let b = small(&head)
            .meta("general.architecture", Meta::Str(if name == "phi3" { "phi3" } else { "llama" }))
            .meta("tokenizer.ggml.bos_token_id", Meta::U32(1))
            .meta("tokenizer.ggml.add_space_prefix", Meta::Bool(prefix));
        let t = build(b.clone()).expect("sound");
        assert!(t.add_bos());
        compare(&t, name, &head);
        if prefix == 0 {
            round_trips(&t);
            long_runs(&t);
        }
        let e = build(b.replace("tokenizer.ggml.scores", None)).expect_err("no scores");
        assert!(e.contains("tokenizer.ggml.scores is missing"), "{e}");
    }
    let types = ids(&head, "types").into_iter().map(|t| if t == 6 { 1 } else { t as i32 }).collect();
    let b = small(&head).replace("tokenizer.ggml.token_type", Some(Meta::I32s(types)));
    assert!(build(b).expect_err("no bytes").contains("a token for every byte"));
}

/// A folder of the fixtures with a configuration, and one file of it changed.
fn folder(name: &str, changed: Option<(&str, &str)>) -> tempfile::TempDir {
    let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let to = tempfile::tempdir().expect("a folder");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name).join(file), to.path().join(file)).expect("copies");
    }
    let model = from.join("parity/llama-linear/model");
    for file in std::fs::read_dir(model).expect("lists").map(|f| f.expect("an entry")) {
        std::fs::copy(file.path(), to.path().join(file.file_name())).expect("copies");
    }
    if let Some((file, text)) = changed {
        std::fs::write(to.path().join(file), text).expect("writes");
    }
    to
}

fn of_folder(dir: &tempfile::TempDir) -> Result<Tokenizer, String> {
    let source = kvquant_model::Source::open(dir.path()).map_err(|e| e.to_string())?;
    Tokenizer::from_source(&source).map_err(|e| e.to_string())
}

#[test]
fn folders_have_the_ids_of_the_reference() {
    for name in ["folder-bytes", "folder-prepend", "folder-metaspace"] {
        let t = of_folder(&folder(name, None)).expect("sound");
        let cases = fixture(&format!("{name}/cases.json"));
        let mut wrong = Vec::new();
        for case in cases.as_array().expect("an array") {
            let text = case["text"].as_str().expect("text");
            let (got, expected) = (t.encode(text, true).expect("encodes"), ids(case, "ids"));
            if got != expected {
                wrong.push(format!("{name} {text:?}: got {got:?}, expected {expected:?}"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(t.add_bos() && t.bos().is_some(), "{name}");
        assert!(!t.encode("<end>", false).expect("encodes").iter().any(|id| t.end_of_turn().contains(id)), "{name}");
    }
    let t = of_folder(&folder("folder-bytes", None)).expect("sound");
    let end = t.encode("<end>", true).expect("encodes");
    assert!(end.len() == 1 && t.end_of_turn().contains(&end[0]));
    // What configurations name as ends counts too.
    let eos = of_folder(&folder("folder-bytes", Some(("generation_config.json", r#"{"eos_token_id": [3, 4]}"#))));
    assert!([3, 4].iter().all(|id| eos.as_ref().expect("sound").end_of_turn().contains(id)));
    // Bytes and pieces come back.
    for name in ["folder-bytes", "folder-prepend"] {
        let t = of_folder(&folder(name, None)).expect("sound");
        let ids = t.encode("Grüße, 日本 👍", false).expect("encodes");
        assert_eq!(t.decode(&ids, false).trim_start(), "Grüße, 日本 👍");
    }
}

#[test]
fn broken_and_foreign_folders_are_refused_by_name() {
    let with = |file: &str, text: &str| of_folder(&folder("folder-bytes", Some((file, text)))).expect_err("refused");
    assert!(with("tokenizer.json", "{").contains("tokenizer.json"));
    let e = with("tokenizer.json", r#"{"model": {"type": "Unigram", "vocab": []}}"#);
    assert!(e.contains("model.type = Unigram") && e.contains("supported: BPE"), "{e}");
    let e = with(
        "tokenizer.json",
        r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "CTC"}}"#,
    );
    assert!(e.contains("decoder = CTC") && e.contains("ByteLevel"), "{e}");
    let e = with("tokenizer.json", r#"{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}"#);
    assert!(e.contains("ids below"), "{e}");
    assert!(with("config.json", "[").contains("config.json"));
    assert!(with("model.safetensors.index.json", r#"{"weight_map": {"a": "../b"}}"#).contains("weight_map of a"));
    assert!(
        with("model.safetensors.index.json", r#"{"weight_map": {"a": "no.safetensors"}}"#).contains("no.safetensors")
    );
    let dir = folder("folder-bytes", None);
    std::fs::remove_file(dir.path().join("tokenizer.json")).expect("removes");
    assert!(of_folder(&dir).expect_err("none").contains("no such file"));
}

/// What is encoded decodes to the same text. These characters are all in SmolLM2's vocabulary.
fn round_trips(t: &Tokenizer) {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&"[ -~\n\t\ré日👍]{0,60}", |text| {
            for special in [false, true] {
                let ids = t.encode(&text, special).expect("encodes");
                prop_assert_eq!(t.decode(&ids, false), text.clone());
            }
            Ok(())
        })
        .expect("round trip");
}

/// Runs that would wear out a backtracking regex or a quadratic merge.
fn long_runs(t: &Tokenizer) {
    let encode = |text: &str| t.encode(text, false).expect("encodes");
    for space in [" ", "\t", "\n", "\u{3000}"] {
        let run = |n: usize| space.repeat(n);
        // A long run before a word is cut where a short one is: before its last character, or at its end.
        let cut = |n: usize, kept: usize| {
            encode(&format!("{}xx", run(n))) == [encode(&run(n - kept)), encode(&format!("{}xx", run(kept)))].concat()
        };
        let kept = usize::from(!cut(100, 0));
        assert!(cut(100, kept) && cut(100_000, kept), "{space:?}");
        let e = t.encode(&run(100_001), false).expect_err("too long").to_string();
        assert!(e.contains("100001") && e.contains("at most 100000"), "{e}");
    }
    for letter in ["a", "é", "1", ".", "'", "日"] {
        let text = letter.repeat(300_000);
        assert!(t.decode(&encode(&text), false) == text, "{letter}");
    }
}

/// Letters a, b and Ġ (space), ab, and two added tokens.
fn tiny() -> Builder {
    Builder::new()
        .meta("tokenizer.ggml.model", Meta::Str("gpt2"))
        .meta("tokenizer.ggml.pre", Meta::Str("gpt-2"))
        .meta("tokenizer.ggml.tokens", Meta::Strs(vec!["a", "b", "ab", "Ġ", "<end>", "<user>", "ba"]))
        .meta("tokenizer.ggml.token_type", Meta::I32s(vec![1, 1, 1, 1, 3, 4, 5]))
        .meta("tokenizer.ggml.merges", Meta::Strs(vec!["a b"]))
        .meta("tokenizer.ggml.eos_token_id", Meta::U32(4))
}

fn build(b: Builder) -> Result<Tokenizer, String> {
    Tokenizer::from_gguf(&open(&b)).map_err(|e| e.to_string())
}

#[test]
fn added_tokens_are_cut_out_as_asked() {
    let t = build(tiny()).expect("sound");
    let encode = |text, special| t.encode(text, special).expect("encodes");
    assert_eq!(encode("ab<user>ba", false), [2, 5, 1, 0]);
    assert_eq!(encode("a<end>b", true), [0, 4, 1]);
    // The letters of <end> other than those of the vocabulary leave nothing.
    assert_eq!(encode("a<end>b", false), [0, 1]);
    assert_eq!(t.end_of_turn(), [4]);
    assert_eq!(t.decode(&[2, 3, 0, 4, 99], true), "ab a");
}

#[test]
fn llama3_takes_whole_words_and_groups_of_three_digits() {
    let words = vec!["1", "2", "12", "123", "3", "4", "a", "b", "ab", "abb"];
    let b = tiny()
        .replace("tokenizer.ggml.pre", Some(Meta::Str("llama-bpe")))
        .replace("tokenizer.ggml.token_type", Some(Meta::I32s(vec![1; words.len()])))
        .replace("tokenizer.ggml.tokens", Some(Meta::Strs(words)))
        .replace("tokenizer.ggml.merges", Some(Meta::Strs(vec!["1 2"])));
    let b = || b.clone();
    assert!(build(b()).expect_err("add_bos without bos").contains("bos_token_id"));
    let t = build(b().meta("tokenizer.ggml.bos_token_id", Meta::U32(0))).expect("sound");
    assert!(t.add_bos());
    assert_eq!(t.encode("1234", false).expect("encodes"), [3, 5]);
    // abb is a token that no merge makes.
    assert_eq!(t.encode("abb", false).expect("encodes"), [9]);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let with = |key: &str, value: Option<Meta>| build(tiny().replace(key, value)).expect_err("refused");
    let e = with("tokenizer.ggml.model", Some(Meta::Str("t5")));
    assert!(e.contains("tokenizer.ggml.model = t5") && e.contains("gpt2"), "{e}");
    let e = with("tokenizer.ggml.pre", Some(Meta::Str("rwkv")));
    assert!(e.contains("rwkv") && e.contains("smollm, qwen2, gpt-2, llama-bpe"), "{e}");
    for key in ["model", "pre", "tokens", "token_type", "merges"] {
        let key = format!("tokenizer.ggml.{key}");
        assert!(with(&key, None).contains(&format!("{key} is missing")));
    }
    let types = |v: Vec<i32>| with("tokenizer.ggml.token_type", Some(Meta::I32s(v)));
    assert!(types(vec![1; 6]).contains("7 entries"));
    assert!(types(vec![1, 1, 1, 1, 3, 4, 77]).contains("entry 6"));
    let merges = |v: Vec<&'static str>| with("tokenizer.ggml.merges", Some(Meta::Strs(v)));
    for bad in ["", " ", "a", "a ", " b", "a  b", "a b b", "b b", "a x", "b a"] {
        assert!(merges(vec![bad]).contains("merges, entry 0"), "{bad:?}");
    }
    assert!(merges(vec!["a b", "a b"]).contains("merges, entry 1"));
    let tokens = |v: Vec<&'static str>| with("tokenizer.ggml.tokens", Some(Meta::Strs(v)));
    assert!(tokens(vec!["a", "b", "ab", "a", "<end>", "<user>", "x"]).contains("entry 3"));
    assert!(tokens(vec!["a", "b", "ab", "c", "", "<user>", "x"]).contains("entry 4"));
    assert!(with("tokenizer.ggml.eos_token_id", Some(Meta::U32(7))).contains("below 7"));
}
