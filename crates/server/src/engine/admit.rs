//! Who may begin, by memory.

use std::time::Instant;

use kvquant_cache::Segment;
use kvquant_quant::pack::BLOCK_TOKENS;

use super::{Event, Job, Sequence, Worker};
use crate::prefixes::{Key, key};

/// The beginning of a prompt that is already there.
struct Found {
    segments: Vec<Segment>,
    parent: Key,
}

impl Worker {
    /// Admits those that wait, in order, while their memory fits.
    pub(super) fn admit(&mut self) {
        while self.running.len() < self.limits.max_sequences {
            let Some((job, _)) = self.waiting.front() else { break };
            let (prompt, total) = (job.prompt.clone(), (job.prompt.len() + job.max_tokens).min(self.limits.context));
            let mut found = self.find(&prompt);
            let mut need = self.need(total, &found);
            if !self.make_room(need) {
                if !self.running.is_empty() {
                    break;
                }
                // Alone, and what it shares is in its own way.
                found = Found { segments: Vec::new(), parent: self.root };
                need = self.need(total, &found);
                if !self.make_room(need) {
                    tracing::error!(need, budget = self.limits.kv_memory, "a request that fits the budget has no room");
                }
            }
            let Some((job, since)) = self.waiting.pop_front() else { break };
            self.begin(job, since, found, need);
        }
        self.shared.waiting.store(self.waiting.len(), std::sync::atomic::Ordering::Relaxed);
    }

    fn begin(&mut self, job: Job, since: Instant, found: Found, need: usize) {
        let events = job.events.clone();
        let id = self.next_id;
        self.next_id += 1;
        let (queued, request) = (since.elapsed(), job.request.clone());
        let (n, parent, context) = (found.segments.len(), found.parent, self.limits.context);
        let cache = self.served.empty.resume(&found.segments).map_err(|e| super::Failure::Model(e.to_string()));
        match cache.and_then(|cache| Sequence::new(id, job, since, cache, n, parent, context)) {
            Ok(mut sequence) => {
                sequence.reserved = need;
                let (prompt, cached) = sequence.prompt();
                self.shared.metrics.admitted(queued.as_secs_f64(), prompt, cached);
                tracing::info!(request, prompt, cached, queued_ms = queued.as_millis() as u64, "admitted");
                self.running.push(sequence);
            }
            Err(failure) => {
                let _ = events.send(Event::Failed(failure));
            }
        }
    }

    /// Bytes for all that a sequence of `total` tokens does not share.
    fn need(&self, total: usize, found: &Found) -> usize {
        let shared = self.served.empty.segment_tokens(found.segments.len());
        self.served.empty.bytes_for(total - shared.min(total))
    }

    /// A block of a session on disk, if memory has room for it.
    fn restore(&mut self, key: Key, parent: Key) -> Option<Segment> {
        let sessions = self.sessions.clone()?;
        let (name, file, i) = sessions.find(&key)?;
        match file.segment(&self.served.empty, i) {
            Ok(segment) => {
                let segment = segment?;
                self.make_room(segment.bytes()).then(|| self.prefixes.insert(key, parent, segment.clone()))?;
                Some(segment)
            }
            Err(e) => {
                tracing::error!(session = name, error = %e, "no longer used; its text is read anew");
                sessions.forget(&name);
                None
            }
        }
    }

    fn make_room(&mut self, need: usize) -> bool {
        let reserved: usize = self.running.iter().map(|s| s.reserved).sum();
        let missing = (self.prefixes.bytes() + reserved + need).saturating_sub(self.limits.kv_memory);
        missing == 0 || self.prefixes.evict(missing) >= missing
    }

    /// The longest beginning of the prompt that is kept, up to a position at which chunks end. At least one token is
    /// left, so that there are logits.
    fn find(&mut self, prompt: &[u32]) -> Found {
        let empty = self.served.empty.fresh();
        let (mut segments, mut keys) = (Vec::new(), vec![self.root]);
        loop {
            let (from, to) = (empty.segment_tokens(segments.len()), empty.segment_tokens(segments.len() + 1));
            if to >= prompt.len() {
                break;
            }
            let next = key(&keys[segments.len()], &prompt[from..to]);
            let Some(segment) = self.prefixes.get(&next).or_else(|| self.restore(next, keys[segments.len()])) else {
                break;
            };
            segments.push(segment);
            keys.push(next);
        }
        // The sinks, then whole chunks.
        let chunk = self.limits.prefill_chunk / BLOCK_TOKENS;
        let kept = match segments.len() {
            0 => 0,
            n => match (n - 1) / chunk * chunk {
                0 => 0,
                blocks => blocks + 1,
            },
        };
        segments.truncate(kept);
        Found { segments, parent: keys[kept] }
    }
}
