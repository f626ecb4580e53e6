/// How the cache of a model is stored, as written on the command line: `nuq3-1%+sink1`.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec { Fp16, Coded(CodedSpec) }
#[derive(Debug, Clone, PartialEq)]
pub struct CodedSpec {
    pub bits: u32, pub codebook: CodebookKind,
    /// Share of outliers in 1/10,000 (100 = 1 %), 0 to 500
    pub outliers: u32,
    pub keys: Scope, pub values: Scope,
    pub stage: KeyStage, pub sinks: usize, pub recent: usize,
    pub qnorm: bool, pub weights: FisherWeights,
    /// per-token/group scopes: store a zero point next to the scale
    pub zero_point: bool,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub enum CodebookKind { Nuq, Int, Nf }
/// What shares one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub enum Scope { Channel, Token, Group(usize) }
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub enum KeyStage { PreRope, PostRope }
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub enum FisherWeights { FisherScale2, Fisher, None }
#[derive(Debug, thiserror::Error)] pub enum SpecError { #[error("{0}")] Invalid(String) }
impl std::str::FromStr for Spec { type Err = SpecError; fn from_str(_s: &str) -> Result<Self, SpecError> { todo!() } }
impl std::fmt::Display for Spec { fn fmt(&self, _f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { todo!() } }
impl Spec {
    pub fn sinks(&self) -> usize { todo!() }
    pub fn recent(&self) -> usize { todo!() }
    /// Whether a fit from a quantizer file is needed (channel scope or nuq codebook).
    pub fn needs_fit(&self) -> bool { todo!() }
}
