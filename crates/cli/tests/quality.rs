//! `eval`, `retrieve` and `ablate` through the binary, on a text of the project's own.

use std::process::{Command, Output};

use serde_json::Value;

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/station.txt");
const CODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/sdpa.py");
const QUANTIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../quantizers/smollm2-135m.safetensors");

fn kvquant(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvquant")).arg("-q").args(arguments).output().expect("the program starts")
}

#[track_caller]
fn report(arguments: &[&str]) -> Value {
    let o = kvquant(arguments);
    assert!(o.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&o.stderr));
    serde_json::from_slice(&o.stdout).expect("JSON")
}

#[test]
fn ours_and_simulated_formats_are_measured_alike() {
    let kv = "fp16,mix3+sink1+recent32,sim:q8_0,sim:kivi2-g32";
    let r = report(&[
        "eval",
        "smollm2-135m",
        "--text",
        TEXT,
        "--windows",
        "1",
        "--ctx",
        "256",
        "--kv",
        kv,
        "--generate",
        "8",
        "--json",
    ]);
    let of = |i: usize, field: &str| r["results"][i][field].as_f64().unwrap();
    let [fp16, ours, q8, kivi] = [0, 1, 2, 3];
    // What comes to an end in an endless context: sinks and the recent window.
    assert!(of(ours, "bits_at_infinity") < 3.2 && of(ours, "bits_per_element") > 4.5, "{r}");
    assert!(of(ours, "quantizer_bytes") > 1e6 && of(q8, "quantizer_bytes") == 0.0, "{r}");
    assert_eq!((of(q8, "bits_per_element"), of(kivi, "bits_at_infinity")), (8.5, 3.0));
    assert!(of(fp16, "kld_mean") == 0.0 && of(fp16, "late_kld_mean") == 0.0);
    assert!(of(q8, "kld_mean") > 0.0 && of(q8, "kld_mean") < 0.005, "{r}");
    // Its first 128 tokens are exact.
    assert!(of(kivi, "late_kld_mean") > 1.8 * of(kivi, "kld_mean"), "{r}");
    assert_eq!(r["results"].as_array().unwrap().iter().filter(|r| r["simulated"] == true).count(), 2);
    let wrote = &r["generation"]["results"];
    assert!(wrote[fp16]["equal_share"] == 1.0 && wrote[kivi]["similarity"].as_f64().unwrap() <= 1.0, "{r}");
}

#[test]
fn a_hidden_number_is_found_again() {
    let r = report(&[
        "retrieve",
        "smollm2-135m",
        "--kv",
        "fp16,mix4+sink1",
        "--lengths",
        "200",
        "--depths",
        "30",
        "--json",
    ]);
    for of in r["results"].as_array().unwrap() {
        assert_eq!(of["found"], 1.0, "{r}");
        assert!(of["nll"].as_f64().unwrap() < 0.5, "{r}");
        let tokens = of["cells"][0]["prompt_tokens"].as_u64().unwrap();
        assert!((150..=200).contains(&tokens), "filled with whole sentences: {tokens}");
    }
    let again = report(&["retrieve", "smollm2-135m", "--kv", "fp16", "--lengths", "200", "--depths", "30", "--json"]);
    assert_eq!(again["results"][0]["nll"], r["results"][0]["nll"], "the same seed, the same questions");
}

#[test]
fn the_report_is_made_again_in_short() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("quality.md");
    let parts = folder.path().join("parts.json");
    let by_hand = "\n<!-- By hand from here on: `kvquant ablate` keeps it. -->\n\n## What no table says\n";
    std::fs::write(&page, format!("an old page{by_hand}")).unwrap();
    let make = || {
        kvquant(&[
            "ablate",
            "smollm2-135m",
            "--on",
            TEXT,
            "--quantizer",
            QUANTIZER,
            "--ctx",
            "128",
            "--eval-windows",
            "1",
            "--only",
            "fp16,mix3+sink1,sim:q4_0",
            "--lengths",
            "150",
            "--depths",
            "50",
            "--generate",
            "4",
            "--other",
            CODE,
            "--contexts",
            "192",
            "--parts",
            parts.to_str().unwrap(),
            "-o",
            page.to_str().unwrap(),
        ])
    };
    let o = make();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let text = std::fs::read_to_string(&page).unwrap();
    let again = make();
    assert!(again.status.success() && std::fs::read_to_string(&page).unwrap() == text, "parts are taken up again");
    for part in [
        "--quantizer smollm2-135m.safetensors --ctx 128",
        "--only 'fp16,mix3+sink1,sim:q4_0'",
        "(quality.svg)",
        "## Fixed widths",
        "## What no table says",
        "## Calibration text against test text",
        "| station.txt |",
        "| sdpa.py |",
        "## Windows of 192 tokens",
        "(quality-passkey.svg)",
        "(quality-multikey.svg)",
        "## Other programs' formats, simulated",
        "| sim:q4_0",
        "## Greedy continuations",
        "## Retrieval: one number",
        "## Retrieval: one of four numbers",
        "found at 150",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.ends_with(by_hand) && !text.contains("an old page"), "{text}");
    assert!(!text.contains("## Codebooks"), "tables without a cache are left out: {text}");
    let plot = std::fs::read_to_string(folder.path().join("quality.svg")).unwrap();
    assert!(plot.contains("sim:q4_0") && plot.contains("mix3+sink1"), "{plot}");
    for map in ["quality-passkey.svg", "quality-multikey.svg"] {
        assert!(std::fs::read_to_string(folder.path().join(map)).unwrap().contains("mix3+sink1"), "{map}");
    }
}

#[test]
fn wrong_questions_are_input_errors() {
    for (arguments, says) in [
        (vec!["retrieve", "smollm2-135m", "--lengths", "20"], "without any filler"),
        (vec!["retrieve", "smollm2-135m", "--lengths", "9000"], "8160"),
        (vec!["retrieve", "smollm2-135m", "--depths", "101"], "0 to 100"),
        (vec!["retrieve", "smollm2-135m", "--trials", "0"], "at least one"),
        (vec!["retrieve", "smollm2-135m", "--kv", "sim:q4_0"], "only `eval` and `ablate`"),
        (vec!["eval", "smollm2-135m", "--text", TEXT, "--kv", "sim:q5_0"], "sim:turbo3"),
        (
            vec!["eval", "smollm2-135m", "--text", TEXT, "--kv", "sim:q4_0", "--ctx", "64", "--prefill", "exact"],
            "quantized",
        ),
        (vec!["eval", "smollm2-135m", "--text", TEXT, "--kv", "fp16", "--ctx", "64", "--generate", "9000"], "8160"),
        (vec!["ablate", "smollm2-135m", "--on", TEXT, "--only", "mix9"], "no table"),
    ] {
        let o = kvquant(&arguments);
        let text = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.code() == Some(2) && text.contains(says), "{arguments:?}: {text}");
    }
}
