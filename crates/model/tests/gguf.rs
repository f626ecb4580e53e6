//! The GGUF reader against sound, damaged and hostile files.

mod common;

use std::path::Path;

use common::gguf::{Builder, Meta};
use kvquant_model::gguf::{Gguf, Value};
use kvquant_model::source::{Fields, SourceError};
use proptest::prelude::*;

fn open(bytes: &[u8]) -> Result<Gguf, SourceError> {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    std::fs::write(file.path(), bytes).expect("write");
    Gguf::open(file.path())
}

fn sample() -> Builder {
    Builder::new()
        .meta("general.architecture", Meta::Str("llama"))
        .meta("n.u32", Meta::U32(7))
        .meta("n.i32", Meta::I32(-7))
        .meta("f", Meta::F32(0.5))
        .meta("b", Meta::Bool(1))
        .meta("words", Meta::Strs(vec!["a", "", "é"]))
        .meta("ints", Meta::I32s(vec![1, -2]))
        .tensor("v", &[3], 0, &[0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64])
        .tensor("h", &[2], 1, &[0, 60, 0, 64])
        .tensor("odd", &[5], 99, &[])
}

fn message(result: Result<Gguf, SourceError>) -> String {
    result.expect_err("the file is bad").to_string()
}

#[test]
fn a_sound_file_reads_back() {
    for version in [2, 3] {
        let g = open(&sample().version(version).build()).expect("sound");
        assert_eq!(g.str("general.architecture").expect("there"), "llama");
        assert_eq!(g.uint("n.u32").expect("there"), 7);
        assert_eq!(g.get("n.i32"), Some(&Value::I64(-7)));
        assert_eq!(g.float("f").expect("there"), 0.5);
        assert_eq!(g.opt_bool("b").expect("a bool"), Some(true));
        assert_eq!(g.strings("words").expect("there"), ["a", "", "é"]);
        assert_eq!(g.opt_ints("ints").expect("ints"), Some(&[1, -2][..]));
        assert_eq!(g.vector("v", 3).expect("f32"), [1.0, 2.0, 3.0]);
        assert_eq!(g.vector("h", 2).expect("f16"), [1.0, 2.0]);
        assert!(matches!(g.uint("n.i32"), Err(SourceError::KeyType { .. })));
        assert!(matches!(g.uint("none"), Err(SourceError::MissingKey { .. })));
        assert!(matches!(g.vector("v", 4), Err(SourceError::Shape { .. })));
        assert!(matches!(g.vector("w", 4), Err(SourceError::MissingTensor { .. })));
        // A type that nobody knows is refused when it is used, and only then.
        assert!(matches!(g.vector("odd", 5), Err(SourceError::TensorType { .. })));
    }
}

#[test]
fn a_missing_file_is_named() {
    let e = Gguf::open(Path::new("/no/such/model.gguf")).expect_err("missing").to_string();
    assert!(e.contains("/no/such/model.gguf") && e.contains("check the path"), "{e}");
    assert!(Gguf::open(Path::new("/")).is_err());
}

#[test]
fn every_cut_is_an_error() {
    let bytes = sample().tensor("last", &[2], 1, &[0, 60, 0, 64]).build();
    assert!(open(&bytes).is_ok());
    for len in 0..bytes.len() {
        let e = open(&bytes[..len]).expect_err("cut").to_string();
        assert!(e.contains("cut short"), "{len}: {e}");
    }
}

#[test]
fn hostile_headers_are_refused_by_name() {
    assert!(message(open(b"GGML\0\0\0\0")).contains("GGUF"));
    assert!(message(open(&sample().version(1).build())).contains("version 1"));
    assert!(message(open(&sample().version(3u32.swap_bytes()).build())).contains("big-endian"));
    let mut huge = sample().build();
    huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(message(open(&huge)).contains("tensor count"));
    let mut huge = sample().build();
    huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(message(open(&huge)).contains("metadata count"));

    let meta = |m| message(open(&Builder::new().meta("k", m).build()));
    assert!(meta(Meta::Bool(2)).contains("0 or 1"));
    // A string and arrays that claim more than the file has: refused before memory is taken.
    assert!(meta(Meta::Raw(8, u64::MAX.to_le_bytes().to_vec())).contains("k needs"));
    for entry in [0u32, 6, 8, 12] {
        let raw = [entry.to_le_bytes().to_vec(), (u64::MAX / 2).to_le_bytes().to_vec()].concat();
        assert!(meta(Meta::Raw(9, raw)).contains("k needs"));
    }
    let nested = [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat();
    assert!(meta(Meta::Raw(9, nested)).contains("array of arrays"));
    assert!(meta(Meta::Raw(13, vec![])).contains("value type"));
    assert!(meta(Meta::Raw(8, [2u64.to_le_bytes().to_vec(), vec![0xff, 0xfe]].concat())).contains("UTF-8"));
    let twice = Builder::new().meta("k", Meta::U32(1)).meta("k", Meta::U32(1)).build();
    assert!(message(open(&twice)).contains("twice"));
    for alignment in [0, 3, 1 << 30] {
        let b = Builder::new().meta("general.alignment", Meta::U32(alignment)).build();
        assert!(message(open(&b)).contains("power of two"));
    }
}

#[test]
fn hostile_tensor_tables_are_refused_by_name() {
    let one = [0u8; 4];
    let e = |b: Builder| message(open(&b.build()));
    let base = Builder::new;
    assert!(e(base().tensor("t", &[1], 0, &one).tensor("t", &[1], 0, &one)).contains("twice"));
    assert!(e(base().tensor("t", &[], 0, &one)).contains("1 to 4 dims"));
    assert!(e(base().tensor("t", &[1; 5], 0, &one)).contains("1 to 4 dims"));
    assert!(e(base().tensor("t", &[0], 0, &one)).contains("above 0"));
    assert!(e(base().tensor("t", &[1 << 40, 1 << 40], 0, &one)).contains("2^64"));
    assert!(e(base().tensor("t", &[1 << 62], 0, &one)).contains("2^64"));
    assert!(e(base().tensor("t", &[33], 3, &one)).contains("multiple of 32"));
    assert!(e(base().tensor("t", &[1000], 0, &one)).contains("tensor t needs"));
    assert!(e(base().tensor_at("t", &[1], 0, 4)).contains("alignment"));
    assert!(e(base().tensor_at("t", &[1], 0, u64::MAX - 31)).contains("tensor t needs"));
    let overlap = base().tensor("a", &[16], 0, &[0; 64]).tensor_at("b", &[1], 0, 32);
    assert!(e(overlap).contains("where tensor a ends"));
    let same = base().tensor("a", &[16], 0, &[0; 64]).tensor_at("b", &[1], 99, 0);
    assert!(e(same).contains("offset of tensor"));
}

#[test]
fn parts_of_a_split_model_are_joined() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |n: u32| dir.path().join(format!("m-{n:05}-of-00003.gguf"));
    let part = |n: u32, count: u32| {
        let b = Builder::new().meta("split.no", Meta::U32(n)).meta("split.count", Meta::U32(count));
        let b = if n == 0 { b.meta("split.tensors.count", Meta::I32(3)).meta("k", Meta::Str("v")) } else { b };
        b.tensor(&format!("t{n}"), &[1], 0, &(n as f32 + 0.5).to_le_bytes())
    };
    let write = |n: u32, b: Builder| std::fs::write(path(n + 1), b.build()).expect("writes");
    (0..3).for_each(|n| write(n, part(n, 3)));
    let g = Gguf::open(&path(1)).expect("sound");
    assert_eq!(g.str("k").expect("there"), "v");
    for n in 0..3 {
        assert_eq!(g.vector(&format!("t{n}"), 1).expect("reads"), [n as f32 + 0.5]);
    }
    let refused = |path: &Path| Gguf::open(path).expect_err("refused").to_string();
    assert!(refused(&path(2)).contains("first file of a split model"));
    write(2, part(1, 3));
    assert!(refused(&path(1)).contains("split.no"));
    write(2, part(2, 4));
    assert!(refused(&path(1)).contains("split.count"));
    write(2, part(2, 3).tensor("t1", &[1], 0, &[0; 4]));
    assert!(refused(&path(1)).contains("occurs twice"));
    write(2, part(2, 3).tensor("t3", &[1], 0, &[0; 4]));
    assert!(refused(&path(1)).contains("split.tensors.count"));
    std::fs::remove_file(path(3)).expect("removes");
    assert!(refused(&path(1)).contains("m-00003-of-00003.gguf"));
    let alone = dir.path().join("alone.gguf");
    std::fs::write(&alone, part(0, 3).build()).expect("writes");
    assert!(refused(&alone).contains("NAME-00001-of-00003.gguf"));
}

#[test]
fn a_vector_must_be_finite() {
    let g = open(&Builder::new().tensor("v", &[1], 0, &f32::NAN.to_le_bytes()).build()).expect("sound");
    assert!(matches!(g.vector("v", 1), Err(SourceError::NotFinite { at: 0, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// Whatever bytes change, the answer is a value or an error.
    #[test]
    fn changed_bytes_never_panic(edits in prop::collection::vec((0usize..1000, any::<u8>()), 1..8)) {
        let mut bytes = sample().build();
        let n = bytes.len();
        for (at, byte) in edits {
            bytes[at % n] = byte;
        }
        if let Ok(g) = open(&bytes) {
            for t in g.tensors.clone() {
                let _ = g.vector(&t.name, t.dims[0] as usize);
            }
        }
    }
}
