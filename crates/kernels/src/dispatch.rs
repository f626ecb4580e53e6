//! Which instruction set this process uses: found once, at run time.
//!
//! `KVQUANT_KERNEL=scalar|avx2|avx512|neon` overrides the choice; asking for what the CPU lacks is an error.

use std::sync::OnceLock;

/// An instruction set with kernels of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, the reference.
    Scalar,
    /// AVX2 with FMA and F16C (x86-64).
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI besides AVX2 (x86-64); the first CPUs with AVX-512 lack VNNI and are taken as AVX2.
    Avx512,
    /// NEON (aarch64).
    Neon,
}

/// The override can't be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("KVQUANT_KERNEL={asked} is {problem}; available here: {available}")]
pub struct DispatchError {
    asked: String,
    problem: &'static str,
    available: String,
}

impl Isa {
    /// The name that `KVQUANT_KERNEL` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// All that this CPU has, the best last.
    pub fn available() -> Vec<Isa> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Neon].into_iter().filter(|i| i.is_available()).collect()
    }
}

fn choose(asked: Option<&str>) -> Result<Isa, DispatchError> {
    let available = Isa::available();
    let Some(asked) = asked else {
        return Ok(*available.last().expect("scalar is always available"));
    };
    if let Some(&isa) = available.iter().find(|i| i.name() == asked) {
        return Ok(isa);
    }
    let known = [Isa::Avx2, Isa::Avx512, Isa::Neon].iter().any(|i| i.name() == asked);
    Err(DispatchError {
        asked: asked.to_string(),
        problem: if known { "not what this CPU has" } else { "unknown" },
        available: available.iter().map(|i| i.name()).collect::<Vec<_>>().join(", "),
    })
}

/// The instruction set of this process.
///
/// # Errors
/// `KVQUANT_KERNEL` names one that is unknown or that this CPU lacks.
pub fn isa() -> Result<Isa, DispatchError> {
    static CHOICE: OnceLock<Result<Isa, DispatchError>> = OnceLock::new();
    CHOICE.get_or_init(|| choose(std::env::var("KVQUANT_KERNEL").ok().as_deref())).clone()
}

/// What the CPU has and what was chosen, for people.
pub fn cpu_report() -> String {
    let available = Isa::available().iter().map(|i| i.name()).collect::<Vec<_>>().join(", ");
    let chosen = match isa() {
        Ok(isa) => isa.name().to_string(),
        Err(e) => e.to_string(),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "architecture  {}\nthreads       {threads}\navailable     {available}\nchosen        {chosen}\noverride      KVQUANT_KERNEL={}\n",
        std::env::consts::ARCH,
        std::env::var("KVQUANT_KERNEL").unwrap_or_else(|_| "(not set)".into())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_override_is_followed_or_refused() {
        assert_eq!(choose(Some("scalar")), Ok(Isa::Scalar));
        let unknown = choose(Some("sse9")).unwrap_err().to_string();
        assert!(unknown.contains("unknown") && unknown.contains("scalar"), "{unknown}");
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        assert!(choose(Some(foreign)).unwrap_err().to_string().contains("not what this CPU has"));
    }
}
