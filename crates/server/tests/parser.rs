//! The request parser on whatever may come: it answers with a plan or with an error in OpenAI's shape, and never panics.

use kvquant_server::api::{
    ApiError, ChatRequest, CompletionRequest, Input, Plan, SessionRequest, TokenizeRequest, parse,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn chat(body: &[u8]) -> Result<Plan, ApiError> {
    parse::<ChatRequest>(body)?.plan()
}

fn all(body: &[u8]) -> [Result<(), ApiError>; 4] {
    [
        chat(body).map(|_| ()),
        parse::<CompletionRequest>(body).and_then(|r| r.plan()).map(|_| ()),
        parse::<TokenizeRequest>(body).and_then(|r| r.input()).map(|_| ()),
        parse::<SessionRequest>(body).and_then(|r| r.input()).map(|_| ()),
    ]
}

#[track_caller]
fn sound(e: &ApiError) {
    assert_eq!(e.status.as_u16(), 400);
    let body = e.body();
    assert!(body["error"]["message"].as_str().is_some_and(|m| !m.is_empty() && m.len() < 4096), "{body}");
    assert_eq!(body["error"]["type"], "invalid_request_error");
}

/// Requests that use every field.
fn full() -> Value {
    json!({
        "model": "m", "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]},
            {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}],
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "frequency_penalty": 0.1,
        "presence_penalty": -0.1, "seed": -3, "stop": ["a", "b"], "n": 1, "stream": true,
        "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 3, "logit_bias": {}, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}, "store": false,
    })
}

#[test]
fn a_full_request_is_understood() {
    let plan = chat(full().to_string().as_bytes()).unwrap();
    let Input::Messages(messages) = &plan.input else { panic!("{plan:?}") };
    assert_eq!(messages[1].content, "hi there");
    assert_eq!((plan.max_tokens, plan.logprobs, plan.stream, plan.include_usage), (Some(7), Some(3), true, true));
    assert_eq!((plan.sampling.top_k, plan.sampling.seed), (40, (-3i64) as u64));
    let least =
        chat(br#"{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":5.0,"temperature":null}"#)
            .unwrap();
    assert_eq!((least.max_tokens, least.sampling.temperature, least.stream), (Some(5), 1.0, false));
    let c = parse::<CompletionRequest>(br#"{"model":"m","prompt":[[1,2]],"logprobs":0}"#).unwrap().plan().unwrap();
    assert_eq!((c.input, c.max_tokens, c.logprobs), (Input::Tokens(vec![1, 2]), Some(16), Some(0)));
}

#[test]
fn what_is_wrong_is_named() {
    for (path, value, param) in [
        ("/messages", json!([]), "messages"),
        ("/messages/0/role", json!("wizard"), "messages[0].role"),
        ("/messages/0/content", json!(null), "messages[0].content"),
        ("/messages/0/content", json!(5), "messages[0].content"),
        ("/messages/0", json!({"role": "user", "content": "x", "name": "bob"}), "messages[0].name"),
        ("/messages/1/content/0", json!({"type": "image_url", "image_url": {"url": "x"}}), "messages[1].content"),
        ("/max_tokens", json!(0), "max_tokens"),
        ("/max_tokens", json!(-1e300), "max_tokens"),
        ("/max_tokens", json!(1.5), "max_tokens"),
        ("/max_tokens", json!("7"), "max_tokens"),
        ("/temperature", json!(2.01), "temperature"),
        ("/temperature", json!(true), "temperature"),
        ("/top_p", json!(-0.1), "top_p"),
        ("/top_k", json!(-2), "top_k"),
        ("/min_p", json!(1.1), "min_p"),
        ("/frequency_penalty", json!(3), "frequency_penalty"),
        ("/n", json!(2), "n"),
        ("/stop", json!(["a", ""]), "stop"),
        ("/stop", json!(vec!["x"; 17]), "stop"),
        ("/stop", json!({}), "stop"),
        ("/stream", json!("yes"), "stream"),
        ("/stream", json!(false), "stream_options"),
        ("/logprobs", json!(false), "top_logprobs"),
        ("/top_logprobs", json!(21), "top_logprobs"),
        ("/logit_bias", json!({"5": 1}), "logit_bias"),
        ("/tools", json!([{"type": "function"}]), "tools"),
        ("/response_format", json!({"type": "json_object"}), "response_format"),
    ] {
        let mut request = full();
        *request.pointer_mut(path).unwrap() = value;
        let e = chat(request.to_string().as_bytes()).unwrap_err();
        sound(&e);
        assert!(e.param.as_deref().is_some_and(|p| p.starts_with(param)), "{path}: {e:?}");
    }
    for (body, says) in [
        (&b"{"[..], "EOF"),
        (b"", "EOF"),
        (b"[]", "ChatRequest"),
        (b"{\"model\":\"\xff\"}", "UTF-8"),
        (b"{\"model\":\"m\",\"messages\":[],\"bogus\":1}", "bogus"),
        (b"{\"model\":\"m\",\"model\":\"m\"}", "duplicate"),
        (b"{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]} x", "trailing"),
        (b"{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"\\ud800\"}]}", "hex escape"),
        (b"{\"model\":\"m\",\"messages\":[],\"temperature\":1e999}", "range"),
    ] {
        let e = chat(body).unwrap_err();
        sound(&e);
        assert!(e.message.contains(says), "{}: {e:?}", String::from_utf8_lossy(body));
    }
    // Deep nesting ends in an error and not in the stack's end.
    let deep = format!("{{\"model\":\"m\",\"messages\":{}", "[".repeat(100_000));
    sound(&chat(deep.as_bytes()).unwrap_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_bytes(body in prop::collection::vec(any::<u8>(), 0..200)) {
        all(&body).iter().filter_map(|r| r.as_ref().err()).for_each(sound);
    }

    #[test]
    fn a_sound_request_with_bytes_changed(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let mut body = full().to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if cuts {
            body.truncate(cut.index(body.len()));
        }
        all(&body).iter().filter_map(|r| r.as_ref().err()).for_each(sound);
    }

    #[test]
    fn a_field_of_any_value(field in prop::sample::select(vec![
        "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "stream",
        "stream_options", "logprobs", "top_logprobs", "logit_bias", "tools", "name", "echo", "suffix",
    ]), value in value()) {
        let mut request = full();
        request[field] = value;
        all(request.to_string().as_bytes()).iter().filter_map(|r| r.as_ref().err()).for_each(sound);
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("role|content|type|text|.{0,4}", inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}
