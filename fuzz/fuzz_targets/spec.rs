//! Names of cache specs: what is read is written and read again as the same.
#![no_main]

use kvquant_quant::Spec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(spec) = text.parse::<Spec>() {
        assert_eq!(spec.to_string().parse::<Spec>().as_ref(), Ok(&spec), "{spec}");
    }
});
