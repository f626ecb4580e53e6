//! The quantizer of a model: a file of the user's, or one that comes with the program.

use std::path::Path;

use anyhow::Result;
use kvquant_model::Model;
use kvquant_quant::{FileError, Quantizer, Spec};

/// Files in the binary, used where their fingerprint fits.
const BUILT_IN: [(&str, &[u8]); 1] =
    [("built-in smollm2-135m", include_bytes!("../../../quantizers/smollm2-135m.safetensors"))];

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

fn built_in(model: &Model) -> Result<Option<Quantizer>> {
    for (name, bytes) in BUILT_IN {
        let q = Quantizer::from_bytes(bytes, name)?;
        if q.model == model.fingerprint {
            return Ok(Some(q));
        }
    }
    Ok(None)
}
