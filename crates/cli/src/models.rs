//! MODEL and --kv arguments to loaded things.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use kvquant_eval::Format;
use kvquant_model::{Activations, ChatTemplate, Model, Source, Tokenizer, pull};
use kvquant_quant::Spec;

use crate::failure::Input;
use crate::progress::Progress;

static ACTIVATIONS: OnceLock<Activations> = OnceLock::new();

/// The values of --activations.
pub fn activations() -> impl TypedValueParser<Value = Activations> {
    PossibleValuesParser::new(Activations::ALL.map(Activations::name))
        .map(|name| Activations::ALL.into_iter().find(|a| a.name() == name).unwrap_or_default())
}

/// What --activations asks for, before any model is loaded.
pub fn set_activations(asked: Activations) {
    ACTIVATIONS.get_or_init(|| asked);
}

/// A model with its text side.
pub struct Loaded {
    pub model: Model,
    pub tokenizer: Tokenizer,
    /// Its files.
    pub source: Source,
    /// Where they are: a GGUF file or a folder.
    pub path: PathBuf,
    /// As the user named it, a path cut to its file name.
    pub name: String,
}

/// Finds (pulls, if it is a known name) and loads MODEL, for texts of `context` tokens where that is known.
pub fn load(model: &str, context: Option<usize>) -> Result<Loaded> {
    let mut progress = Progress::new();
    let path = pull::resolve(model, &mut |stage, done, total| progress.update(stage, done, total))?;
    let (mut loaded, source) = Model::load_for(&path, context, &mut |done, total| {
        progress.update("loading", done as u64, total as u64);
    })?;
    loaded.activations = ACTIVATIONS.get().copied().unwrap_or_default();
    let tokenizer = Tokenizer::from_source(&source)?;
    let name = Path::new(model).file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Loaded { model: loaded, tokenizer, source, path, name })
}

impl Loaded {
    /// The beginning-of-text token, where the model expects one.
    pub fn bos(&self) -> Option<u32> {
        self.tokenizer.bos().filter(|_| self.tokenizer.add_bos())
    }

    /// The model's chat template.
    pub fn template(&self) -> Result<ChatTemplate> {
        Ok(ChatTemplate::from_source(&self.source)?)
    }
}

/// Cache specs, separated by commas.
pub fn specs(list: &str) -> Result<Vec<(String, Spec)>> {
    listed(list)
}

/// Cache specs and simulated formats, separated by commas.
pub fn formats(list: &str) -> Result<Vec<(String, Format)>> {
    listed(list)
}

fn listed<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(list: &str) -> Result<Vec<(String, T)>> {
    let all: Vec<_> = list
        .split(',')
        .map(|s| s.trim())
        .filter(|s| !s.is_empty())
        .map(|s| Ok((s.to_string(), s.parse::<T>()?)))
        .collect::<Result<_>>()?;
    if all.is_empty() {
        return Err(Input("--kv names no cache; for example --kv fp16,mix3+sink1".into()).into());
    }
    Ok(all)
}
