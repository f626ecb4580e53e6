//! `tokenizer.json` of a Hugging Face folder, and the files beside it that say what begins and ends a text.

use std::collections::BTreeSet;

use serde_json::Value as Json;
use tokenizers::Tokenizer as Inner;

use super::spm::SPACE;
use super::vocab::Kind;
use super::{Added, ENDS, Finder, Tokenizer, TokenizerError, Words, bytes, library, spm};
use crate::source::{Fields, Folder, SourceError};

const FILE: &str = "tokenizer.json";
const MAX_IDS: u64 = 1 << 24;

impl Tokenizer {
    /// Builds the tokenizer of a folder.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, it is broken, or of a kind that is not supported (the error says what is).
    pub fn from_folder(folder: &Folder) -> Result<Self, TokenizerError> {
        let path = folder.folder().join(FILE);
        let field = |field: &str, expected: &str, got: String| SourceError::Field {
            path: path.clone(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            got,
        };
        let unsupported = |field: &str, got: &str, supported: &str| SourceError::Unsupported {
            path: path.clone(),
            field: field.to_owned(),
            got: got.to_owned(),
            supported: supported.to_owned(),
        };
        let Some(mut json) = folder.json(FILE)? else {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, "the folder has no such file");
            return Err(SourceError::Open { path, source }.into());
        };
        match json["model"]["type"].as_str() {
            Some("BPE") => {}
            // Written before there were types.
            None if json["model"]["merges"].is_array() => {}
            other => return Err(unsupported("model.type", other.unwrap_or("none"), "BPE").into()),
        }

        let mut tokens: Vec<Option<(String, Kind)>> = Vec::new();
        let mut put = |id: u64, text: &str, kind: Kind| -> Result<(), SourceError> {
            if id >= MAX_IDS {
                return Err(field("vocabulary", "ids below 2^24", id.to_string()));
            }
            let at = id as usize;
            if at >= tokens.len() {
                tokens.resize(at + 1, None);
            }
            tokens[at] = Some((text.to_owned(), kind));
            Ok(())
        };
        let no_vocab = || field("model.vocab", "an object of tokens and ids", "none".into());
        for (token, id) in json["model"]["vocab"].as_object().ok_or_else(no_vocab)? {
            let id = id.as_u64().ok_or_else(|| field("model.vocab", "ids", id.to_string()))?;
            put(id, token, Kind::Normal)?;
        }
        let mut added = Vec::new();
        for token in json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice) {
            let flag = |name: &str| token[name].as_bool().unwrap_or(false);
            let (Some(id), Some(text)) = (token["id"].as_u64(), token["content"].as_str().filter(|t| !t.is_empty()))
            else {
                return Err(field("added_tokens", "entries with an id and a text", token.to_string()).into());
            };
            if flag("single_word") {
                return Err(unsupported("added_tokens.single_word", "true", "false").into());
            }
            let kind = if flag("special") { Kind::Control } else { Kind::UserDefined };
            put(id, text, kind)?;
            added.push(Added {
                id: id as u32,
                text: text.to_owned(),
                kind,
                left: flag("lstrip"),
                right: flag("rstrip"),
            });
        }

        let letters = spelling(&json["decoder"]).ok_or_else(|| {
            unsupported(
                "decoder",
                json["decoder"]["type"].as_str().unwrap_or("none"),
                "ByteLevel, ByteFallback, Metaspace",
            )
        })?;
        let text = |found: &Option<(String, Kind)>| match found {
            None => Vec::new(),
            Some((token, Kind::Normal)) if letters => {
                let mut out = Vec::with_capacity(token.len());
                bytes::from_letters(token, &mut out);
                out
            }
            Some((token, Kind::Normal)) => match spm::byte(token) {
                Some(byte) => vec![byte],
                None => token.replace(SPACE, " ").into_bytes(),
            },
            Some((token, _)) => token.clone().into_bytes(),
        };
        let bytes = tokens.iter().map(text).collect();
        let kinds = tokens.iter().map(|t| t.as_ref().map_or(Kind::Unused, |t| t.1)).collect();

        let sides = Sides::read(folder, &json["post_processor"], &added)?;
        // Added tokens are cut out here, and sequences are not wrapped.
        for part in ["added_tokens", "post_processor", "decoder", "truncation", "padding"] {
            json[part] = if part == "added_tokens" { Json::Array(Vec::new()) } else { Json::Null };
        }
        let later = later(&json).map(build).transpose()?;
        Ok(Self {
            words: Words::Bpe { first: build(json)?, later },
            user: Finder::new(&added, &[Kind::UserDefined])?,
            special: Finder::new(&added, &[Kind::UserDefined, Kind::Control])?,
            bytes,
            kinds,
            bos: sides.bos,
            add_bos: sides.add_bos,
            end_of_turn: sides.ends,
        })
    }
}

fn build(json: Json) -> Result<Box<Inner>, TokenizerError> {
    let built: Result<Inner, _> = serde_json::from_value(json);
    built.map(Box::new).map_err(|e| library("read tokenizer.json")(e.into()))
}

/// Whether tokens are spelled in letters for bytes (`true`) or in text with U+2581 for spaces; nothing if unknown.
fn spelling(decoder: &Json) -> Option<bool> {
    match decoder["type"].as_str()? {
        "ByteLevel" => Some(true),
        "ByteFallback" | "Metaspace" => Some(false),
        "Replace" if decoder["pattern"]["String"].as_str() == Some(SPACE) => Some(false),
        "Sequence" => decoder["decoders"].as_array()?.iter().find_map(spelling),
        _ => None,
    }
}

/// The same tokenizer for text that does not begin, where only text that begins gets a space before it.
fn later(json: &Json) -> Option<Json> {
    fn never(part: &mut Json) -> bool {
        if part["type"].as_str() == Some("Metaspace") && part["prepend_scheme"].as_str() == Some("first") {
            part["prepend_scheme"] = "never".into();
            return true;
        }
        part.get_mut("pretokenizers").and_then(Json::as_array_mut).is_some_and(|all| {
            // Every one of them is to be changed.
            all.iter_mut().fold(false, |changed, p| never(p) | changed)
        })
    }
    let mut other = json.clone();
    never(&mut other["pre_tokenizer"]).then_some(other)
}

/// What begins a text, and what ends one.
struct Sides {
    bos: Option<u32>,
    add_bos: bool,
    ends: Vec<u32>,
}

impl Sides {
    fn read(folder: &Folder, post_processor: &Json, added: &[Added]) -> Result<Self, SourceError> {
        let config = folder.json("tokenizer_config.json")?.unwrap_or(Json::Null);
        let id = |text: &str| added.iter().find(|a| a.text == text).map(|a| a.id);
        let stated = |name: &str| token(&config[name]).and_then(|text| id(&text));
        let number = |name: &str| folder.opt_uint(name).ok().flatten().and_then(|id| u32::try_from(id).ok());
        let template = prefix(post_processor);
        let bos = stated("bos_token").or_else(|| template.as_deref().and_then(id)).or_else(|| number("bos_token_id"));
        let add_bos = config["add_bos_token"].as_bool().unwrap_or(template.is_some()) && bos.is_some();
        let mut ends: BTreeSet<u32> = stated("eos_token").into_iter().chain(number("eos_token_id")).collect();
        if let Some(all) = folder.opt_ints("eos_token_id").ok().flatten() {
            ends.extend(all.iter().filter_map(|id| u32::try_from(*id).ok()));
        }
        if let Some(generation) = folder.json("generation_config.json")? {
            let eos = &generation["eos_token_id"];
            let all = eos.as_array().cloned().unwrap_or_else(|| vec![eos.clone()]);
            ends.extend(all.iter().filter_map(Json::as_u64).filter_map(|id| u32::try_from(id).ok()));
        }
        ends.extend(added.iter().filter(|a| a.kind == Kind::Control && ENDS.contains(&a.text.as_str())).map(|a| a.id));
        Ok(Self { bos, add_bos, ends: ends.into_iter().collect() })
    }
}

/// A token is written as its text, or as an object with it.
pub(crate) fn token(json: &Json) -> Option<String> {
    json.as_str().or_else(|| json["content"].as_str()).map(str::to_owned)
}

/// The token that a post-processor puts before a text.
fn prefix(post: &Json) -> Option<String> {
    match post["type"].as_str()? {
        "TemplateProcessing" => Some(post["single"].get(0)?["SpecialToken"]["id"].as_str()?.to_owned()),
        "Sequence" => post["processors"].as_array()?.iter().find_map(prefix),
        _ => None,
    }
}
