//! Sinks and blocks to bytes, and back with all that a cache relies on checked.

use kvquant_quant::pack::BLOCK_TOKENS;

use crate::block::{Block, Rows, Tile};
use crate::coded::{OpenBlock, Parts};
use crate::sequence::Cache;

const ABSENT: u8 = 0;
const ROWS: u8 = 1;
const TILE: u8 = 2;
const CODED: u8 = 3;

fn put(out: &mut Vec<u8>, n: usize) {
    // Blocks and counts are far below 4 G.
    out.extend_from_slice(&(n as u32).to_le_bytes());
}

fn put_halves(out: &mut Vec<u8>, halves: &[u16]) {
    halves.iter().for_each(|h| out.extend_from_slice(&h.to_le_bytes()));
}

pub(super) fn write_sinks(cache: &Cache) -> Vec<u8> {
    let mut out = Vec::new();
    for layer in &cache.layers {
        put(&mut out, layer.dropped());
        let (k, v) = layer.sink().halves();
        put(&mut out, 2 * (k.len() + v.len()));
        put_halves(&mut out, k);
        put_halves(&mut out, v);
    }
    out
}

/// Block `i` of every layer.
pub(super) fn write_column(cache: &Cache, i: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for layer in &cache.layers {
        let block = i.checked_sub(layer.dropped()).and_then(|i| layer.blocks().get(i));
        let mut data = Vec::new();
        let layout = layer.context(0).codec.map(|(layout, _)| layout);
        let mut put_codes = |parts: Parts<'_>| {
            let (fixed, outliers) = parts.stored(layout.expect("a coded block has a codec"));
            fixed.iter().for_each(|w| data.extend_from_slice(&w.to_le_bytes()));
            data.extend_from_slice(outliers);
            CODED
        };
        let kind = match block {
            None => ABSENT,
            Some(Block::Rows(r)) => {
                let (k, v) = r.halves();
                put_halves(&mut data, k);
                put_halves(&mut data, v);
                ROWS
            }
            Some(Block::Tile(t)) => {
                let (k, v) = t.halves();
                put_halves(&mut data, k);
                put_halves(&mut data, v);
                TILE
            }
            Some(Block::Open(open)) => put_codes(open.parts()),
            Some(Block::Coded(c)) => put_codes(c.parts(layout.expect("a coded block has a codec"))),
        };
        out.push(kind);
        put(&mut out, data.len());
        out.extend_from_slice(&data);
    }
    out
}

/// Reads from the front; never more than there is.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("it ends too early")?;
        self.0 = rest;
        Ok(head)
    }

    fn number(&mut self) -> Result<usize, String> {
        Ok(self.take(4)?.iter().rev().fold(0, |n, b| n << 8 | *b as usize))
    }

    fn end(&self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err("it is too long".into()) }
    }
}

/// Finite halves, keys then values.
fn halves(bytes: &[u8]) -> Result<(Vec<u16>, Vec<u16>), String> {
    let (all, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() || !all.len().is_multiple_of(2) {
        return Err("it has half a number".into());
    }
    let all: Vec<u16> = all.iter().map(|b| u16::from_le_bytes(*b)).collect();
    if all.iter().any(|&h| !is_finite(h)) {
        return Err("it holds a number that is not finite".into());
    }
    let (k, v) = all.split_at(all.len() / 2);
    Ok((k.to_vec(), v.to_vec()))
}

fn is_finite(half: u16) -> bool {
    half & 0x7c00 != 0x7c00
}

/// Blocks that each layer has let go, and its sinks, for a history of `tokens` tokens.
pub(super) fn read_sinks(empty: &Cache, bytes: &[u8], tokens: usize) -> Result<(Vec<usize>, Vec<Rows>), String> {
    let (c, mut reader) = (empty.shape.channels(), Reader(bytes));
    let (mut dropped, mut sinks) = (Vec::new(), Vec::new());
    for layer in &empty.layers {
        let n = reader.number()?;
        let length = reader.number()?;
        let (k, v) = halves(reader.take(length)?)?;
        let expected = empty.sinks.min(tokens);
        let rows = Rows::from_halves(k, v);
        let held = rows.len(c);
        if held * c != rows.halves().0.len() {
            return Err("it is of another shape".into());
        }
        let windowed = layer.window().is_some();
        let past = tokens.saturating_sub(empty.sinks).div_ceil(BLOCK_TOKENS);
        if n > past || (!windowed && n > 0) || (held != expected && !(windowed && held == 0)) || (n > 0 && held > 0) {
            return Err("it does not fit the layers' windows".into());
        }
        dropped.push(n);
        sinks.push(if held == 0 { Rows::default() } else { rows });
    }
    reader.end()?;
    Ok((dropped, sinks))
}

/// Block `i` of every layer, which holds `len` tokens.
pub(super) fn read_column(
    empty: &Cache,
    bytes: &[u8],
    i: usize,
    len: usize,
    dropped: &[usize],
) -> Result<Vec<Option<Block>>, String> {
    let (c, mut reader, mut all) = (empty.shape.channels(), Reader(bytes), Vec::new());
    for (layer, &dropped) in empty.layers.iter().zip(dropped) {
        let kind = reader.take(1)?[0];
        let length = reader.number()?;
        let data = reader.take(length)?;
        let (full, recent, cx) = (len == BLOCK_TOKENS, empty.spec.recent() > 0, layer.context(0));
        if (kind == ABSENT) != (i < dropped) {
            return Err("a layer's block is missing, or there is one too many".into());
        }
        let block = match (kind, cx.codec) {
            (ABSENT, _) if data.is_empty() => None,
            (ROWS, None) if !full => Some(rows(data, c, len)?),
            (ROWS, Some(_)) if recent => Some(rows(data, c, len)?),
            (TILE, None) if full => {
                let (k, v) = halves(data)?;
                if k.len() != c * BLOCK_TOKENS {
                    return Err("it is of another shape".into());
                }
                Some(Block::Tile(Tile::from_halves(&k, &v)))
            }
            (CODED, Some((layout, _))) if full || !recent => {
                let block = OpenBlock::from_parts(layout, data, len)?;
                Some(if full { Block::Coded(block.finish()) } else { Block::Open(block.into()) })
            }
            _ => return Err("it is of another kind than the cache spec asks for".into()),
        };
        all.push(block);
    }
    reader.end()?;
    Ok(all)
}

fn rows(data: &[u8], channels: usize, len: usize) -> Result<Block, String> {
    let (k, v) = halves(data)?;
    if k.len() != channels * len {
        return Err("it is of another shape".into());
    }
    Ok(Block::Rows(Rows::from_halves(k, v).into()))
}
