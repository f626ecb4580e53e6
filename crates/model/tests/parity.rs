//! Every family against an independent implementation (tools/make_parity.py): logits, and the keys (before the
//! rotation) and values of every layer, from Hugging Face folders and from GGUF files.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvquant_cache::Prefill;
use kvquant_model::{Config, Logits, Model, Source, Step};
use kvquant_quant::Spec;
use safetensors::SafeTensors;

/// Of the largest number of a tensor. Keys and values go through fp16 in our cache: that is 2^-11 of each, in what
/// follows the first attention.
const RTOL: f32 = 2.5e-3;
/// Keys and values of the first layer are made in f32 from the same weights.
const RTOL_FIRST: f32 = 5e-6;

const CASES: [&str; 10] = [
    "llama",
    "llama-linear",
    "llama-dynamic",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gemma3",
    "gemma3-scaled",
    "phi3",
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity").join(name)
}

/// What GGUF has no keys for.
const FOLDER_ONLY: [&str; 3] = ["llama-dynamic", "qwen2-window", "gemma3-scaled"];

/// What the other implementation computed.
struct Reference {
    ids: Vec<u32>,
    positions: Vec<usize>,
    tensors: BTreeMap<String, Vec<f32>>,
}

fn reference(path: &Path) -> Reference {
    let bytes = std::fs::read(path).expect("a fixture");
    let all = SafeTensors::deserialize(&bytes).expect("safetensors");
    let words = |name: &str| -> Vec<[u8; 4]> { all.tensor(name).expect(name).data().as_chunks::<4>().0.to_vec() };
    let ints = |name: &str| words(name).into_iter().map(u32::from_le_bytes).collect::<Vec<u32>>();
    let floats = |name: &str| words(name).into_iter().map(f32::from_le_bytes).collect::<Vec<f32>>();
    let names = all.names().into_iter().filter(|n| !matches!(*n, "ids" | "positions"));
    Reference {
        ids: ints("ids"),
        positions: ints("positions").into_iter().map(|p| p as usize).collect(),
        tensors: names.map(|n| (n.to_owned(), floats(n))).collect(),
    }
}

/// Logits, keys and values of all positions, by the names of the reference.
fn run(model: &Model, ids: &[u32], chunk: usize, prefill: Prefill) -> BTreeMap<String, Vec<f32>> {
    let mut cache = model.new_cache(&Spec::Fp16, None).expect("a cache");
    let mut seen = BTreeMap::<String, Vec<f32>>::new();
    for tokens in ids.chunks(chunk) {
        let mut steps = [Step { tokens, cache: &mut cache, logits: Logits::All }];
        let logits = model
            .forward_watched(&mut steps, prefill, &mut |layer, k, v| {
                seen.entry(format!("keys.{layer}")).or_default().extend(&*k);
                seen.entry(format!("values.{layer}")).or_default().extend(&*v);
            })
            .expect("runs");
        seen.entry("logits".into()).or_default().extend(logits);
    }
    seen
}

/// Where a channel of ours is in the pairing (i, i + n/2) of the reference.
fn theirs(channel: usize, c: &Config) -> usize {
    let (d, n) = (c.head_dim, c.rope_dims);
    let (head, i) = (channel / d * d, channel % d);
    head + if i < n { i / 2 + i % 2 * (n / 2) } else { i }
}

/// Largest difference from the reference, by tensor, over the largest number there.
fn apart(model: &Model, r: &Reference, chunk: usize, prefill: Prefill) -> Vec<(String, f32)> {
    let got = run(model, &r.ids, chunk, prefill);
    assert_eq!(got.keys().collect::<Vec<_>>(), r.tensors.keys().collect::<Vec<_>>());
    let one = |(name, want): (&String, &Vec<f32>)| {
        let (all, width) = (&got[name], want.len() / r.positions.len());
        assert_eq!(all.len(), width * r.ids.len(), "{name}");
        let mut worst = 0.0f32;
        for (row, &p) in want.chunks_exact(width).zip(&r.positions) {
            for (i, got) in all[p * width..(p + 1) * width].iter().enumerate() {
                let at = if name.starts_with("keys") { theirs(i, &model.config) } else { i };
                worst = worst.max((got - row[at]).abs());
            }
        }
        let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        (name.clone(), worst / largest)
    };
    r.tensors.iter().map(one).collect()
}

fn check(path: &Path, r: &Reference) {
    let (model, _) = Model::load_for(path, Some(r.ids.len()), &mut |_, _| {}).expect("loads");
    for (chunk, prefill) in [
        (r.ids.len(), Prefill::Quantized),
        (r.ids.len(), Prefill::Exact),
        (1, Prefill::Quantized),
        (33, Prefill::Exact),
    ] {
        for (name, off) in apart(&model, r, chunk, prefill) {
            let first = matches!(name.as_str(), "keys.0" | "values.0");
            assert!(off < if first { RTOL_FIRST } else { RTOL }, "{} {name}, chunks of {chunk}: {off}", path.display());
        }
    }
}

#[test]
fn folders_agree() {
    for name in CASES {
        check(&folder(name).join("model"), &reference(&folder(name).join("reference.safetensors")));
    }
}

#[test]
fn gguf_files_agree() {
    for name in CASES.iter().filter(|n| !FOLDER_ONLY.contains(n)) {
        check(&folder(name).join("model.gguf"), &reference(&folder(name).join("reference.safetensors")));
    }
}

#[test]
fn a_short_text_turns_otherwise_where_the_model_says_so() {
    let short = reference(&folder("phi3").join("short.safetensors"));
    for file in ["model", "model.gguf"] {
        check(&folder("phi3").join(file), &short);
        let (model, _) = Model::load(&folder("phi3").join(file), &mut |_, _| {}).expect("loads");
        assert_eq!(model.config.context, 64, "without a length, the first training's");
        let (long, _) = Model::load_for(&folder("phi3").join(file), Some(65), &mut |_, _| {}).expect("loads");
        assert_eq!(long.config.context, 128);
        assert!(
            apart(&long, &short, 60, Prefill::Exact).iter().any(|(name, off)| name == "logits" && *off > 20.0 * RTOL)
        );
    }
}

#[test]
fn configurations_of_older_versions_say_the_same() {
    for name in CASES {
        let (new, old) = (folder(name).join("model"), tempfile::tempdir().expect("a folder"));
        let root = old.path().join("model");
        std::fs::create_dir(&root).expect("a folder");
        for file in std::fs::read_dir(&new).expect("lists").map(|f| f.expect("an entry")) {
            let to = if file.file_name() == "config.old.json" { "config.json".into() } else { file.file_name() };
            if file.file_name() != "config.json" {
                std::fs::copy(file.path(), root.join(to)).expect("copies");
            }
        }
        let read = |path: &Path| Config::read(&Source::open(path).expect("opens"), Some(100)).expect("supported");
        assert_eq!(read(&new), read(&root), "{name}");
    }
}

#[test]
fn both_layouts_are_one_model() {
    for name in CASES.iter().filter(|n| !FOLDER_ONLY.contains(n)) {
        let load = |file: &str| Model::load(&folder(name).join(file), &mut |_, _| {}).expect("loads").0;
        assert_eq!(load("model").fingerprint, load("model.gguf").fingerprint, "{name}");
    }
}
