//! `kvquant bench` through the binary: the report has what it promises, and wrong input is refused.

use std::process::{Command, Output};

use serde_json::Value;

fn kvquant(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvquant"))
        .args(arguments)
        .env("KVQUANT_PYTHON", "/nowhere/python")
        .output()
        .expect("the program starts")
}

#[test]
fn a_report_has_every_depth_and_cache() {
    let o = kvquant(&[
        "-q",
        "bench",
        "smollm2-135m",
        "--kv",
        "fp16,nuq3-1%+sink1,nuq3-1%+sink1+recent32",
        "--depths",
        "300,0",
        "--seconds",
        "0",
        "--json",
    ]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let report: Value = serde_json::from_slice(&o.stdout).expect("JSON");
    assert!(report["read_gbps"].as_f64().unwrap() > 0.1 && report["threads"].as_u64().unwrap() > 0);
    let results = report["results"].as_array().unwrap();
    let depths: Vec<u64> = results.iter().map(|r| r["depth"].as_u64().unwrap()).collect();
    assert_eq!(depths, [0, 0, 0, 300, 300, 300]);
    for r in results {
        for figure in ["decode_tok_s", "attend_ms", "prefill_tok_s", "append_tok_s"] {
            assert!(r[figure].as_f64().unwrap() > 0.0, "{figure}: {r}");
        }
    }
    let bytes = |i: usize| results[i]["cache_bytes"].as_u64().unwrap();
    // 30 layers, 2 sides, 192 channels, 2 bytes; a depth is reached in whole blocks.
    assert!(bytes(3) >= 300 * 30 * 2 * 192 * 2 && bytes(3) < 400 * 30 * 2 * 192 * 2);
    assert!(bytes(4) * 4 < bytes(3), "3 bits take a quarter of 16 at most: {} and {}", bytes(4), bytes(3));
}

#[test]
fn wrong_depths_and_a_missing_peer_are_input_errors() {
    for (arguments, says) in [
        (vec!["bench", "smollm2-135m", "--depths", "12,x"], "--depths 12,x: expected numbers"),
        (vec!["bench", "smollm2-135m", "--depths", "99999999999"], "up to 10000000"),
        (vec!["bench", "smollm2-135m", "--peer", "llama-cpp-python", "--depths", "0"], "cannot start /nowhere/python"),
    ] {
        let o = kvquant(&arguments);
        let text = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.code() == Some(2) && text.contains(says), "{arguments:?}: {text}");
    }
}
