//! The mathematics, in plain loops. Every other backend must agree with this file: bit for bit in [`dequant`],
//! within the suite's tolerance in [`attend`].

use half::f16;
use kvquant_quant::pack::{UNIT_CHANNELS, get_code};

use super::rows::Row;
use super::view::{CodedView, TOKENS};
use super::{BlockView, Rows, SideView, State};
use crate::rope::BlockTable;

fn half(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// One side of a block as f32, `tile[channel * 64 + token]`.
pub(super) fn dequant(side: &SideView<'_>, len: usize, tile: &mut [f32]) {
    tile.fill(0.0);
    match side {
        SideView::Rows { data, stride, head_dim } => {
            for t in 0..len {
                for c in 0..*head_dim {
                    tile[c * TOKENS + t] = half(data[t * stride + c]);
                }
            }
        }
        SideView::Tile { data } => {
            for (i, x) in tile.iter_mut().enumerate().filter(|(i, _)| i % TOKENS < len) {
                *x = half(data[i]);
            }
        }
        SideView::Coded(coded) => dequant_coded(coded, len, tile),
    }
}

/// x = step[place] * signpost[place][code], then scale[token] * x + zero[token] where tokens have scales; plus the
/// outlier's residual. Each operation is rounded to f32.
fn dequant_coded(v: &CodedView<'_>, len: usize, tile: &mut [f32]) {
    for (u, (bits, unit)) in v.units().enumerate() {
        for i in 0..UNIT_CHANNELS {
            let place = u * UNIT_CHANNELS + i;
            let (table, step) = v.table(place);
            let c = v.channel(place);
            for t in 0..len {
                let x = step * table.value(bits, get_code(unit, bits, i, t)) as f32;
                tile[c * TOKENS + t] = match &v.scales {
                    None => x,
                    Some(s) => {
                        let at = c / v.group_channels() * TOKENS + t;
                        let zero = if s.zero.is_empty() { 0.0 } else { half(s.zero[at]) };
                        half(s.scale[at]) * x + zero
                    }
                };
            }
        }
    }
    for (channel, token, residual) in v.each_outlier() {
        if token < len {
            tile[channel * TOKENS + token] += half(residual);
        }
    }
}

/// Turns the keys of a tile by their place in the block.
fn rotate(tile: &mut [f32], table: &BlockTable) {
    for (pair, keys) in tile.chunks_exact_mut(2 * TOKENS).enumerate() {
        let (xs, ys) = keys.split_at_mut(TOKENS);
        for t in 0..TOKENS {
            let (c, s) = (table.cos[pair * TOKENS + t], table.sin[pair * TOKENS + t]);
            let (x, y) = (xs[t], ys[t]);
            xs[t] = x * c - y * s;
            ys[t] = x * s + y * c;
        }
    }
}

/// scores[r][t] = q[r] * key[t], -inf where a row does not see a token.
pub(super) fn scores(rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, scores: &mut [Row]) {
    let d = rows.head_dim;
    let mut keys = vec![0.0f32; d * TOKENS];
    dequant(&block.key, block.len, &mut keys);
    if block.origin.is_some() {
        rotate(&mut keys, table);
    }
    let mut local = vec![0.0f32; d];
    for (r, (q, scores)) in rows.q.chunks_exact(d).zip(scores).enumerate() {
        match block.origin {
            Some(origin) => origin.undo(q, &mut local),
            None => local.copy_from_slice(q),
        }
        scores.fill(f32::NEG_INFINITY);
        for (t, s) in scores[..rows.visible(r, block.len)].iter_mut().enumerate() {
            *s = local.iter().enumerate().map(|(c, x)| x * keys[c * TOKENS + t]).sum();
        }
    }
}

/// out[r] += the sum over tokens of weights[r][t] * value[t].
pub(super) fn outputs(weights: &[Row], block: &BlockView<'_>, out: &mut [f32]) {
    let d = block.head_dim();
    let mut values = vec![0.0f32; d * TOKENS];
    dequant(&block.value, block.len, &mut values);
    for (weights, out) in weights.iter().zip(out.chunks_exact_mut(d)) {
        for (o, values) in out.iter_mut().zip(values.chunks_exact(TOKENS)) {
            *o += weights.iter().zip(values).map(|(w, x)| w * x).sum::<f32>();
        }
    }
}

/// softmax(q K^T) V over the block, folded into the state.
pub(super) fn attend(rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
    let mut weights = vec![[0.0; TOKENS]; rows.len()];
    scores(rows, block, table, &mut weights);
    for (r, weights) in weights.iter_mut().enumerate() {
        let n = rows.visible(r, block.len);
        if n == 0 {
            weights.fill(0.0);
            continue;
        }
        let max = state.raise(r, weights[..n].iter().copied().fold(f32::NEG_INFINITY, f32::max));
        for w in weights.iter_mut() {
            *w = (*w - max).exp();
        }
        state.sum[r] += weights.iter().sum::<f32>();
    }
    outputs(&weights, block, &mut state.out);
}
