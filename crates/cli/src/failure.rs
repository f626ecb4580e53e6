//! Errors as the user sees them: one line that says what and why, and an exit code: 2 for input that must change,
//! 1 for what failed on the way.

use anyhow::Error;
use kvquant_cache::{CacheError, SessionError};
use kvquant_calib::CalibError;
use kvquant_cuda::CudaError;
use kvquant_eval::retrieval::RetrievalError;
use kvquant_eval::{EvalError, FormatError};
use kvquant_kernels::dispatch::DispatchError;
use kvquant_model::ForwardError;
use kvquant_model::pull::PullError;
use kvquant_model::sampling::SamplingError;
use kvquant_model::source::SourceError;
use kvquant_model::template::TemplateError;
use kvquant_model::tokenizer::TokenizerError;
use kvquant_quant::{FileError, SpecError};
use kvquant_server::ServeError;

/// Input that the user must change.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Input(pub String);

/// The chain of causes, without repeating what a message already contains.
pub fn describe(e: &Error) -> String {
    let mut text = String::new();
    for cause in e.chain() {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text += ": ";
            }
            text += &cause;
        }
    }
    text
}

/// Whether the reader of our output went away, as `head` does.
pub fn is_broken_pipe(e: &Error) -> bool {
    e.chain().any(|c| c.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}

/// Whether the user's input is at fault.
pub fn is_input(e: &Error) -> bool {
    e.chain().any(|c| {
        c.is::<Input>()
            || c.is::<SpecError>()
            || c.is::<FormatError>()
            || c.is::<SourceError>()
            || c.is::<TokenizerError>()
            || c.is::<TemplateError>()
            || c.is::<DispatchError>()
            || c.downcast_ref().is_some_and(cuda)
            || matches!(c.downcast_ref(), Some(PullError::Unknown { .. } | PullError::NoHub { .. }))
            || matches!(c.downcast_ref(), Some(SamplingError::Parameter { .. }))
            || matches!(c.downcast_ref(), Some(ServeError::Listen { .. } | ServeError::Origin(_)))
            || matches!(c.downcast_ref(), Some(SessionError::Damaged { .. } | SessionError::Other { .. }))
            || c.downcast_ref().is_some_and(file)
            || c.downcast_ref().is_some_and(forward)
            || matches!(c.downcast_ref(), Some(CalibError::Forward(f)) if forward(f))
            || matches!(c.downcast_ref(), Some(RetrievalError::Option { .. } | RetrievalError::NoFiller))
            || matches!(c.downcast_ref(), Some(RetrievalError::Forward(f)) if forward(f))
            || c.downcast_ref().is_some_and(|e| match e {
                EvalError::Forward(f) => forward(f),
                EvalError::TextTooShort { .. }
                | EvalError::Context { .. }
                | EvalError::Simulated { .. }
                | EvalError::Generate { .. }
                | EvalError::NoWindows => true,
                EvalError::Plot(_) => false,
            })
    })
}

fn cuda(e: &CudaError) -> bool {
    use CudaError::{NoBlas, NoCompiler, NoDevice, NoDriver, Unsupported};
    matches!(e, NoDriver | NoDevice { .. } | NoCompiler { .. } | NoBlas | Unsupported { .. })
}

fn file(e: &FileError) -> bool {
    !matches!(e, FileError::Io { operation: "write", .. })
}

fn forward(e: &ForwardError) -> bool {
    match e {
        ForwardError::Source(_)
        | ForwardError::Empty
        | ForwardError::ContextFull { .. }
        | ForwardError::Tokenizer(_) => true,
        ForwardError::Quantizer(f) => file(f),
        ForwardError::Cache(c) => match c {
            CacheError::NeedsQuantizer { .. } | CacheError::Unsupported { .. } | CacheError::Fit { .. } => true,
            CacheError::Quantizer(f) => file(f),
            _ => false,
        },
        ForwardError::Dispatch(_) => true,
        ForwardError::Device(e) => e.downcast_ref().is_some_and(cuda),
        _ => false,
    }
}
