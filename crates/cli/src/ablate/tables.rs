//! What the report measures.

use anyhow::Result;

use crate::failure::Input;

/// A table: what it shows, and its caches.
pub const TABLES: [(&str, &[&str]); 12] = [
    ("Fixed widths", &["fp16", "nuq4-1%+sink1", "nuq3-1%+sink1", "nuq2-1%+sink1"]),
    ("Mixed widths", &["nuq3-1%+sink1", "mix4+sink1", "mix3+sink1", "mix2.5+sink1", "mix2+sink1"]),
    (
        "A recent window",
        &[
            "mix4+sink1+recent32",
            "mix3+sink1+recent32",
            "mix2+sink1+recent32",
            "mix2+sink1+recent128",
            "nuq3-1%+sink1+recent32",
        ],
    ),
    (
        "Other programs' formats, simulated",
        &[
            "mix4+sink1",
            "mix3+sink1",
            "sim:q8_0",
            "sim:q4_0",
            "sim:q4_0-rot",
            "sim:kivi4-g32",
            "sim:kivi2-g32",
            "sim:turbo4",
            "sim:turbo3",
        ],
    ),
    (
        "Scopes: keys per channel or token, values per token or channel",
        &["nuq3-1%+sink1", "nuq3-1%+sink1+ktoken", "nuq3-1%+sink1+vchannel"],
    ),
    ("Keys before or after RoPE", &["nuq3-1%+sink1", "nuq3-1%+sink1+postrope"]),
    ("Codebooks", &["nuq3-1%+sink1", "nf3-1%+sink1", "int3-1%+sink1", "int3+sink1"]),
    ("Outliers and sinks", &["nuq3-1%+sink1", "nuq3-1%", "nuq3+sink1", "nuq3"]),
    (
        "Weights of the codebook fit, and Q-Norm",
        &["nuq3-1%+sink1", "nuq3-1%+sink1+wfisher", "nuq3-1%+sink1+wnone", "nuq2-1%+sink1", "nuq2-1%+sink1+qnorm"],
    ),
    (
        "Without a quantizer file",
        &[
            "nuq4-1%+sink1+recent1",
            "nuq4-1%+sink1+online",
            "nuq3-1%+sink1+recent1",
            "nuq3-1%+sink1+online",
            "nuq2-1%+sink1+recent1",
            "nuq2-1%+sink1+online",
        ],
    ),
    ("Scales of 32 channels, as other programs have them", &["nuq4-1%+sink1", "int4-g32", "mix4+sink1"]),
    ("Per-token groups, without calibration", &["int4-g32", "int4-g32+asym", "int3-g32", "nf4-g32"]),
];

/// Caches that read two texts in one context.
pub const SHIFTED: [&str; 5] =
    ["mix4+sink1", "mix3+sink1", "nuq3-1%+sink1+recent1", "nuq3-1%+sink1+online", "nuq2-1%+sink1+online"];

/// Caches whose contexts differ in length.
pub const LENGTHS: [&str; 4] = ["mix4+sink1", "mix3+sink1", "mix2+sink1+recent32", "nuq3-1%+sink1"];

/// Caches of every quantizer, on every text.
pub const COMPARED: [&str; 6] =
    ["mix4+sink1", "mix4+sink1+recent32", "mix3+sink1", "mix3+sink1+recent32", "mix2+sink1+recent32", "nuq3-1%+sink1"];

/// Caches that are asked for hidden numbers and that continue texts.
pub const LONG: [&str; 5] = ["fp16", "mix4+sink1", "mix3+sink1", "mix2+sink1", "nuq3-1%+sink1"];

/// Names of all tables, each once, that `only` lets through.
pub fn names(only: Option<&str>) -> Result<Vec<&'static str>> {
    let mut all: Vec<&str> = Vec::new();
    for name in TABLES.iter().flat_map(|(_, specs)| specs.iter()) {
        if !all.contains(name) {
            all.push(name);
        }
    }
    let Some(only) = only else { return Ok(all) };
    let asked: Vec<&str> = only.split(',').map(str::trim).collect();
    if let Some(other) = asked.iter().find(|a| !all.contains(a)) {
        return Err(Input(format!("--only {other}: no table has this cache; there are {}", all.join(", "))).into());
    }
    Ok(all.into_iter().filter(|name| asked.contains(name)).collect())
}
