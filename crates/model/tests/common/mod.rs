//! What the tests of this crate share.
#![allow(dead_code)]

pub mod gguf;

use std::path::{Path, PathBuf};

use gguf::Builder;
use kvquant_model::{Gguf, Source};

/// A known model's file, fetched when it is not there yet.
pub fn model_path(name: &str) -> PathBuf {
    kvquant_model::pull::pull(name, &mut |_, _, _| {}).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// A committed fixture.
pub fn fixture(name: &str) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The file that a builder makes, opened.
pub fn open(builder: &Builder) -> Gguf {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    std::fs::write(file.path(), builder.build()).expect("write");
    Gguf::open(file.path()).expect("a sound container")
}

/// The same as a model's source.
pub fn source(builder: &Builder) -> Source {
    Source::Gguf(open(builder))
}
