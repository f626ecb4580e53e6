//! Quality of a cache against the same model with an fp16 cache.
use kvquant_model::{Model, ForwardError};
use kvquant_quant::{Quantizer, Spec};
use kvquant_cache::Prefill;
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct EvalResult { pub kv: String, pub bits_per_element: f64, pub cache_bytes_per_token: f64, pub ppl: f64, pub ppl_delta: f64, pub kld_mean: f64, pub kld_p999: f64, pub top1_agreement: f64 }
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Report { pub model: String, pub text: String, pub ctx: usize, pub windows: usize, pub prefill: String, pub results: Vec<EvalResult> }
#[derive(Debug, thiserror::Error)] pub enum EvalError { #[error(transparent)] Forward(#[from] ForwardError), #[error("{0}")] Invalid(String) }
#[derive(Debug, Clone)] pub struct EvalOptions { pub ctx: usize, pub windows: usize, pub prefill: Prefill }
/// `kvs`: the specs as given (name, spec, quantizer).
pub fn evaluate(_model: &Model, _model_name: &str, _ids: &[u32], _text_name: &str, _kvs: &[(String, Spec, Option<&Quantizer>)], _options: &EvalOptions, _progress: &mut dyn FnMut(usize, usize)) -> Result<Report, EvalError> { todo!() }
impl Report { pub fn table(&self) -> String { todo!() } pub fn plot_svg(&self) -> Result<String, EvalError> { todo!() } }
