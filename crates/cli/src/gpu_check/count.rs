//! What the kernels must move and compute, counted; needs no GPU.

use kvquant_cuda::bench::{SHAPES, Shape};

use crate::output::say;

/// A card: its name, bytes a second that copies move, operations a second of its tensor cores in 16 bits.
struct Card {
    name: &'static str,
    bytes: f64,
    operations: f64,
}

/// Measured on an H200; an A100 of 80 GB by its data sheet, of whose 2,039 GB/s copies get about 0.86.
const CARDS: [Card; 2] = [
    Card { name: "H200", bytes: 4.3e12, operations: 790e12 },
    Card { name: "A100", bytes: 1.75e12, operations: 312e12 },
];
/// Seconds that one kernel takes at least in a row of them: what the host needs to launch it.
const LAUNCH: f64 = 2.5e-6;
/// Kernels of a decode step and its merge start and end in this time.
const START: f64 = 6e-6;
/// Tokens of the histories that are counted.
const TOKENS: f64 = 131_072.0;
const QUERIES: f64 = 1024.0;

/// Parameters of the products of a layer, and of the head.
fn parameters(s: &Shape) -> (f64, f64) {
    let (hidden, mlp, vocab) = match s.name {
        "llama2-7b" => (4096.0, 11_008.0, 32_000.0),
        "llama3-8b" => (4096.0, 14_336.0, 128_256.0),
        _ => (576.0, 1536.0, 49_152.0),
    };
    let (q, kv) = ((s.kv_heads * s.group * s.dim) as f64, (s.kv_heads * s.dim) as f64);
    (hidden * (2.0 * q + 2.0 * kv) + 3.0 * hidden * mlp, hidden * vocab)
}

/// Bytes of one token of a layer; 16 bits are fp16. 1 % of outliers: of keys by thresholds, of values by the rule.
fn token_bytes(s: &Shape, bits: usize) -> f64 {
    let (channels, heads, dim) = ((s.kv_heads * s.dim) as f64, s.kv_heads as f64, s.dim as f64);
    if bits == 16 {
        return 4.0 * channels;
    }
    let outliers = 0.01 * channels + 2.0 * ((channels / 200.0).floor() + 1.0);
    // Lists are filled up to whole 16 bytes; a block has headers, scales, a number, and the rotation of its place.
    let padding = 2.0 * heads * 1.5;
    let block = 16.0 * heads + 256.0 + 4.0 + 4.0 * dim;
    channels * bits as f64 / 4.0 + 4.0 * outliers + (4.0 * padding + block) / 64.0
}

fn name(bits: usize) -> String {
    if bits == 16 { "fp16".into() } else { format!("nuq{bits}-1%") }
}

fn micro(seconds: f64) -> String {
    if seconds < 99.95e-6 { format!("{:.1}", seconds * 1e6) } else { format!("{:.0}", seconds * 1e6) }
}

/// Prints all tables as Markdown.
pub fn run() {
    let floor = |c: &Card, bytes: f64, operations: f64| (bytes / c.bytes).max(operations / c.operations);
    let row = |cells: Vec<String>| say!("| {} |", cells.join(" | "));
    let head = |cells: &[&str]| {
        // A star marks a column of numbers.
        row(cells.iter().map(|c| c.trim_matches('*').to_string()).collect());
        row(cells
            .iter()
            .map(|c| if c.starts_with(char::is_alphabetic) { "---" } else { "---:" }.to_string())
            .collect());
    };
    let (h200, a100) = (CARDS[0].name, CARDS[1].name);
    let floors = [format!("*{h200} floor, us*"), format!("*{a100} floor, us*"), format!("*{h200} predicted, us*")];
    let columns = |first: &[&'static str]| -> Vec<String> {
        first.iter().map(|s| s.to_string()).chain(floors.iter().cloned()).collect()
    };
    let headed = |first: &[&'static str]| head(&columns(first).iter().map(String::as_str).collect::<Vec<_>>());
    let both = |bytes: f64, operations: f64| CARDS.iter().map(move |c| micro(floor(c, bytes, operations)));

    say!("Decode attention, one layer, one query token, {TOKENS} tokens:\n");
    headed(&["shape, cache", "*bytes a token*", "*operations a token*"]);
    for s in &SHAPES {
        for bits in [16, 4, 3, 2] {
            let (bytes, operations) = (token_bytes(s, bits), 4.0 * (s.kv_heads * s.group * s.dim) as f64);
            let (all, work) = (bytes * TOKENS, operations * TOKENS);
            let first = [format!("{}, {}", s.name, name(bits)), format!("{bytes:.0}"), format!("{operations:.0}")];
            let predicted = micro(floor(&CARDS[0], all, work) + START);
            row(first.into_iter().chain(both(all, work)).chain([predicted]).collect());
        }
    }
    say!("\nAppend, one layer; operations are comparisons with bounds, on ordinary cores:\n");
    headed(&["shape, cache, tokens", "*bytes*", "*operations*"]);
    for s in &SHAPES {
        let channels = (s.kv_heads * s.dim) as f64;
        for (bits, n) in [(16, 1.0), (3, 1.0), (16, 512.0), (3, 512.0)] {
            // Keys and values come in f32; thresholds, bounds and signposts are read once.
            let tables = if bits == 16 { 0.0 } else { channels * 4.0 * (2.0 + 7.0 + 8.0) };
            let bytes = n * (8.0 * channels + token_bytes(s, bits)) + tables;
            let operations = if bits == 16 { 0.0 } else { n * 2.0 * channels * 7.0 };
            let first = [format!("{}, {}, {n}", s.name, name(bits)), format!("{bytes:.0}"), format!("{operations:.0}")];
            let predicted = micro(bytes / CARDS[0].bytes + 2.0 * LAUNCH);
            row(first.into_iter().chain(both(bytes, 0.0)).chain([predicted]).collect());
        }
    }
    say!(
        "\nPrefill attention, one layer, {QUERIES} queries, {TOKENS} tokens; codes are decoded to fp16 rows on the way:\n"
    );
    headed(&["shape, cache", "*bytes*", "*operations*"]);
    for s in &SHAPES {
        for bits in [16, 3] {
            let channels = (s.kv_heads * s.dim) as f64;
            // Rows that were decoded are written and read again.
            let decoded = if bits == 16 { 0.0 } else { TOKENS * (token_bytes(s, bits) + 4.0 * channels) };
            let bytes = decoded + TOKENS * 4.0 * channels;
            let operations = 4.0 * QUERIES * TOKENS * (s.kv_heads * s.group * s.dim) as f64;
            let first = [format!("{}, {}", s.name, name(bits)), format!("{bytes:.2e}"), format!("{operations:.2e}")];
            // Warp-level products reach about 0.6 of what Hopper's warp-group products do.
            let predicted = micro(operations / (0.6 * CARDS[0].operations) + decoded / CARDS[0].bytes);
            row(first.into_iter().chain(both(bytes, operations)).chain([predicted]).collect());
        }
    }
    say!("\nForward pass without attention, all layers and the head, weights in fp16:\n");
    headed(&["shape, tokens", "*bytes*", "*operations*"]);
    for s in &SHAPES {
        let (layer, head) = parameters(s);
        for n in [1.0, 512.0] {
            let layers = s.layers as f64;
            let weights = layers * layer + head;
            let bytes = 2.0 * weights;
            // The head sees the last token only.
            let operations = 2.0 * (n * layers * layer + head);
            // Four products, and what lies between them and around attention, whose output a chunk brings to fp16 apart.
            let launches = layers * if n == 1.0 { 11.0 } else { 12.0 } * LAUNCH;
            let first = [format!("{}, {n}", s.name), format!("{bytes:.2e}"), format!("{operations:.2e}")];
            let reached = floor(&CARDS[0], bytes / 0.9, operations / 0.7);
            row(first.into_iter().chain(both(bytes, operations)).chain([micro(reached.max(launches))]).collect());
        }
    }
}
