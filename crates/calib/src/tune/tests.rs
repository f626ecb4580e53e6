use super::*;
use crate::calibrate;
use crate::testing::{noise, spec, tiny_gemma, tiny_model};
use rand::{Rng, SeedableRng};

fn windows(n: usize, ctx: usize) -> Vec<Vec<u32>> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(9);
    (0..n).map(|_| (0..ctx).map(|_| rng.random_range(0..19)).collect()).collect()
}

fn silent(_: Progress<'_>) {}

const OPTIONS: TuneOptions = TuneOptions { steps: 40, rate: 0.05, held_out: 2, measure_every: 10 };

fn fitted(model: &Model, specs: &[Spec]) -> Quantizer {
    calibrate(model, &windows(4, 48), specs, "t", &mut silent).unwrap()
}

#[test]
fn tuning_lowers_the_divergence_and_leaves_a_sound_file() {
    for model in [tiny_model(true), tiny_gemma()] {
        let specs: Vec<Spec> = ["mix2+sink1", "nuq2-1%+sink1", "nuq2+vchannel"].map(|s| s.parse().unwrap()).into();
        let mut q = fitted(&model, &specs);
        let before = q.clone();
        // The held-out windows are among the others: this is about the steps, not about what carries over.
        let windows: Vec<_> = windows(4, 32).into_iter().cycle().take(6).collect();
        let all = tune(&model, &windows, &mut q, &specs, &OPTIONS, &mut silent).unwrap();
        for t in &all {
            assert!(t.after < 0.998 * t.before && t.best_step > 0, "{t:?}");
        }
        assert!(q.fits.iter().zip(&before.fits).all(|(a, b)| a != b));
        // The file's checks accept what came out.
        let read = Quantizer::from_bytes(&q.to_bytes().unwrap(), "t").unwrap();
        assert_eq!(read, q);
        // Widths and bases stay.
        let mixed = |q: &Quantizer| q.fits[0].layers[1].values.mixed.clone().unwrap();
        assert_eq!((mixed(&q).widths, mixed(&q).transform), (mixed(&before).widths, mixed(&before).transform));
        // What is kept is what was measured.
        let again = tune(&model, &windows, &mut q, &specs, &TuneOptions { steps: 0, ..OPTIONS }, &mut silent);
        for (a, b) in again.unwrap().iter().zip(&all) {
            assert!((a.before - b.after).abs() < 1e-9 && a.best_step == 0, "{a:?} {b:?}");
        }
    }
}

#[test]
fn gradients_are_those_of_what_codes_decode_to() {
    let (kv_heads, head_dim, tokens) = (2, 4, 50);
    let model = tiny_model(false);
    for (name, side) in [
        ("mix3+sink1", Side::Key),
        ("mix3+sink1", Side::Value),
        ("nuq2-1%+sink1", Side::Key),
        ("nuq2-1%+sink1", Side::Value),
    ] {
        let spec: Spec = name.parse().unwrap();
        let q = fitted(&model, std::slice::from_ref(&spec));
        let Spec::Coded(coded) = &spec else { unreachable!() };
        let layer = &q.fits[0].layers[0];
        let fit = if side == Side::Key { &layer.keys } else { &layer.values };
        let mut tuned = TunedSide::new(coded, side, kv_heads, head_dim, fit);
        let (x, d) = (noise(tokens * 8, 4), noise(tokens * 8, 5));
        // The loss is linear in what comes back, so its change with a small step is the gradient times the step.
        let loss = |tuned: &TunedSide| {
            let mut y = x.clone();
            let codes = tuned.quantize(&mut y, 1).unwrap();
            let sum: f64 = y.iter().zip(&d).map(|(y, d)| f64::from(y * d)).sum();
            (sum, codes)
        };
        let (before, codes) = loss(&tuned);
        tuned.gather(&codes, &d, 1);
        let expected = tuned.step_along_gradient(0.02);
        let mut y = x.clone();
        let after: f64 = {
            tuned.decode(&codes, &mut y, 1);
            y.iter().zip(&d).map(|(y, d)| f64::from(y * d)).sum()
        };
        let got = after - before;
        assert!((got - expected).abs() < 0.02 * expected.abs(), "{name} {side:?}: {got} {expected}");
    }
}

#[test]
fn what_cannot_be_tuned_is_named() {
    let model = tiny_model(false);
    let specs = [Spec::Coded(spec(2, 0))];
    let mut q = fitted(&model, &specs);
    let mut run = |n: usize, s: &str| {
        tune(&model, &windows(n, 16), &mut q, &[s.parse().unwrap()], &OPTIONS, &mut silent).unwrap_err()
    };
    assert!(matches!(run(2, "nuq2+sink1"), CalibError::TuneWindows { windows: 2, needed: 3 }));
    for s in ["fp16", "int4-g4", "nuq2+qnorm", "nuq2+postrope", "nuq2+online"] {
        assert!(matches!(run(6, s), CalibError::NotTunable { .. }), "{s}");
    }
    assert!(matches!(run(6, "mix3"), CalibError::File(_)));
}
