//! The quantizer of a model: a file of the user's, or one that comes with the program.

use std::path::Path;

use anyhow::Result;
use kvquant_model::Model;
use kvquant_quant::{FileError, Quantizer, Spec};

/// Files in the binary, used where their fingerprint fits.
const BUILT_IN: [(&str, &[u8]); 1] =
    [("built-in smollm2-135m", include_bytes!("../../../quantizers/smollm2-135m.safetensors"))];

/// The cache where none is asked for, and where there is no quantizer for it.
pub const DEFAULT_KV: &str = "mix4+sink1";
const WITHOUT_QUANTIZER: &str = "nuq4-1%+sink1+online";
/// The same on a GPU.
const GPU_KV: &str = "nuq4-1%+sink1";
const GPU_WITHOUT_QUANTIZER: &str = "fp16";

/// The quantizer for a model; `None` if no file is given and no built-in one fits.
///
/// A given file must be of this model. Specs that need a fit are looked up here, so that a missing one is refused
/// before any work; the error says how to make it.
pub fn find(file: Option<&Path>, model: &Model, specs: &[&Spec]) -> Result<Option<Quantizer>> {
    let found = match file {
        Some(path) => {
            let q = Quantizer::load(path)?;
            q.check_model(&model.fingerprint)?;
            Some(q)
        }
        None => built_in(model)?,
    };
    for spec in specs.iter().filter(|s| s.needs_fit()) {
        match &found {
            Some(q) => {
                q.fit(spec)?;
            }
            None => {
                let available =
                    "none: no quantizer file is given, and none that comes with the program fits this model".into();
                return Err(FileError::NoFit { spec: spec.to_string(), available }.into());
            }
        }
    }
    Ok(found)
}

/// A spec that the user asked for, or the default, and its quantizer. Where no quantizer fits the model, thresholds come
/// from the text itself if the spec can do that, and the user is told.
pub fn choose(
    file: Option<&Path>,
    model: &Model,
    asked: Option<&str>,
    on_gpu: bool,
) -> Result<(Spec, Option<Quantizer>)> {
    let spec: Spec = asked.unwrap_or(if on_gpu { GPU_KV } else { DEFAULT_KV }).parse()?;
    if on_gpu && file.is_none() && spec.needs_fit() && built_in(model)?.is_none() {
        if asked.is_none() {
            eprintln!(
                "no quantizer fits this model: {GPU_WITHOUT_QUANTIZER} instead of {spec}. \
                 `kvquant calibrate MODEL --self -o FILE` makes one; --quantizer FILE uses it."
            );
            return Ok((GPU_WITHOUT_QUANTIZER.parse()?, None));
        }
    } else if file.is_none() && spec.needs_fit() && built_in(model)?.is_none() {
        let online = if asked.is_some() { spec.to_online() } else { Some(WITHOUT_QUANTIZER.parse()?) };
        if let Some(online) = online {
            eprintln!(
                "no quantizer fits this model: {online} instead of {spec}, thresholds come from the text itself. \
                 `kvquant calibrate MODEL --self -o FILE` makes one, which loses less; --quantizer FILE uses it."
            );
            return Ok((online, None));
        }
    }
    let quantizer = find(file, model, &[&spec])?;
    Ok((spec, quantizer))
}

fn built_in(model: &Model) -> Result<Option<Quantizer>> {
    for (name, bytes) in BUILT_IN {
        let q = Quantizer::from_bytes(bytes, name)?;
        if q.model == model.fingerprint {
            return Ok(Some(q));
        }
    }
    Ok(None)
}
