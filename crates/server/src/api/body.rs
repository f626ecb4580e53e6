//! What clients send, as it comes: any number, any combination. `request` checks it.

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Content, Prompt, Texts, whole};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "some fields are taken and change nothing")]
pub(super) struct ChatMessage {
    pub(super) role: String,
    pub(super) content: Option<Content>,
    pub(super) name: Option<Value>,
    pub(super) tool_calls: Option<Value>,
    pub(super) tool_call_id: Option<Value>,
    pub(super) refusal: Option<Value>,
    pub(super) audio: Option<Value>,
    pub(super) annotations: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
    pub(super) include_obfuscation: Option<bool>,
}

/// `POST /v1/chat/completions`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "some fields are taken and change nothing")]
pub struct ChatRequest {
    pub(super) model: String,
    pub(super) messages: Vec<ChatMessage>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) max_tokens: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) max_completion_tokens: Option<i64>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) presence_penalty: Option<f64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) seed: Option<i64>,
    pub(super) stop: Option<Texts>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) n: Option<i64>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) logprobs: Option<bool>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) top_logprobs: Option<i64>,
    pub(super) logit_bias: Option<Value>,
    pub(super) tools: Option<Value>,
    pub(super) tool_choice: Option<Value>,
    pub(super) functions: Option<Value>,
    pub(super) function_call: Option<Value>,
    pub(super) response_format: Option<Value>,
    pub(super) modalities: Option<Value>,
    pub(super) audio: Option<Value>,
    pub(super) parallel_tool_calls: Option<bool>,
    pub(super) user: Option<String>,
    pub(super) metadata: Option<IgnoredAny>,
    pub(super) store: Option<bool>,
    pub(super) service_tier: Option<String>,
    pub(super) safety_identifier: Option<String>,
    pub(super) prompt_cache_key: Option<String>,
}

/// `POST /v1/completions`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "some fields are taken and change nothing")]
pub struct CompletionRequest {
    pub(super) model: String,
    pub(super) prompt: Prompt,
    #[serde(default, deserialize_with = "whole")]
    pub(super) max_tokens: Option<i64>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) presence_penalty: Option<f64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) seed: Option<i64>,
    pub(super) stop: Option<Texts>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) n: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) best_of: Option<i64>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    #[serde(default, deserialize_with = "whole")]
    pub(super) logprobs: Option<i64>,
    pub(super) logit_bias: Option<Value>,
    pub(super) echo: Option<bool>,
    pub(super) suffix: Option<String>,
    pub(super) user: Option<String>,
}

/// `POST /v1/tokenize`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    pub(super) model: Option<String>,
    pub(super) prompt: Option<String>,
    pub(super) messages: Option<Vec<ChatMessage>>,
}

/// `POST /v1/sessions`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionRequest {
    pub(super) name: String,
    pub(super) model: Option<String>,
    pub(super) prompt: Option<String>,
    pub(super) messages: Option<Vec<ChatMessage>>,
}

/// Reads JSON.
///
/// # Errors
/// It is no JSON, or not of this shape; the error names the field.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(body).map_err(|e| {
        let at = e.valid_up_to();
        ApiError { param: None, ..ApiError::invalid("", format!("the body is not UTF-8 (byte {at})")) }
    })?;
    let mut json = serde_json::Deserializer::from_str(text);
    let wrong = |path: String, e: serde_json::Error| {
        let param = (path != "." && !path.is_empty() && !path.contains('?')).then_some(path);
        let place = param.as_ref().map(|p| format!("`{p}`: ")).unwrap_or_default();
        ApiError { param, ..ApiError::invalid("", format!("{place}{e}")) }
    };
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| wrong(e.path().to_string(), e.into_inner()))?;
    json.end().map_err(|e| wrong(String::new(), e))?;
    Ok(value)
}
