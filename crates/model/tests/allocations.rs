//! A decode step works in memory that is there: it allocates what the cache grows by, and nothing else.

mod common;

use std::alloc::System;

use kvquant_cache::Prefill;
use kvquant_model::sampling::{Sampler, SamplingParams};
use kvquant_model::{Activations, Logits, Model, Step, Workspace};
use kvquant_quant::{Quantizer, Spec};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Steps that are looked at, in parts of so many.
const STEPS: usize = 16;
const PART: usize = 4;

#[test]
fn a_decode_step_allocates_what_the_cache_grows_by() {
    // Each thread has room of its own: few threads have all made theirs after a few steps.
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().unwrap();
    let (mut model, _) = Model::load(&common::model_path("smollm2-135m"), &mut |_, _| {}).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../quantizers/smollm2-135m.safetensors");
    let quantizer = Quantizer::load(path.as_ref()).unwrap();
    let params = SamplingParams { temperature: 0.7, top_p: 0.95, top_k: 40, ..SamplingParams::default() };
    let mut sampler = Sampler::new(params).unwrap();
    let prompt: Vec<u32> = (0..200).map(|i| 1000 + 37 * i).collect();
    for activations in [Activations::Int15, Activations::Int8, Activations::F32] {
        model.activations = activations;
        for spec in ["fp16", "nuq4-1%", "nuq3-1%", "nuq3-1%+sink4+recent32", "int4-g32", "int3-g64+postrope"] {
            let spec: Spec = spec.parse().unwrap();
            let mut cache = model.new_cache(&spec, Some(&quantizer)).unwrap();
            let mut work = Workspace::new();
            let grown = {
                let mut step = |tokens: &[u32]| {
                    let mut steps = [Step { tokens, cache: &mut cache, logits: Logits::Last }];
                    let logits = model.forward_in(&mut work, &mut steps, Prefill::Exact).unwrap();
                    sampler.sample(logits).unwrap()
                };
                let mut next = step(&prompt);
                // To the second half of a block, so that none is opened below.
                for _ in 0..35 {
                    next = step(&[next]);
                }
                let mut part = || {
                    let region = Region::new(ALLOCATOR);
                    for _ in 0..PART {
                        next = step(&[next]);
                    }
                    region.change()
                };
                (0..STEPS / PART).map(|_| part()).collect::<Vec<_>>()
            };
            // A list of outliers that is full is grown in place (a reallocation). Who has which part of a history differs from step to
            // step, so that a thread may make room that it needs once.
            let all: usize = grown.iter().map(|part| part.allocations).sum();
            assert!(all < STEPS, "{spec} {activations:?}: {grown:?}");
            assert!(grown.iter().any(|part| part.allocations == 0), "{spec} {activations:?}: {grown:?}");
        }
    }
}
