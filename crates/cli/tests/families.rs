//! A Hugging Face folder through the commands: looked at, calibrated, measured, generated from.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

fn kvquant(arguments: &[&str]) -> (Option<i32>, String, String) {
    let o = Command::new(env!("CARGO_BIN_EXE_kvquant")).args(arguments).output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (o.status.code(), text(&o.stdout), text(&o.stderr))
}

#[track_caller]
fn report(arguments: &[&str]) -> Value {
    let (code, out, says) = kvquant(arguments);
    assert_eq!(code, Some(0), "{arguments:?}: {says}");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {out}"))
}

/// A tiny Gemma 3 (48 ids, three layers, two with a window of 16) with a tokenizer of single letters.
fn model(folder: &Path) -> String {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/parity/gemma3/model");
    let to = folder.join("tiny-gemma");
    std::fs::create_dir(&to).unwrap();
    for file in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    let letters = "abcdefghijklmnopqrstuvwxyzĠĊABCDEFGHIJ.,".chars();
    let vocab: serde_json::Map<_, _> = letters.zip(3..).map(|(c, id)| (c.to_string(), json!(id))).collect();
    let tokenizer = json!({
        "added_tokens": [{"id": 0, "content": "<bos>", "special": true}, {"id": 1, "content": "<end_of_turn>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({
        "bos_token": "<bos>", "add_bos_token": true,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}",
    });
    std::fs::write(to.join("tokenizer_config.json"), config.to_string()).unwrap();
    to.to_str().unwrap().to_owned()
}

#[test]
fn a_folder_runs_from_end_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let m = model(dir.path());
    let seen = report(&["inspect", &m, "--json"]);
    assert_eq!((&seen["kind"], &seen["model"]["family"]), (&json!("Hugging Face folder"), &json!("gemma3")));
    assert_eq!((&seen["model"]["layers_with_a_window"], &seen["model"]["window"]), (&json!(2), &json!(16)));

    let text = dir.path().join("text.txt");
    std::fs::write(&text, "the cab had a bad hedge, and I fed a bee. ".repeat(40)).unwrap();
    let text = text.to_str().unwrap();
    let q = dir.path().join("q.safetensors");
    let q = q.to_str().unwrap();
    let spec = "nuq4-1%+sink1";
    for source in [vec!["--text", text], vec!["--self"]] {
        let mut arguments = vec!["calibrate", &m, "--windows", "3", "--ctx", "100", "--kv", spec, "-o", q, "--json"];
        arguments.extend(source);
        assert_eq!(report(&arguments)["fits"], json!([spec]));
    }
    let measured = report(&[
        "eval",
        &m,
        "--text",
        text,
        "--windows",
        "2",
        "--ctx",
        "200",
        "--kv",
        "fp16,nuq4-1%+sink1",
        "--quantizer",
        q,
        "--json",
    ]);
    let of = |i: usize, key: &str| measured["results"][i][key].as_f64().unwrap();
    assert!(of(0, "ppl").is_finite() && of(1, "kld_mean") > 0.0 && of(1, "kld_mean") < 0.5, "{measured}");
    let generated = |extra: &[&str]| {
        report(
            &[
                &["generate", &m, "-p", "a bad cab", "--max-tokens", "5", "--kv", spec, "--quantizer", q, "--json"],
                extra,
            ]
            .concat(),
        )
    };
    // The template writes the beginning-of-text token itself; it is there once.
    assert_eq!(generated(&["--raw"])["prompt_tokens"], json!(10));
    assert_eq!(generated(&[])["prompt_tokens"], json!(11));
}

#[test]
fn a_folder_that_lacks_something_says_what() {
    let dir = tempfile::tempdir().unwrap();
    let m = model(dir.path());
    for (file, words) in [("tokenizer.json", "tokenizer.json"), ("model.safetensors.index.json", "model.safetensors")] {
        std::fs::remove_file(Path::new(&m).join(file)).unwrap();
        let (code, _, says) = kvquant(&["generate", &m, "-p", "x", "--kv", "fp16"]);
        assert!(code == Some(2) && says.contains(words), "{code:?} {says}");
    }
}
