//! Calibration and every kind of cache on every family, on tiny models with random weights.

use std::path::Path;

use kvquant_cache::Prefill;
use kvquant_calib::{calibrate, sample_windows};
use kvquant_model::{Logits, Model, Step};
use kvquant_quant::Spec;

const SPECS: [&str; 7] = [
    "nuq4-1%+sink1",
    "nuq3-1%+sink1+recent8",
    "nuq3-1%+postrope",
    "nuq2+qnorm",
    "int4-g8+asym",
    "nf3-g8",
    "mix4+sink1",
];

#[test]
fn every_family_is_calibrated_and_runs_with_every_cache() {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/parity");
    for name in ["llama", "llama-dynamic", "mistral", "qwen2", "qwen3", "gemma3", "phi3"] {
        let (model, _) = Model::load(&parity.join(name).join("model"), &mut |_, _| {}).unwrap();
        let windows = sample_windows(&model, 3, 60, 5, &mut |_| {}).unwrap();
        let specs: Vec<Spec> = SPECS.iter().map(|s| s.parse().unwrap()).collect();
        let q = calibrate(&model, &windows, &specs, "itself", &mut |_| {}).unwrap();
        assert_eq!(q.fits.len(), specs.iter().filter(|s| s.needs_fit()).count(), "{name}");
        let run = |spec: &Spec| {
            let mut cache = model.new_cache(spec, Some(&q)).unwrap();
            let mut steps = [Step { tokens: &windows[0], cache: &mut cache, logits: Logits::All }];
            model.forward(&mut steps, Prefill::Quantized).unwrap()
        };
        let exact = run(&Spec::Fp16);
        let size = exact.iter().map(|x| x * x).sum::<f32>();
        let mut off = vec![];
        for spec in &specs {
            let error: f32 = run(spec).iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum();
            off.push((error / size).sqrt());
        }
        // Random weights forgive little. Four bits are nearer than two, and none is nonsense.
        assert!(off[0] < 0.35 && off[0] > 1e-4, "{name}: {off:?}");
        assert!(off[0] < off[3] && off[6] < off[3] && off.iter().all(|x| x.is_finite() && *x < 1.0), "{name}: {off:?}");
    }
}
