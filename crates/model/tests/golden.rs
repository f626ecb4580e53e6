//! Logits of a real model against an independent implementation (fixtures/make_golden.py), and a sign of sense.

mod common;

use kvquant_cache::Prefill;
use kvquant_kernels::attend::Kernels;
use kvquant_model::generate::{GenerateOptions, StopReason, generate};
use kvquant_model::sampling::{Sampler, SamplingParams};
use kvquant_model::{Activations, ForwardError, Logits, Model, Step, Tokenizer};
use kvquant_quant::Spec;

/// Logits lie within about +-25. Ours differ by the fp16 rounding of keys and values and by the order of sums.
const ATOL: f32 = 0.03;

#[derive(serde::Deserialize)]
struct Golden {
    ids: Vec<u32>,
    rows: Vec<Row>,
}

#[derive(serde::Deserialize)]
struct Row {
    position: usize,
    top: Vec<(usize, f32)>,
    fixed: Vec<(usize, f32)>,
}

fn load() -> (Model, Tokenizer) {
    let (model, source) = Model::load(&common::model_path("smollm2-135m"), &mut |_, _| {}).unwrap();
    let tokenizer = Tokenizer::from_source(&source).unwrap();
    (model, tokenizer)
}

#[test]
fn logits_agree_with_an_independent_implementation() {
    let (model, _) = load();
    let golden: Golden = serde_json::from_str(include_str!("fixtures/golden-smollm2-135m.json")).unwrap();
    let vocab = model.config.vocab;
    // In one pass, in two, and in two sequences side by side.
    for split in [golden.ids.len(), 9] {
        let mut cache = model.new_cache(&Spec::Fp16, None).unwrap();
        let mut other = model.new_cache(&Spec::Fp16, None).unwrap();
        let mut logits = vec![];
        for tokens in golden.ids.chunks(split) {
            let mut steps = [
                Step { tokens, cache: &mut cache, logits: Logits::All },
                Step { tokens: &golden.ids[..3], cache: &mut other, logits: Logits::None },
            ];
            logits.extend(model.forward(&mut steps, Prefill::Quantized).unwrap());
        }
        assert_eq!(logits.len(), golden.ids.len() * vocab);
        for row in &golden.rows {
            let got = &logits[row.position * vocab..][..vocab];
            for &(id, want) in row.top.iter().chain(&row.fixed) {
                let off = (got[id] - want).abs();
                assert!(off <= ATOL, "position {} token {id}: {} and {want}", row.position, got[id]);
            }
            let best = got.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            assert_eq!(best, row.top[0].0, "position {}", row.position);
        }
    }
}

#[test]
fn a_capital_is_known_and_limits_are_kept() {
    let (model, tokenizer) = load();
    let ids = tokenizer.encode("The capital of France is", false).unwrap();
    let run = |prompt: &[u32], options: &GenerateOptions| {
        let mut cache = model.new_cache(&Spec::Fp16, None).unwrap();
        let mut sampler = Sampler::new(SamplingParams::default()).unwrap();
        generate(&model, &tokenizer, &mut cache, prompt, &mut sampler, options, &mut |_| true)
    };
    let o = run(&ids, &GenerateOptions { max_tokens: 4, ..Default::default() }).unwrap();
    assert!(o.text.contains("Paris"), "{}", o.text);
    assert_eq!((o.stop, o.tokens.len(), o.prompt_tokens), (StopReason::MaxTokens, 4, 5));
    let o = run(&ids, &GenerateOptions { stop: vec!["aris".into()], ..Default::default() }).unwrap();
    assert_eq!((o.text.as_str(), o.stop), (" P", StopReason::StopString));
    let o = run(&ids, &GenerateOptions { context: 7, ..Default::default() }).unwrap();
    assert_eq!(o.stop, StopReason::ContextFull);
    let e = run(&[], &GenerateOptions::default()).unwrap_err();
    assert!(matches!(e, ForwardError::Empty));
    let e = run(&ids, &GenerateOptions { context: 4, ..Default::default() }).unwrap_err();
    assert!(matches!(e, ForwardError::ContextFull { new: 5, context: 4, .. }), "{e}");
    let mut cache = model.new_cache(&Spec::Fp16, None).unwrap();
    let e = model.forward(&mut [Step { tokens: &[1 << 20], cache: &mut cache, logits: Logits::Last }], Prefill::Exact);
    assert!(matches!(e, Err(ForwardError::Token { .. })));
    assert!(cache.is_empty());
}

#[test]
fn numbers_that_are_not_finite_are_an_error_and_leave_the_cache_as_it_was() {
    let (mut model, _) = load();
    let mut cache = model.new_cache(&Spec::Fp16, None).unwrap();
    let mut run = |model: &Model, tokens: &[u32]| {
        let mut steps = [Step { tokens, cache: &mut cache, logits: Logits::Last }];
        let result = model.forward(&mut steps, Prefill::Quantized).map(|_| ());
        (result, cache.len())
    };
    assert!(matches!(run(&model, &[1, 2, 3]), (Ok(()), 3)));
    let norm = std::mem::replace(&mut model.layers[4].attn_norm[7], f32::NAN);
    let (error, len) = run(&model, &[4, 5]);
    let error = error.unwrap_err();
    assert!(matches!(error, ForwardError::Cache(_)) && len == 3, "{error}");
    assert!(error.to_string().contains("layer 4") && error.to_string().contains("NaN"), "{error}");
    model.layers[4].attn_norm[7] = norm;
    let norm = std::mem::replace(&mut model.layers[6].ffn_norm[7], f32::INFINITY);
    let (error, len) = run(&model, &[4, 5]);
    let error = error.unwrap_err();
    assert!(matches!(error, ForwardError::NotFinite { layer: 6 }) && len == 3, "{error}");
    model.layers[6].ffn_norm[7] = norm;
    assert!(matches!(run(&model, &[4, 5]), (Ok(()), 5)));
}

/// Scalar kernels compute in f32 with what the quantizer decodes to, bit for bit: a simulated quantizer. The fast ones
/// work on codes and integers, and may not stray from it by more than 2 % of what it loses itself. (What they lose
/// against the exact cache is that much more on average only; over few tokens it is as often less.) Both decode from the same
/// stored history: two runs drift apart by more than that from any rounding, since a code that flips changes all that follows.
/// For the same reason weights meet f32: integers would round either run another way.
#[test]
fn kernels_stay_near_the_simulated_quantizer() {
    let (mut model, tokenizer) = load();
    model.activations = Activations::F32;
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let quantizer = kvquant_quant::Quantizer::load(&folder.join("../../quantizers/smollm2-135m.safetensors")).unwrap();
    let text = std::fs::read_to_string(folder.join("../cli/assets/station.txt")).unwrap();
    let ids = &tokenizer.encode(&text, false).unwrap()[..464];
    let probabilities = |row: &[f32]| -> Vec<f64> {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = row.iter().map(|x| f64::from(x - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|x| x / sum).collect()
    };
    let divergence = |p: &[f64], logits: &[f32]| -> f64 {
        let q = probabilities(logits);
        p.iter().zip(&q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q.max(1e-300)).ln()).sum()
    };
    let scalar = Kernels::available()[0];
    for spec in ["nuq4-1%+sink1", "nuq3-1%+sink1", "nuq2-1%+sink1"] {
        let mut exact = model.new_cache(&Spec::Fp16, None).unwrap();
        let mut coded = model.new_cache(&spec.parse().unwrap(), Some(&quantizer)).unwrap();
        let step = |tokens: &[u32], cache: &mut kvquant_cache::Cache| {
            let mut steps = [Step { tokens, cache, logits: Logits::Last }];
            model.forward(&mut steps, Prefill::Quantized).unwrap()
        };
        let (mut simulated, mut strayed) = (0.0, vec![0.0; Kernels::available().len()]);
        for cache in [&mut exact, &mut coded] {
            step(&ids[..400], cache);
        }
        for t in 400..ids.len() {
            let p = probabilities(&step(&ids[t..=t], &mut exact));
            coded.set_kernels(scalar);
            let twin = step(&ids[t..=t], &mut coded);
            simulated += divergence(&p, &twin);
            for (kernels, strayed) in Kernels::available().into_iter().zip(&mut strayed).skip(1) {
                coded.truncate(t).unwrap();
                coded.set_kernels(kernels);
                *strayed += divergence(&probabilities(&twin), &step(&ids[t..=t], &mut coded));
            }
        }
        for (kernels, strayed) in Kernels::available().into_iter().zip(strayed).skip(1) {
            let name = kernels.name();
            eprintln!("{spec}: {simulated:.5} simulated, {strayed:.5} from there to the {name} kernels");
            assert!(strayed > 0.0 && strayed <= 0.02 * simulated, "{spec}, {name}: {strayed} {simulated}");
        }
    }
}

/// Mean KL divergence from p to q, rows of `vocab` logits.
fn divergence(p: &[f32], q: &[f32], vocab: usize) -> f64 {
    let log_sum = |x: &[f32]| x.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
    let row = |(p, q): (&[f32], &[f32])| {
        let (a, b) = (log_sum(p), log_sum(q));
        let part = |(p, q): (&f32, &f32)| {
            let log = f64::from(*p) - a;
            log.exp() * (log - (f64::from(*q) - b))
        };
        p.iter().zip(q).map(part).sum::<f64>()
    };
    p.chunks_exact(vocab).zip(q.chunks_exact(vocab)).map(row).sum::<f64>() / (p.len() / vocab) as f64
}

/// 15 bits are as good as f32; 8 bits lose little.
#[test]
fn integer_activations_lose_what_they_say() {
    let (mut model, tokenizer) = load();
    let ids = tokenizer.encode(&include_str!("../../cli/assets/station.txt")[..1500], false).unwrap();
    let mut logits = |activations: Activations| {
        model.activations = activations;
        let mut cache = model.new_cache(&Spec::Fp16, None).unwrap();
        let mut steps = [Step { tokens: &ids, cache: &mut cache, logits: Logits::All }];
        model.forward(&mut steps, Prefill::Exact).unwrap()
    };
    let exact = logits(Activations::F32);
    let vocab = exact.len() / ids.len();
    let (fine, coarse) = (logits(Activations::Int15), logits(Activations::Int8));
    let (fine, coarse) = (divergence(&exact, &fine, vocab), divergence(&exact, &coarse, vocab));
    assert!(fine < 1e-5, "{fine}");
    assert!(coarse > fine && coarse < 0.02, "{coarse}");
}

/// What a sequence gets does not depend on those that run with it, bit for bit.
#[test]
fn a_batch_changes_nothing() {
    let (model, tokenizer) = load();
    let texts = ["The light burned", "Once upon a time there was a", "In"];
    let ids: Vec<Vec<u32>> = texts.iter().map(|t| tokenizer.encode(t, false).unwrap()).collect();
    let mut together: Vec<_> = ids.iter().map(|_| model.new_cache(&Spec::Fp16, None).unwrap()).collect();
    let mut steps: Vec<Step<'_>> =
        ids.iter().zip(&mut together).map(|(tokens, cache)| Step { tokens, cache, logits: Logits::Last }).collect();
    let batch = model.forward(&mut steps, Prefill::Exact).unwrap();
    for (tokens, got) in ids.iter().zip(batch.chunks_exact(model.config.vocab)) {
        let mut cache = model.new_cache(&Spec::Fp16, None).unwrap();
        let mut steps = [Step { tokens, cache: &mut cache, logits: Logits::Last }];
        let alone = model.forward(&mut steps, Prefill::Exact).unwrap();
        assert!(alone.iter().zip(got).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}
