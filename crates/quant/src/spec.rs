//! The spec string: how a cache is stored, the same in commands, files and reports.
//!
//! ```text
//! fp16 | BOOK BITS [-P%] [-gN] {+OPTION}
//! BOOK BITS   nuq2 nuq3 nuq4 (learned codebook), int2 int3 int4 (uniform), nf3 nf4 (normal-float),
//!             mixB (B a number from 0.5 to 7: 0 to 7 bits a channel, B on average, static learned codebooks by channel,
//!             decorrelated channels; with +sinkN and +recentN only)
//! -P%         share of outliers kept in fp16, 0 to 5 %
//! -gN         a scale per token and N channels, for keys and values, instead of the paper's scopes
//! +sinkN      the first N tokens in fp16          +recentN   at least the last N tokens in fp16
//! +qnorm      Q-Norm (paper, section 3.5)         +postrope  keys are quantized after RoPE
//! +ktoken     keys per token                      +vchannel  values per channel
//! +wfisher    codebook weights F, +wnone: none; default F s^2 (paper, eq. 7)
//! +asym       with -g: a zero point beside each scale
//! +online     no calibration: thresholds from the tokens as they come, codebooks that suit most models
//! ```

use std::fmt;
use std::str::FromStr;

/// How the cache of a model is stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec {
    /// Keys and values as fp16, the base line of every comparison.
    Fp16,
    /// Codes.
    Coded(CodedSpec),
}

/// A quantized cache.
#[derive(Debug, Clone, PartialEq)]
pub struct CodedSpec {
    /// Bits of a code: 2, 3 or 4; 0 for mixed widths.
    pub bits: u32,
    /// Where the signposts come from.
    pub codebook: CodebookKind,
    /// Share of outliers in 1/10,000 (100 = 1 %), 0 to 500.
    pub outliers: u32,
    /// What shares a key scale; per channel in the paper.
    pub keys: Scope,
    /// What shares a value scale; per token in the paper.
    pub values: Scope,
    /// Whether keys are quantized before or after RoPE.
    pub stage: KeyStage,
    /// First tokens kept in fp16.
    pub sinks: usize,
    /// Last tokens kept in fp16, at least.
    pub recent: usize,
    /// Decode with signposts that restore mean and deviation.
    pub qnorm: bool,
    /// Weights of the codebook's k-means.
    pub weights: FisherWeights,
    /// Per-token scales come with a zero point.
    pub zero_point: bool,
    /// Thresholds come from the tokens themselves, while they are stored, and codebooks are universal.
    pub online: bool,
}

/// Where signposts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodebookKind {
    /// Learned: weighted k-means over a calibration set.
    Nuq,
    /// Evenly spaced.
    Int,
    /// Quantiles of a normal distribution.
    Nf,
    /// Learned by channel, as many signposts as the channel deserves.
    Mix {
        /// Mean bits of a code, in hundredths.
        hundredths: u32,
    },
}

/// What shares one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A channel, over all tokens, by thresholds from calibration.
    Channel,
    /// A token, over all channels of all KV heads.
    Token,
    /// A token and this many neighbouring channels.
    Group(usize),
}

/// When keys are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyStage {
    /// Before the rotation, which the kernel then applies.
    PreRope,
    /// After it.
    PostRope,
}

/// Weights of the codebook fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FisherWeights {
    /// F s^2 (paper, eq. 7).
    FisherScale2,
    /// F, as the paper's reference code does.
    Fisher,
    /// All 1.
    None,
}

/// A spec string that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cache spec `{spec}`: {part} {problem}; supported: fp16, mixB (0.5 to 7), nuq2..4, int2..4, nf3..4, each with -P% (0 to 5) or -gN, then +sinkN +recentN +qnorm +postrope +ktoken +kchannel +vtoken +vchannel +wfisher +wnone +asym +online; for example nuq3-1%+sink1, nuq4-1%+sink4+recent64, int4-g32"
)]
pub struct SpecError {
    spec: String,
    part: String,
    problem: &'static str,
}

/// Tokens kept exactly that a spec may ask for; far beyond use, it keeps sums from overflowing.
const MOST_TOKENS: usize = 1 << 20;

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        let err = |part: &str, problem| SpecError { spec: s.to_string(), part: format!("`{part}`"), problem };
        let mut options = s.split('+');
        let base = options.next().unwrap_or_default();
        if base == "fp16" {
            return match options.next() {
                None => Ok(Spec::Fp16),
                Some(o) => Err(err(o, "does not apply to fp16")),
            };
        }
        if base.starts_with("sim:") {
            return Err(err(s, "is another program's format, simulated: only `eval` and `ablate` know these"));
        }
        let mut parts = base.split('-');
        let name = parts.next().unwrap_or_default();
        let (codebook, bits) = match name {
            "nuq2" => (CodebookKind::Nuq, 2),
            "nuq3" => (CodebookKind::Nuq, 3),
            "nuq4" => (CodebookKind::Nuq, 4),
            "int2" => (CodebookKind::Int, 2),
            "int3" => (CodebookKind::Int, 3),
            "int4" => (CodebookKind::Int, 4),
            "nf3" => (CodebookKind::Nf, 3),
            "nf4" => (CodebookKind::Nf, 4),
            _ => match name.strip_prefix("mix") {
                Some(mean) => match hundredths(mean).filter(|h| (50..=700).contains(h)) {
                    Some(hundredths) => (CodebookKind::Mix { hundredths }, 0),
                    None => return Err(err(name, "needs a mean of 0.5 to 7 bits, with at most two decimals")),
                },
                None => return Err(err(name, "is unknown")),
            },
        };
        let mixed = matches!(codebook, CodebookKind::Mix { .. });
        let mut c = CodedSpec {
            bits,
            codebook,
            outliers: 0,
            keys: Scope::Channel,
            values: if mixed { Scope::Channel } else { Scope::Token },
            stage: KeyStage::PreRope,
            sinks: 0,
            recent: 0,
            qnorm: false,
            weights: FisherWeights::FisherScale2,
            zero_point: true,
            online: false,
        };
        let (mut grouped, mut shared) = (false, false);
        for part in parts {
            if mixed {
                return Err(err(part, "does not combine with mix"));
            }
            if let Some(share) = part.strip_suffix('%') {
                if std::mem::replace(&mut shared, true) {
                    return Err(err(part, "is a second share of outliers"));
                }
                c.outliers = share_of(share)
                    .ok_or_else(|| err(part, "is not a share of 0 to 5 %, with at most two decimals"))?;
            } else if let Some(n) = part.strip_prefix('g') {
                if grouped {
                    return Err(err(part, "is a second group size"));
                }
                let n = count(n)
                    .filter(|n| *n > 0 && n.is_multiple_of(4))
                    .ok_or_else(|| err(part, "is not a multiple of 4"))?;
                (c.keys, c.values, c.zero_point, grouped) = (Scope::Group(n), Scope::Group(n), false, true);
            } else {
                return Err(err(part, "is unknown"));
            }
        }
        let mut seen: Vec<&str> = Vec::new();
        for o in options {
            let kind = o.trim_end_matches(|ch: char| ch.is_ascii_digit());
            if seen.contains(&kind) {
                return Err(err(o, "is given twice"));
            }
            seen.push(kind);
            for (a, b) in [("wfisher", "wnone"), ("ktoken", "kchannel"), ("vtoken", "vchannel")] {
                if seen.contains(&a) && seen.contains(&b) {
                    return Err(err(o, "contradicts another option"));
                }
            }
            let tokens = || {
                count(&o[kind.len()..]).filter(|n| *n <= MOST_TOKENS).ok_or_else(|| err(o, "needs a number of tokens"))
            };
            match kind {
                "sink" => c.sinks = tokens()?,
                "recent" => c.recent = tokens()?,
                _ if mixed => return Err(err(o, "does not combine with mix")),
                _ if kind != o => return Err(err(o, "is unknown")),
                "qnorm" => c.qnorm = true,
                "postrope" => c.stage = KeyStage::PostRope,
                "ktoken" if !grouped => c.keys = Scope::Token,
                "kchannel" if !grouped => c.keys = Scope::Channel,
                "vtoken" if !grouped => c.values = Scope::Token,
                "vchannel" if !grouped => c.values = Scope::Channel,
                "ktoken" | "kchannel" | "vtoken" | "vchannel" => return Err(err(o, "contradicts -gN")),
                "wfisher" => c.weights = FisherWeights::Fisher,
                "wnone" => c.weights = FisherWeights::None,
                "asym" if grouped => c.zero_point = true,
                "asym" => return Err(err(o, "needs -gN")),
                "online" => c.online = true,
                _ => return Err(err(o, "is unknown")),
            }
        }
        if grouped && c.outliers > 0 {
            return Err(err("-gN", "does not combine with outliers"));
        }
        if grouped && c.codebook == CodebookKind::Nuq {
            return Err(err("-gN", "needs int or nf"));
        }
        if c.codebook != CodebookKind::Nuq && (c.qnorm || c.weights != FisherWeights::FisherScale2) {
            return Err(err("+qnorm, +wfisher or +wnone", "needs nuq"));
        }
        if c.online && !c.is_calibrated() {
            return Err(err(
                "+online",
                "has nothing to replace: there are no static thresholds and no learned codebook",
            ));
        }
        if c.online && (c.qnorm || c.weights != FisherWeights::FisherScale2) {
            return Err(err("+online", "does not combine with what only calibration can do: +qnorm, +wfisher, +wnone"));
        }
        Ok(Spec::Coded(c))
    }
}

impl CodedSpec {
    /// Whether thresholds or codebooks come from data.
    fn is_calibrated(&self) -> bool {
        matches!(self.codebook, CodebookKind::Nuq | CodebookKind::Mix { .. })
            || self.keys == Scope::Channel
            || self.values == Scope::Channel
    }
}

fn count(s: &str) -> Option<usize> {
    (!s.is_empty() && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok()).flatten()
}

/// `1`, `0.5`, `0.25` -> 100, 50, 25.
fn share_of(s: &str) -> Option<u32> {
    hundredths(s).filter(|p| *p <= 500)
}

fn hundredths(s: &str) -> Option<u32> {
    let (whole, part) = s.split_once('.').unwrap_or((s, "0"));
    let whole = count(whole).filter(|w| *w < 100)?;
    let hundredths = match part.len() {
        1 => count(part)? * 10,
        2 => count(part)?,
        _ => return None,
    };
    Some((whole * 100 + hundredths) as u32)
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spec::Coded(c) = self else { return f.write_str("fp16") };
        let name = match c.codebook {
            CodebookKind::Nuq => "nuq",
            CodebookKind::Int => "int",
            CodebookKind::Nf => "nf",
            CodebookKind::Mix { .. } => "mix",
        };
        match c.codebook {
            CodebookKind::Mix { hundredths: h } if h % 100 == 0 => write!(f, "{name}{}", h / 100)?,
            CodebookKind::Mix { hundredths: h } if h % 10 == 0 => write!(f, "{name}{}.{}", h / 100, h / 10 % 10)?,
            CodebookKind::Mix { hundredths: h } => write!(f, "{name}{}.{:02}", h / 100, h % 100)?,
            _ => write!(f, "{name}{}", c.bits)?,
        }
        if c.outliers > 0 {
            let (whole, part) = (c.outliers / 100, c.outliers % 100);
            match part {
                0 => write!(f, "-{whole}%")?,
                p if p % 10 == 0 => write!(f, "-{whole}.{}%", p / 10)?,
                p => write!(f, "-{whole}.{p:02}%")?,
            }
        }
        if let Scope::Group(n) = c.keys {
            write!(f, "-g{n}")?;
        }
        if c.sinks > 0 {
            write!(f, "+sink{}", c.sinks)?;
        }
        if c.recent > 0 {
            write!(f, "+recent{}", c.recent)?;
        }
        let grouped = matches!(c.keys, Scope::Group(_));
        for (set, option) in [
            (c.qnorm, "+qnorm"),
            (c.stage == KeyStage::PostRope, "+postrope"),
            (c.keys == Scope::Token, "+ktoken"),
            (c.values == Scope::Channel && c.bits > 0, "+vchannel"),
            (c.weights == FisherWeights::Fisher, "+wfisher"),
            (c.weights == FisherWeights::None, "+wnone"),
            (grouped && c.zero_point, "+asym"),
            (c.online, "+online"),
        ] {
            if set {
                f.write_str(option)?;
            }
        }
        Ok(())
    }
}

impl Spec {
    /// First tokens kept in fp16.
    pub fn sinks(&self) -> usize {
        if let Spec::Coded(c) = self { c.sinks } else { 0 }
    }

    /// Last tokens kept in fp16, at least. Where thresholds come from the tokens themselves, a block is whole first.
    pub fn recent(&self) -> usize {
        if let Spec::Coded(c) = self { c.recent.max(usize::from(c.online)) } else { 0 }
    }

    /// The same cache without calibration, if there is such.
    pub fn to_online(&self) -> Option<Spec> {
        let online = format!("{self}+online");
        online.parse().ok().filter(|_| self.needs_fit())
    }

    /// Whether a fit from a quantizer file is needed: a learned codebook, or static ranges of channels.
    pub fn needs_fit(&self) -> bool {
        matches!(self, Spec::Coded(c) if c.is_calibrated() && !c.online)
    }

    /// What identifies a fit: the canonical string without the recent window, which no fit depends on.
    pub fn fit_key(&self) -> String {
        match self {
            Spec::Fp16 => "fp16".into(),
            Spec::Coded(c) => Spec::Coded(CodedSpec { recent: 0, ..c.clone() }).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_strings_survive_a_round_trip() {
        for s in [
            "fp16",
            "nuq3",
            "nuq3-1%",
            "nuq4-0.5%+sink1",
            "nuq2-0.25%+sink4+recent64+qnorm",
            "int4-g32",
            "int4-g32+asym",
            "nf4-1%+sink1+postrope+ktoken+vchannel",
            "nuq3-1%+wfisher",
            "nuq3-5%+wnone",
            "mix3+sink1",
            "mix2.5+sink4+recent32",
            "mix3.25",
            "nuq3-1%+sink1+recent32+online",
            "int4+postrope+online",
        ] {
            assert_eq!(s.parse::<Spec>().unwrap().to_string(), s);
        }
        let kchannel: Spec = "nuq3-1.0%+kchannel+vtoken+sink0".parse().unwrap();
        assert_eq!(kchannel.to_string(), "nuq3-1%");
    }

    #[test]
    fn what_is_unknown_is_named_with_what_is_supported() {
        for (s, part) in [
            ("", "``"),
            ("nuq5", "`nuq5`"),
            ("mix0.2", "`mix0.2`"),
            ("mix8", "`mix8`"),
            ("mix3-1%", "`1%`"),
            ("mix3+qnorm", "`qnorm`"),
            ("nf2", "`nf2`"),
            ("nuq3-6%", "`6%`"),
            ("nuq3-1.234%", "`1.234%`"),
            ("nuq3-x", "`x`"),
            ("int4-g30", "`g30`"),
            ("nuq3+sink", "`sink`"),
            ("nuq3+sink99999999999999999999", "`sink9"),
            ("nuq3+sink1+sink2", "`sink2`"),
            ("nuq3+fast", "`fast`"),
            ("nuq3-1%-2%", "`2%`"),
            ("int4-g8-g16", "`g16`"),
            ("nuq3+wfisher+wnone", "`wnone`"),
            ("nuq3+ktoken+kchannel", "`kchannel`"),
            ("nuq3+qnorm3", "`qnorm3`"),
            ("fp16+sink1", "`sink1`"),
            ("int3+qnorm", "qnorm"),
            ("nuq4-g32", "-gN"),
            ("int4-1%-g32", "-gN"),
            ("int4+asym", "`asym`"),
            ("sim:q4_0", "`sim:q4_0` is another program's format, simulated: only `eval` and `ablate`"),
            ("mix3+online", "`online`"),
            ("int4-g32+online", "+online"),
            ("nuq3+wnone+online", "+online"),
        ] {
            let e = s.parse::<Spec>().unwrap_err().to_string();
            assert!(e.contains(part) && e.contains("nuq3-1%+sink1"), "{s}: {e}");
        }
    }

    #[test]
    fn a_fit_does_not_depend_on_the_window() {
        let spec: Spec = "nuq3-1%+sink1+recent32".parse().unwrap();
        assert_eq!(spec.fit_key(), "nuq3-1%+sink1");
        assert!(spec.needs_fit());
        assert!(!"int4-g32".parse::<Spec>().unwrap().needs_fit());
        assert!(!"int3+ktoken".parse::<Spec>().unwrap().needs_fit());
        assert!("int3".parse::<Spec>().unwrap().needs_fit());
    }

    #[test]
    fn online_takes_the_place_of_a_fit() {
        let spec = |s: &str| s.parse::<Spec>().unwrap();
        let online = spec("nuq3-1%+sink1").to_online().unwrap();
        assert_eq!(online.to_string(), "nuq3-1%+sink1+online");
        assert!(!online.needs_fit());
        // A block is quantized when it is whole.
        assert_eq!((online.recent(), spec("nuq3+recent32+online").recent()), (1, 32));
        assert_eq!([spec("mix3"), spec("int4-g32"), spec("fp16"), online].map(|s| s.to_online()), [const { None }; 4]);
    }
}
