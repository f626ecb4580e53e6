//! What a model needs to run, from its metadata, with every contradiction between metadata and tensors refused.
//!
//! A key or tensor that would change the result and is not implemented is an error that names it: a model that runs
//! and is subtly wrong is worse than one that is refused.

mod keys;
mod rope;
mod tensors;

use crate::family::{Bias, FAMILIES, Family, Window};
use crate::gguf::Value;
use crate::source::{Source, SourceError};
use keys::Keys;
pub use rope::Rotary;
pub(crate) use tensors::Tensors;

/// Shapes and constants of a decoder: pre-norm attention with rotary positions and grouped KV heads, gated MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where the model departs from that.
    pub family: &'static Family,
    /// For people.
    pub name: String,
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head, of keys and of values; a multiple of 4.
    pub head_dim: usize,
    /// Rows of the embedding, which is the number of ids.
    pub vocab: usize,
    /// Positions that can be used. Where the rotation depends on the length of a text, those that it is made for.
    pub context: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// The rotations that layers use: one, or one for layers that see everything and one for those with a window.
    pub rotary: Vec<Rotary>,
    /// What each layer sees.
    pub attention: Vec<Attention>,
    /// Rows of q and k come in the (i, i + `rope_dims` / 2) pairing and are permuted at load.
    pub half_split: bool,
    /// Channels of a head that turn.
    pub rope_dims: usize,
    /// The q, k and v projections have biases.
    pub qkv_bias: bool,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
    /// Logits x become cap * tanh(x / cap).
    pub logit_cap: Option<f32>,
}

/// What a layer sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Index into [`Config::rotary`].
    pub rotary: usize,
    /// Tokens that a query sees, itself included; `None` for all.
    pub window: Option<usize>,
}

const MAX_HEAD_DIM: usize = 512;

impl Config {
    /// Reads and checks the metadata against the tensors. `context`: the positions that are wanted, for models whose
    /// rotation depends on them (longrope, dynamic NTK); without, such a model is used up to the length that it was
    /// trained with first.
    ///
    /// # Errors
    /// For an architecture or a feature that is not implemented (naming what is), a missing or contradictory key, and a
    /// tensor that is missing, superfluous or of another shape.
    pub fn read(source: &Source, context: Option<usize>) -> Result<Self, SourceError> {
        let family = family(source)?;
        let r = Keys { source, family };
        r.refuse_features()?;

        let layers = r.size("block_count")?;
        let hidden = r.size("embedding_length")?;
        let intermediate = r.size("feed_forward_length")?;
        let stated_context = r.size("context_length")?;
        let heads = r.size("attention.head_count")?;
        let kv_heads = r.size_or("attention.head_count_kv", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of the {heads} query heads");
            return Err(r.field("attention.head_count_kv", expected, kv_heads));
        }
        let head_dim = r.head_dim(hidden, heads)?;
        let norm_eps = r.positive("attention.layer_norm_rms_epsilon")?;
        let vocab = r.vocab(hidden)?;
        let tensors = Tensors { source, family };
        let bias = family.bias == Bias::Required || tensors.shape("blk.0.attn_q.bias").is_some();

        let mut config = Self {
            name: r.name(),
            family,
            layers,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: stated_context,
            norm_eps: norm_eps as f32,
            rotary: Vec::new(),
            attention: Vec::new(),
            half_split: family.half_split || matches!(source, Source::Folder(_)),
            rope_dims: head_dim,
            qkv_bias: bias,
            embedding_scale: if family.scaled_embedding { (hidden as f32).sqrt() } else { 1.0 },
            logit_cap: r.opt_positive("final_logit_softcapping")?.map(|c| c as f32),
        };
        // Before anything is sized by a number of the file: the tensors, which lie in the file, bound them all.
        tensors.check(&config)?;
        let windows = r.windows(&config)?;
        rope::read(&r, &mut config, &windows, context)?;
        Ok(config)
    }
}

fn family(source: &Source) -> Result<&'static Family, SourceError> {
    let fields = source.fields();
    let (key, found, names): (_, _, Vec<&str>) = match source {
        Source::Gguf(_) => {
            let key = "general.architecture";
            let mut names: Vec<&str> = FAMILIES.iter().map(|f| f.gguf).collect();
            names.dedup();
            (key, Family::of_gguf(fields.str(key)?), names)
        }
        Source::Folder(_) => {
            let key = "model_type";
            (key, Family::of_hf(fields.str(key)?), FAMILIES.iter().map(|f| f.hf).collect())
        }
    };
    found.ok_or_else(|| fields.unsupported(key, fields.str(key).unwrap_or_default(), &names.join(", ")))
}

impl Keys<'_> {
    fn name(&self) -> String {
        let stated = match self.source {
            Source::Gguf(g) => self
                .fields()
                .opt_str("general.name")
                .ok()
                .flatten()
                .map(str::to_owned)
                .or_else(|| g.path.file_stem().map(|n| n.to_string_lossy().into_owned())),
            Source::Folder(f) => f.folder().file_name().map(|n| n.to_string_lossy().into_owned()),
        };
        stated.unwrap_or_else(|| self.family.gguf.to_owned())
    }

    /// The length of every layer's window.
    fn windows(&self, c: &Config) -> Result<Vec<Option<usize>>, SourceError> {
        const WINDOW: &str = "attention.sliding_window";
        let all = Ok(vec![None; c.layers]);
        let stated = self.fields().opt_uint(&self.key(WINDOW))?.filter(|w| *w != 0);
        // A window of the whole context is none.
        let window = stated.map(|w| self.sized(WINDOW, w)).transpose()?.filter(|w| *w < c.context);
        if let Some(kinds) = self.layer_kinds(c.layers)? {
            if stated.is_none() && kinds.contains(&true) {
                return Err(self.field(WINDOW, "a length, as layer_types has layers with a window", "nothing"));
            }
            return Ok(kinds.into_iter().map(|near| window.filter(|_| near)).collect());
        }
        let Some(window) = window else { return all };
        match self.family.window {
            Window::All => Ok(vec![Some(window); c.layers]),
            Window::Period(n) => {
                let period = self.size_or("attention.sliding_window_pattern", n)?;
                Ok((1..=c.layers).map(|i| Some(window).filter(|_| !i.is_multiple_of(period))).collect())
            }
            Window::From => {
                if matches!(self.source, Source::Gguf(_)) {
                    let supported = format!("full attention (0, or at least the context {})", c.context);
                    return Err(self.unsupported(WINDOW, window, supported));
                }
                if self.fields().opt_bool("use_sliding_window")? != Some(true) {
                    return all;
                }
                let from = self.fields().opt_uint("max_window_layers")?.unwrap_or(0);
                Ok((0..c.layers).map(|i| Some(window).filter(|_| i as u64 >= from)).collect())
            }
        }
    }

    /// Which layers have a window, where a folder lists them.
    fn layer_kinds(&self, layers: usize) -> Result<Option<Vec<bool>>, SourceError> {
        const KINDS: &str = "layer_types";
        let (Source::Folder(_), Some(found)) = (self.source, self.fields().get(KINDS)) else { return Ok(None) };
        let Value::Strings(kinds) = found else {
            return Err(self.field(KINDS, "an array of strings", found.kind()));
        };
        if kinds.len() != layers {
            return Err(self.field(KINDS, format!("{layers} entries, one for each layer"), kinds.len()));
        }
        let near = kinds.iter().map(|kind| match kind.as_str() {
            "full_attention" => Ok(false),
            "sliding_attention" => Ok(true),
            other => Err(self.unsupported(KINDS, other, "full_attention, sliding_attention")),
        });
        near.collect::<Result<_, _>>().map(Some)
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, SourceError> {
        const KEY: &str = "attention.key_length";
        const VALUE: &str = "attention.value_length";
        let length = |name: &str| match self.fields().opt_uint(&self.key(name))? {
            Some(v) => self.sized(name, v),
            None if hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => {
                let expected = format!("the key, as hidden size {hidden} is not a multiple of {heads} heads");
                Err(self.field(name, expected, "nothing"))
            }
        };
        let k = length(KEY)?;
        let v = if matches!(self.source, Source::Gguf(_)) { length(VALUE)? } else { k };
        if k != v {
            let supported = format!("heads with keys and values of the same length, here {KEY} = {k}");
            return Err(self.unsupported(VALUE, v, supported));
        }
        // The cache packs units of 4 channels.
        if !k.is_multiple_of(4) || k > MAX_HEAD_DIM {
            return Err(self.unsupported(KEY, k, format!("multiples of 4 up to {MAX_HEAD_DIM}")));
        }
        Ok(k)
    }

    /// Rows of the embedding, which the tokens and the metadata must agree with.
    fn vocab(&self, hidden: usize) -> Result<usize, SourceError> {
        let tensors = Tensors { source: self.source, family: self.family };
        let embed = tensors.name("token_embd.weight");
        let shape = tensors.shape("token_embd.weight").ok_or_else(|| tensors.missing("token_embd.weight"))?;
        let tokens = match self.fields().get("tokenizer.ggml.tokens") {
            Some(Value::Strings(tokens)) => Some(tokens.len() as u64),
            _ => None,
        };
        let [rows, _] = shape[..] else {
            let stated = tokens.or(self.fields().opt_uint(&self.key("vocab_size"))?).unwrap_or(0);
            return Err(tensors.shape_error("token_embd.weight", &[stated, hidden as u64], &shape));
        };
        let vocab = self.sized("embedding rows", rows)?;
        let agree = |field: &str, got: u64| {
            let expected = || format!("{rows}, the rows of {embed}");
            if got == rows { Ok(()) } else { Err(self.fields().field(field, &expected(), &got.to_string())) }
        };
        if let Some(tokens) = tokens {
            agree("number of tokenizer.ggml.tokens", tokens)?;
        }
        if let Some(stated) = self.fields().opt_uint(&self.key("vocab_size"))? {
            agree(&self.key("vocab_size"), stated)?;
        }
        Ok(vocab)
    }
}
