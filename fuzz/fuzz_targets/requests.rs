//! Request bodies: a plan, or an error in OpenAI's shape.
#![no_main]

use kvquant_server::api::{ApiError, ChatRequest, CompletionRequest, SessionRequest, TokenizeRequest, parse};
use libfuzzer_sys::fuzz_target;

fn sound(result: Result<(), ApiError>) {
    if let Err(e) = result {
        assert_eq!(e.status.as_u16(), 400);
        let body = e.body();
        assert!(body["error"]["message"].as_str().is_some_and(|m| !m.is_empty() && m.len() < 4096), "{body}");
        assert_eq!(body["error"]["type"], "invalid_request_error");
    }
}

fuzz_target!(|body: &[u8]| {
    sound(parse::<ChatRequest>(body).and_then(|r| r.plan()).map(|_| ()));
    sound(parse::<CompletionRequest>(body).and_then(|r| r.plan()).map(|_| ()));
    sound(parse::<TokenizeRequest>(body).and_then(|r| r.input()).map(|_| ()));
    sound(parse::<SessionRequest>(body).and_then(|r| r.input()).map(|_| ()));
});
