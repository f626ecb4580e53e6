//! Quantizer files: refused, or fits whose tables the kernels accept.
#![no_main]

use kvquant_quant::{Quantizer, Side, SideQuantizer, Spec};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Ok(quantizer) = Quantizer::from_bytes(file, "fuzz") else { return };
    let shape = &quantizer.model;
    for fit in &quantizer.fits {
        let Spec::Coded(spec) = &fit.spec else { continue };
        for layer in &fit.layers {
            for side in [Side::Key, Side::Value] {
                let _ = SideQuantizer::new(spec, side, shape.kv_heads, shape.head_dim, Some(layer));
            }
        }
    }
});
