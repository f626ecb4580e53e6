//! Fields that JSON writes in more than one way.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

/// A whole number, also when it is written as 5.0. Nothing and null are `None`.
pub(super) fn whole<'de, D: Deserializer<'de>>(d: D) -> Result<Option<i64>, D::Error> {
    struct Whole;
    impl Visitor<'_> for Whole {
        type Value = Option<i64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number")
        }
        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_i64<E: de::Error>(self, x: i64) -> Result<Self::Value, E> {
            Ok(Some(x))
        }
        fn visit_u64<E: de::Error>(self, x: u64) -> Result<Self::Value, E> {
            // Beyond every limit anyway.
            Ok(Some(i64::try_from(x).unwrap_or(i64::MAX)))
        }
        fn visit_f64<E: de::Error>(self, x: f64) -> Result<Self::Value, E> {
            if x.fract() == 0.0 { Ok(Some(x as i64)) } else { Err(E::invalid_value(de::Unexpected::Float(x), &self)) }
        }
    }
    d.deserialize_any(Whole)
}

/// A text, or a list of texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Texts(pub Vec<String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Texts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: de::Error>(self, s: &str) -> Result<Texts, E> {
                Ok(Texts(vec![s.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Texts, A::Error> {
                let mut all = Vec::new();
                while let Some(s) = list.next_element()? {
                    all.push(s);
                }
                Ok(Texts(all))
            }
        }
        d.deserialize_any(V)
    }
}

/// A message's content: a text, or parts that are texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content(pub String);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    r#type: String,
    text: Option<String>,
    image_url: Option<de::IgnoredAny>,
    input_audio: Option<de::IgnoredAny>,
    file: Option<de::IgnoredAny>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of text parts")
            }
            fn visit_str<E: de::Error>(self, s: &str) -> Result<Content, E> {
                Ok(Content(s.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
                let mut all = String::new();
                while let Some(part) = list.next_element::<Part>()? {
                    let other = part.image_url.is_some() || part.input_audio.is_some() || part.file.is_some();
                    match part.text {
                        Some(text) if part.r#type == "text" && !other => all.push_str(&text),
                        _ => {
                            return Err(de::Error::custom(format!(
                                "a part of type `{}` is not supported; this model reads parts of type `text`, with `text`",
                                part.r#type.chars().take(40).collect::<String>()
                            )));
                        }
                    }
                }
                Ok(Content(all))
            }
        }
        d.deserialize_any(V)
    }
}

/// A prompt as text or tokens; a list of one prompt counts as that prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<i64>),
    Several(usize),
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Any {
            Text(String),
            Texts(Vec<String>),
            Tokens(Vec<i64>),
            Lists(Vec<Vec<i64>>),
        }
        let wrong = |_| de::Error::custom("expected a string, a list of tokens, or a list of one of these");
        Ok(match Any::deserialize(d).map_err(wrong)? {
            Any::Text(s) => Prompt::Text(s),
            Any::Texts(mut l) if l.len() == 1 => Prompt::Text(l.remove(0)),
            Any::Texts(l) => Prompt::Several(l.len()),
            Any::Tokens(l) => Prompt::Tokens(l),
            Any::Lists(mut l) if l.len() == 1 => Prompt::Tokens(l.remove(0)),
            Any::Lists(l) => Prompt::Several(l.len()),
        })
    }
}
