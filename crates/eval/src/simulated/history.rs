//! KIVI: codes of tokens that were exact before. What leaves the exact part is written anew, codes in place of it, before
//! the next tokens run.

use kvquant_cache::{Cache, Prefill};
use kvquant_kernels::rope::Rope;
use kvquant_model::{ForwardError, Logits, Model, Step};
use rayon::prelude::*;

use super::formats::asymmetric;
use super::{GROUP, kivi_keys, kivi_values};

/// One sequence's tokens that may still change.
#[derive(Debug)]
pub(crate) struct Kivi {
    bits: u32,
    /// The first token that is in `layers`.
    first: usize,
    /// Tokens whose keys are codes, and values.
    coded: [usize; 2],
    /// Keys (before RoPE) and values of each layer, from `first` on.
    layers: Vec<[Vec<f32>; 2]>,
}

impl Kivi {
    pub fn new(bits: u32, layers: usize) -> Self {
        Kivi { bits, first: 0, coded: [0, 0], layers: vec![[vec![], vec![]]; layers] }
    }

    /// Runs tokens in pieces that end at multiples of 32; logits as asked for, `[rows, vocab]`.
    pub fn run(
        &mut self,
        model: &Model,
        cache: &mut Cache,
        tokens: &[u32],
        logits: Logits,
    ) -> Result<Vec<f32>, ForwardError> {
        let (mut all, mut rest) = (Vec::new(), tokens);
        while !rest.is_empty() {
            self.move_on(model, cache)?;
            let (piece, later) = rest.split_at(rest.len().min(GROUP - cache.len() % GROUP));
            rest = later;
            let wanted = if logits == Logits::Last && !rest.is_empty() { Logits::None } else { logits };
            let mut step = [Step { tokens: piece, cache: &mut *cache, logits: wanted }];
            let layers = &mut self.layers;
            all.extend(model.forward_watched(&mut step, Prefill::Quantized, &mut |layer, k, v| {
                layers[layer][0].extend_from_slice(k);
                layers[layer][1].extend_from_slice(v);
            })?);
        }
        Ok(all)
    }

    /// Writes what the next query sees.
    fn move_on(&mut self, model: &Model, cache: &mut Cache) -> Result<(), ForwardError> {
        let len = cache.len();
        let next = [kivi_keys(len).max(self.coded[0]), kivi_values(len).max(self.coded[1])];
        if next == self.coded {
            return Ok(());
        }
        let (shape, bits, first) = (model.cache_shape(), self.bits, self.first);
        let (c, d) = (shape.channels(), shape.head_dim);
        let changed = |side: usize| (self.coded[side] - first) * c..(next[side] - first) * c;
        let (keys, values) = (changed(0), changed(1));
        let start = self.coded[0];
        self.layers.par_iter_mut().zip(&model.attention).for_each(|([k, v], attention)| {
            per_channel(&mut k[keys.clone()], start, &attention.rope, c, bits);
            v[values.clone()].chunks_exact_mut(d).flat_map(|head| head.chunks_mut(GROUP)).for_each(|group| {
                asymmetric(group, bits);
            });
        });
        let from = self.coded[0].min(self.coded[1]);
        cache.truncate(from)?;
        for (layer, [k, v]) in self.layers.iter().enumerate() {
            let rows = (from - first) * c..(len - first) * c;
            cache.append(layer, &k[rows.clone()], &v[rows])?;
        }
        cache.commit(len - from)?;
        self.coded = next;
        self.first = next[0].min(next[1]);
        let done = (self.first - first) * c;
        for side in self.layers.iter_mut().flatten() {
            side.drain(..done);
        }
        Ok(())
    }
}

/// Keys `[tokens, channels]` in whole groups of tokens from position `start` on: each channel of a group by itself, after
/// RoPE.
fn per_channel(keys: &mut [f32], start: usize, rope: &Rope, channels: usize, bits: u32) {
    let d = rope.head_dim();
    for (g, group) in keys.chunks_exact_mut(GROUP * channels).enumerate() {
        let turns: Vec<_> = (0..GROUP).map(|t| rope.rotation(start + g * GROUP + t)).collect();
        for (row, turn) in group.chunks_exact_mut(channels).zip(&turns) {
            row.chunks_exact_mut(d).for_each(|head| turn.apply(head));
        }
        let mut column = [0.0; GROUP];
        for channel in 0..channels {
            for (x, row) in column.iter_mut().zip(group.chunks_exact(channels)) {
                *x = row[channel];
            }
            asymmetric(&mut column, bits);
            for (x, row) in column.iter().zip(group.chunks_exact_mut(channels)) {
                row[channel] = *x;
            }
        }
        let mut back = vec![0.0; d];
        for (row, turn) in group.chunks_exact_mut(channels).zip(&turns) {
            for head in row.chunks_exact_mut(d) {
                turn.undo(head, &mut back);
                head.copy_from_slice(&back);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kvquant_quant::Spec;

    use super::*;

    /// A tiny model through fp16 and through codes of some width, in calls of the given sizes.
    fn logits(bits: Option<u32>, calls: &[usize]) -> Vec<f32> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/parity/llama/model");
        let (mut model, _) = Model::load(&folder, &mut |_, _| {}).unwrap();
        model.allow_context(400);
        let mut cache = model.new_cache(&Spec::Fp16, None).unwrap();
        let mut kivi = bits.map(|bits| Kivi::new(bits, model.config.layers));
        let (mut all, mut at) = (Vec::new(), 0);
        for &n in calls {
            let tokens: Vec<u32> = (at..at + n).map(|i| (i * i + i / 3) as u32 % 48).collect();
            let mut step = [Step { tokens: &tokens, cache: &mut cache, logits: Logits::All }];
            all.extend(match &mut kivi {
                None => model.forward(&mut step, Prefill::Quantized).unwrap(),
                Some(kivi) => kivi.run(&model, &mut cache, &tokens, Logits::All).unwrap(),
            });
            at += n;
        }
        all
    }

    #[test]
    fn tokens_are_exact_until_the_window_has_passed_them() {
        let exact = logits(None, &[360]);
        let worst = |a: &[f32], from: usize, to: usize| {
            let rows = from * 48..to * 48;
            a[rows.clone()].iter().zip(&exact[rows]).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()))
        };
        let (fine, coarse) = (logits(Some(10), &[360]), logits(Some(2), &[100, 1, 1, 58, 200]));
        assert!(worst(&coarse, 0, 128) < 1e-3, "nothing is in codes yet: {}", worst(&coarse, 0, 128));
        assert!(worst(&coarse, 160, 360) > 1.0, "{}", worst(&coarse, 160, 360));
        assert!(worst(&fine, 0, 360) < 0.05, "what is written anew is in its place: {}", worst(&fine, 0, 360));
    }

    #[test]
    fn keys_are_rounded_by_channel_after_rope() {
        let rope = Rope { inv_freq: vec![1.0, 0.1] };
        let (channels, start) = (8, 64);
        let keys: Vec<f32> = (0..GROUP * channels).map(|i| ((i * 31 % 97) as f32 - 48.0) / 10.0).collect();
        let mut got = keys.clone();
        per_channel(&mut got, start, &rope, channels, 2);
        let turned = |keys: &[f32]| -> Vec<f32> {
            let mut keys = keys.to_vec();
            for (t, row) in keys.chunks_exact_mut(channels).enumerate() {
                row.chunks_exact_mut(4).for_each(|head| rope.rotation(start + t).apply(head));
            }
            keys
        };
        let (keys, got) = (turned(&keys), turned(&got));
        for channel in 0..channels {
            let column = |x: &[f32]| -> Vec<f32> { x.iter().skip(channel).step_by(channels).copied().collect() };
            let (want, got) = (column(&keys), column(&got));
            let low = want.iter().copied().fold(f32::INFINITY, f32::min);
            let high = want.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut levels: Vec<i32> = got.iter().map(|x| ((x - low) / (high - low) * 3.0).round() as i32).collect();
            let off = |(w, g): (&f32, &f32)| (w - g).abs();
            assert!(want.iter().zip(&got).map(off).fold(0.0, f32::max) < 0.51 * (high - low) / 3.0);
            let near =
                |x: &f32| ((x - low) / (high - low) * 3.0 - ((x - low) / (high - low) * 3.0).round()).abs() < 0.01;
            assert!(got.iter().all(near), "four levels: {got:?}");
            levels.sort_unstable();
            levels.dedup();
            assert_eq!(levels, [0, 1, 2, 3]);
        }
    }
}
