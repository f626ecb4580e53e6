use super::*;
use crate::Spec;
use proptest::prelude::*;

fn spec(s: &str) -> CodedSpec {
    match s.parse().unwrap() {
        Spec::Coded(c) => c,
        Spec::Fp16 => panic!("a coded spec"),
    }
}

fn fit(bits: u32, channels: usize) -> LayerFit {
    let book: Vec<f32> = uniform(bits).iter().map(|q| q * q * q.signum()).collect();
    let side = SideFit {
        lower: (0..channels).map(|c| -1.0 - c as f32 / 8.0).collect(),
        upper: (0..channels).map(|c| if c == 5 { -1.0 - 5.0 / 8.0 } else { 2.0 }).collect(),
        encode: book.clone(),
        decode: book,
        mixed: None,
    };
    LayerFit { keys: side.clone(), values: side }
}

fn quantizer(s: &str, side: Side) -> SideQuantizer {
    let spec = spec(s);
    SideQuantizer::new(&spec, side, 2, 8, Some(&fit(spec.bits, 16))).unwrap()
}

const SPECS: [&str; 10] = [
    "nuq3-1%",
    "nuq2-1%",
    "nuq4",
    "int3-1%",
    "nf4-5%",
    "nf3+ktoken",
    "int4-g8",
    "int2-g4+asym",
    "nuq3-5%+ktoken",
    "nuq3+vchannel",
];

proptest! {
    #[test]
    fn the_nearest_signpost_is_chosen_and_outliers_are_exact(x in prop::collection::vec(-9f32..9.0, 16)) {
        for s in SPECS {
            for side in [Side::Key, Side::Value] {
                let q = quantizer(s, side);
                let mut codes = TokenCodes::default();
                q.quantize(&x, &mut codes).unwrap();
                let mut back = vec![0.0; 16];
                q.dequantize(&codes, &mut back);
                for c in 0..16 {
                    if codes.outliers.iter().any(|o| o.channel as usize == c) {
                        prop_assert!((back[c] - x[c]).abs() <= 2e-3 * x[c].abs().max(1.0), "{} {} {}", s, back[c], x[c]);
                        continue;
                    }
                    let values: Vec<f32> = (0..1usize << q.lut.widths[0]).map(|code| {
                        let mut other = codes.clone();
                        other.codes[c] = code as u8;
                        let mut all = vec![0.0; 16];
                        q.dequantize(&other, &mut all);
                        all[c]
                    }).collect();
                    let best = values.iter().map(|v| (v - x[c]).abs()).fold(f32::INFINITY, f32::min);
                    prop_assert!((back[c] - x[c]).abs() <= best + 1e-3, "{} channel {} {} {} {:?}", s, c, x[c], back[c], values);
                }
            }
        }
    }
}

#[test]
fn token_outliers_are_the_extremes_by_index() {
    let q = quantizer("nuq3-1%", Side::Value);
    let mut codes = TokenCodes::default();
    let mut x = vec![1.0; 16];
    q.quantize(&x, &mut codes).unwrap();
    let mut channels: Vec<_> = codes.outliers.iter().map(|o| o.channel).collect();
    channels.sort();
    assert_eq!(channels, [0, 1], "ties: one a side, the first by index, never more");
    assert_eq!(codes.scale[0], f16::ZERO);
    let mut back = vec![0.0; 16];
    q.dequantize(&codes, &mut back);
    assert_eq!(back, x, "a constant token is exact");
    (x[3], x[9]) = (50.0, -40.0);
    q.quantize(&x, &mut codes).unwrap();
    q.dequantize(&codes, &mut back);
    assert_eq!((codes.outliers.len(), back[3], back[9], back[0]), (2, 50.0, -40.0, 1.0));
}

#[test]
fn key_outliers_follow_the_offline_thresholds() {
    let q = quantizer("nuq3-1%", Side::Key);
    let mut codes = TokenCodes::default();
    let mut x = vec![0.0; 16];
    x[5] = -1.0 - 5.0 / 8.0;
    q.quantize(&x, &mut codes).unwrap();
    assert!(codes.outliers.is_empty(), "on the thresholds of a constant channel");
    (x[2], x[5]) = (2.001, 3.0);
    q.quantize(&x, &mut codes).unwrap();
    let mut channels: Vec<_> = codes.outliers.iter().map(|o| o.channel).collect();
    channels.sort();
    assert_eq!(channels, [2, 5]);
    let dense = quantizer("nuq3", Side::Key);
    dense.quantize(&x, &mut codes).unwrap();
    assert!(codes.outliers.is_empty(), "without a share, values are clamped");
}

#[test]
fn broken_input_is_refused_by_channel() {
    for s in SPECS {
        for bad in [f32::NAN, f32::INFINITY, -70_000.0] {
            let mut x = vec![0.5; 16];
            x[11] = bad;
            let e = quantizer(s, Side::Value).quantize(&x, &mut TokenCodes::default()).unwrap_err();
            assert!(matches!(e, QuantError::NotFinite { channel: 11, .. }));
        }
        let mut wide = vec![65504.0; 16];
        wide[3] = -65504.0;
        // The widest range that fp16 has: stored, or refused where an outlier lies too far off; never clamped.
        let wide = quantizer(s, Side::Value).quantize(&wide, &mut TokenCodes::default());
        let far = spec(s).outliers > 0;
        assert!(matches!(wide, Err(QuantError::Residual { channel: 3, .. })) == far && wide.is_ok() != far, "{s}");
    }
    let e = SideQuantizer::new(&spec("nuq3"), Side::Key, 2, 8, None).unwrap_err();
    assert!(e.to_string().contains("kvquant calibrate"));
    let e = SideQuantizer::new(&spec("nuq3"), Side::Key, 2, 4, Some(&fit(3, 16))).unwrap_err();
    assert!(matches!(e, QuantError::FitSize { expected: 8, got: 16, .. }));
    let e = SideQuantizer::new(&spec("nuq4"), Side::Key, 2, 8, Some(&fit(3, 16))).unwrap_err();
    assert!(matches!(e, QuantError::FitSize { expected: 16, got: 8, .. }));
}

#[test]
fn what_would_come_back_wrong_is_refused() {
    let new = |s: &str, heads| SideQuantizer::new(&spec(s), Side::Value, heads, 8, Some(&fit(3, 16))).map(|_| ());
    assert_eq!(new("int4-g12", 2), Err(QuantError::Group { group: 12, channels: 16 }));
    assert_eq!(new("nuq3-1%", 0), Err(QuantError::Width { channels: 0 }));
    let mut x = vec![-60_000.0; 16];
    x[4] = 60_000.0;
    let e = quantizer("nuq3-1%", Side::Value).quantize(&x, &mut TokenCodes::default()).unwrap_err();
    assert!(matches!(e, QuantError::Residual { channel: 4, .. }), "{e}");
}

#[test]
fn decoding_can_differ_from_encoding() {
    let mut f = fit(2, 16);
    f.keys.decode = f.keys.encode.iter().map(|q| 0.5 * q + 0.1).collect();
    let q = SideQuantizer::new(&spec("nuq2+qnorm"), Side::Key, 2, 8, Some(&f)).unwrap();
    let mut codes = TokenCodes::default();
    q.quantize(&[2.0; 16], &mut codes).unwrap();
    assert_eq!(codes.codes, [3; 16]);
    let mut back = [0.0; 16];
    q.dequantize(&codes, &mut back);
    let (z, s) = ((2.0 - 1.0) / 2.0, (2.0 + 1.0) / 2.0);
    assert_eq!(back[0], z + s * 0.6);
}
