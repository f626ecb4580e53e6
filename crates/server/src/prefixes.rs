//! Blocks by the tokens that they hold.
//!
//! A key stands for a whole beginning: the key of what lies before, and the tokens of the block. The first key stands for
//! the model's weights, the cache spec and the quantizer, so that blocks of another cache are never found. Blocks that
//! no sequence holds are let go when memory is needed: the least recently used first, and never one before another that
//! follows it.

use std::collections::HashMap;

use kvquant_cache::Segment;
use sha2::{Digest, Sha256};

/// Stands for a beginning.
pub type Key = [u8; 32];

/// The key of `tokens` after what `parent` stands for.
pub fn key(parent: &Key, tokens: &[u32]) -> Key {
    let mut hash = Sha256::new();
    hash.update(parent);
    tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
    hash.finalize().into()
}

/// The key of an empty text in a kind of cache.
pub fn root(parts: &[&[u8]]) -> Key {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

#[derive(Debug)]
struct Entry {
    segment: Segment,
    parent: Key,
    /// Entries that follow this one.
    children: usize,
    used: u64,
}

/// A store of segments.
#[derive(Debug, Default)]
pub struct Prefixes {
    entries: HashMap<Key, Entry>,
    bytes: usize,
    clock: u64,
    evicted: u64,
}

impl Prefixes {
    /// Bytes of all segments.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Segments.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Segments that were let go so far.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Whether a segment is kept.
    pub fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    /// The segment of a key, which counts as used now.
    pub fn get(&mut self, key: &Key) -> Option<Segment> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(entry.segment.clone())
    }

    /// Keeps a segment. One of the same key stays as it is.
    pub fn insert(&mut self, key: Key, parent: Key, segment: Segment) {
        self.clock += 1;
        if let Some(known) = self.entries.get_mut(&key) {
            known.used = self.clock;
            return;
        }
        if let Some(before) = self.entries.get_mut(&parent) {
            before.children += 1;
        }
        self.bytes += segment.bytes();
        self.entries.insert(key, Entry { segment, parent, children: 0, used: self.clock });
    }

    /// Segments that only the store holds, and their bytes.
    pub fn idle(&self) -> (usize, usize) {
        let idle = self.entries.values().filter(|e| e.segment.holders() <= 1);
        idle.fold((0, 0), |(n, bytes), e| (n + 1, bytes + e.segment.bytes()))
    }

    /// Lets go of segments until `bytes` are freed or none is left that only the store holds. Returns what was freed.
    pub fn evict(&mut self, bytes: usize) -> usize {
        let mut freed = 0;
        while freed < bytes {
            let idle = self.entries.iter().filter(|(_, e)| e.children == 0 && e.segment.holders() <= 1);
            let mut leaves: Vec<(u64, Key)> = idle.map(|(k, e)| (e.used, *k)).collect();
            if leaves.is_empty() {
                break;
            }
            // A leaf makes its parent one: after each round there are new ones, as old as what followed them.
            leaves.sort_unstable();
            let newest = leaves.len().div_ceil(8);
            for (_, key) in leaves.into_iter().take(newest) {
                let Some(entry) = self.entries.remove(&key) else { continue };
                if let Some(parent) = self.entries.get_mut(&entry.parent) {
                    parent.children -= 1;
                }
                freed += entry.segment.bytes();
                self.bytes -= entry.segment.bytes();
                self.evicted += 1;
                if freed >= bytes {
                    break;
                }
            }
        }
        freed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvquant_cache::{Cache, CacheShape, LayerAttention, Prefill};

    use super::*;

    /// The segments of `blocks` blocks of an fp16 cache.
    fn segments(blocks: usize) -> Vec<Segment> {
        let shape = CacheShape { layers: 1, heads: 1, kv_heads: 1, head_dim: 8 };
        let spec = kvquant_quant::Spec::Fp16;
        let rope = Arc::new(kvquant_kernels::rope::Rope { inv_freq: vec![1.0; 4] });
        let mut c = Cache::with_attention(shape, &spec, None, &[LayerAttention { rope, window: None }]).unwrap();
        let n = 64 * blocks;
        let x = vec![0.5; n * 8];
        c.extend(0, &x, &x, &x, Prefill::Exact, &mut vec![0.0; n * 8]).unwrap();
        c.commit(n).unwrap();
        (0..=blocks).map(|i| c.segment(i).unwrap()).collect()
    }

    #[test]
    fn the_least_recently_used_go_first_and_from_the_end() {
        let s = segments(3);
        let mut p = Prefixes::default();
        let root = root(&[b"x"]);
        let keys: Vec<Key> = (0..8u32).map(|i| key(&root, &[i])).collect();
        // Two chains: 0 - 1 - 2, and 3.
        p.insert(keys[0], root, s[1].clone());
        p.insert(keys[1], keys[0], s[2].clone());
        p.insert(keys[2], keys[1], s[3].clone());
        let other = segments(1);
        p.insert(keys[3], root, other[1].clone());
        let each = s[1].bytes();
        assert_eq!((p.bytes(), p.len()), (4 * each, 4));
        assert_eq!(p.evict(1), 0, "all are held");
        drop((s, other));
        assert!(p.get(&keys[2]).is_some() && p.get(&keys[1]).is_some() && p.get(&keys[0]).is_some());
        assert_eq!(p.evict(1), each);
        assert!(!p.contains(&keys[3]), "used longest ago");
        assert_eq!(p.evict(each + 1), 2 * each);
        assert!(p.contains(&keys[0]) && p.len() == 1, "the beginning goes last");
        assert_eq!((p.evict(usize::MAX), p.bytes(), p.evicted()), (each, 0, 4));
    }

    #[test]
    fn keys_stand_for_all_that_came_before() {
        let (a, b) = (root(&[b"m", b"fp16"]), root(&[b"mf", b"p16"]));
        assert_ne!(a, b);
        assert_ne!(key(&a, &[1, 2]), key(&b, &[1, 2]));
        assert_ne!(key(&key(&a, &[1]), &[2]), key(&key(&a, &[2]), &[1]));
    }
}
