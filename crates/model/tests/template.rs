//! Chat templates against Python's Jinja2, and templates that misbehave.

mod common;

use common::gguf::{Builder, Meta};
use common::{fixture, model_path, open};
use kvquant_model::template::{Message, TemplateError};
use kvquant_model::{ChatTemplate, Gguf};

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
    ChatTemplate::new(source, "<s>".to_owned(), "</s>".to_owned())
}

#[test]
fn prompts_are_those_of_the_reference() {
    let mut wrong = Vec::new();
    for model in fixture("chats.json").as_array().expect("an array") {
        let text = |key: &str| model[key].as_str().expect("a string").to_owned();
        let t = ChatTemplate::new(&text("template"), text("bos"), text("eos")).expect("parses");
        for case in model["cases"].as_array().expect("an array") {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).expect("messages");
            let got = t.render(&messages, case["generation"].as_bool().expect("a bool"));
            let expected = case["text"].as_str();
            if got.as_deref().ok() != expected {
                wrong.push(format!("{}: {:?}\n got {got:?}\n expected {expected:?}", text("name"), messages));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn smollm2_brings_its_template() {
    let t = ChatTemplate::from_gguf(&Gguf::open(&model_path("smollm2-135m")).expect("opens")).expect("parses");
    let chat = [message("system", "Be brief."), message("user", "Hi")];
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(t.render(&chat, true).expect("renders"), expected);
}

#[test]
fn errors_name_the_line() {
    let chat = [message("user", "Hi")];
    let e = template("a\n{% if %}\n").expect_err("syntax").to_string();
    assert!(e.contains("line 2") && e.contains("--raw"), "{e}");
    let e = template("a\nb\n{{ messages[0].content.nothing() }}").expect("parses").render(&chat, false);
    assert!(e.expect_err("no such method").to_string().contains("line 3"));
    let e = template("a\n{{ raise_exception('only system first') }}").expect("parses").render(&chat, false);
    assert!(matches!(e, Err(TemplateError::Raised { line: 2, reason }) if reason == "only system first"));
    let today = template("{{ strftime_now('%d %b %Y') }}").expect("parses").render(&chat, false).expect("renders");
    assert_eq!(today.len(), 11, "{today}");
}

#[test]
fn a_template_can_neither_run_nor_write_for_ever() {
    let chat = [message("user", "Hi")];
    let loops = "{% for a in range(9999) %}".repeat(4) + "x" + &"{% endfor %}".repeat(4);
    let e = template(&loops).expect("parses").render(&chat, false).expect_err("endless").to_string();
    assert!(e.contains("fuel") || e.contains("longer than"), "{e}");
    let grows = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(16) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{% for i in range(999) %}{{ ns.s }}{% endfor %}";
    let e = template(grows).expect("parses").render(&chat, false).expect_err("grows").to_string();
    assert!(e.contains("longer than"), "{e}");
}

#[test]
fn a_file_without_a_template_says_so() {
    let e = ChatTemplate::from_gguf(&open(&Builder::new())).expect_err("none").to_string();
    assert!(e.contains("tokenizer.chat_template is missing") && e.contains("--raw"), "{e}");
    let b = Builder::new()
        .meta("tokenizer.chat_template", Meta::Str("x"))
        .meta("tokenizer.ggml.bos_token_id", Meta::U32(9));
    let b = b.meta("tokenizer.ggml.tokens", Meta::Strs(vec!["a"]));
    assert!(ChatTemplate::from_gguf(&open(&b)).expect_err("beyond").to_string().contains("bos_token_id"));
}

#[test]
fn folders_bring_theirs() {
    let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let to = tempfile::tempdir().expect("a folder");
    for dir in ["parity/llama-linear/model", "folder-bytes"] {
        for file in std::fs::read_dir(from.join(dir)).expect("lists").map(|f| f.expect("an entry")) {
            std::fs::copy(file.path(), to.path().join(file.file_name())).expect("copies");
        }
    }
    let read = || {
        let source = kvquant_model::Source::open(to.path()).expect("opens");
        let t = ChatTemplate::from_source(&source).map_err(|e| e.to_string())?;
        t.render(&[message("user", "Hi")], true).map_err(|e| e.to_string())
    };
    assert_eq!(read().expect("renders"), "<s>Hi<end>");
    std::fs::write(to.path().join("chat_template.jinja"), "[{{ messages[0].content }}]").expect("writes");
    assert_eq!(read().expect("renders"), "[Hi]");
    std::fs::remove_file(to.path().join("chat_template.jinja")).expect("removes");
    let several = r#"{"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
    std::fs::write(to.path().join("tokenizer_config.json"), several).expect("writes");
    assert_eq!(read().expect("renders"), "yes");
    std::fs::write(to.path().join("tokenizer_config.json"), "{}").expect("writes");
    let e = read().expect_err("none");
    assert!(e.contains("chat_template is missing") && e.contains("--raw"), "{e}");
}
