use super::*;

/// Two heads of 4 channels: 3 bits, then 1 bit.
fn mixed(key: bool) -> MixedFit {
    let posts = |n: i16| (0..4).flat_map(move |_| (0..n).map(|i| 100 * i - 350));
    let identity = |n: usize| (0..n * n).map(move |i| f32::from(u8::from(i / n == i % n)));
    MixedFit {
        widths: vec![3, 1],
        order: vec![2, 3, 0, 1, 0, 1, 2, 3],
        steps: vec![0.01; 8],
        posts: posts(8).chain(posts(2)).collect(),
        transform: if key { vec![0.5; 4] } else { identity(4).chain(identity(4)).collect() },
    }
}

fn quantizer() -> Quantizer {
    let specs = ["nuq3-1%+sink1", "nuq2-1%", "int3-1%+vchannel", "nuq2-1%+ktoken", "mix2+sink1"];
    let fits = specs.map(|s| {
        let spec: Spec = s.parse().unwrap();
        let side = |key: bool| {
            let (t, b) = parts(&spec, key);
            let book: Vec<f32> = (0..signposts(&spec)).map(|i| i as f32 / 10.0 - 0.5).collect();
            SideFit {
                lower: if t { vec![-1.5; 8] } else { vec![] },
                upper: if t { vec![2.5; 8] } else { vec![] },
                encode: if b { book.clone() } else { vec![] },
                decode: if b { book } else { vec![] },
                mixed: is_mixed(&spec).then(|| mixed(key)),
            }
        };
        let layer = LayerFit { keys: side(true), values: side(false) };
        Fit { spec: spec.clone(), layers: vec![layer.clone(), layer] }
    });
    Quantizer {
        model: Fingerprint {
            architecture: "llama".into(),
            layers: 2,
            kv_heads: 2,
            head_dim: 4,
            norms_sha256: "ab".repeat(32),
        },
        provenance: Provenance { text: "a text".into(), windows: 16, ctx: 2048, tool: "kvquant".into() },
        fits: fits.to_vec(),
    }
}

#[test]
fn a_file_survives_a_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q.safetensors");
    quantizer().save(&path).unwrap();
    assert_eq!(Quantizer::load(&path).unwrap(), quantizer());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file is left");
}

#[test]
fn a_fit_knows_what_it_takes_in_a_file() {
    for fit in quantizer().fits {
        let one = |fits| Quantizer { fits, ..quantizer() }.to_bytes().unwrap();
        let data = |file: &[u8]| file.len() - 8 - u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        assert_eq!(data(&one(vec![fit.clone()])), fit.file_bytes(), "{}", fit.spec);
    }
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q.safetensors");
    std::fs::create_dir(&path).unwrap();
    let e = quantizer().save(&path).unwrap_err().to_string();
    assert!(e.contains("q.safetensors") && e.contains("write"), "{e}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn fits_are_found_by_spec_then_by_other_sinks() {
    let q = quantizer();
    let find = |s: &str| q.fit(&s.parse().unwrap()).map(|f| f.spec.to_string());
    assert_eq!(find("nuq3-1%+sink1+recent32").unwrap(), "nuq3-1%+sink1");
    assert_eq!(find("nuq3-1%+sink4").unwrap(), "nuq3-1%+sink1");
    assert_eq!(find("nuq2-1%+sink1").unwrap(), "nuq2-1%");
    let e = find("nuq4-1%").unwrap_err().to_string();
    assert!(e.contains("nuq4-1%") && e.contains("nuq3-1%+sink1, nuq2-1%"), "{e}");
}

#[test]
fn another_model_is_refused_by_name() {
    let q = quantizer();
    q.check_model(&q.model).unwrap();
    let other = Fingerprint { architecture: "qwen2".into(), ..q.model.clone() };
    let e = q.check_model(&other).unwrap_err().to_string();
    assert!(e.contains("llama") && e.contains("qwen2") && e.contains("kvquant calibrate"), "{e}");
}

#[test]
fn truncated_and_flipped_files_never_panic() {
    let bytes = quantizer().to_bytes().unwrap();
    for n in 0..bytes.len().min(4000) {
        assert!(Quantizer::from_bytes(&bytes[..n], "cut").is_err(), "cut to {n}");
    }
    for i in 0..bytes.len() {
        for flip in [1u8, 0x80] {
            let mut bad = bytes.clone();
            bad[i] ^= flip;
            // A flip in a number may go unseen; it must not panic, and what is read must be sound.
            if let Ok(q) = Quantizer::from_bytes(&bad, "flipped") {
                assert!(q.fits.iter().flat_map(|f| &f.layers).all(|l| l.keys.encode.is_sorted()));
            }
        }
    }
}

#[test]
fn unsound_content_is_named() {
    let says = |change: fn(&mut Quantizer), words: &[&str]| {
        let mut q = quantizer();
        change(&mut q);
        let e = Quantizer::from_bytes(&q.to_bytes().unwrap(), "bad.safetensors").unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)) && e.contains("bad.safetensors"), "{e}");
    };
    says(|q| q.fits[0].layers[1].keys.lower[3] = f32::NAN, &["nuq3-1%+sink1/k.lower", "NaN"]);
    says(|q| q.fits[0].layers[1].keys.lower[3] = 9.0, &["layer 1", "channel 3"]);
    says(|q| q.fits[1].layers[0].values.encode[0] = 9.0, &["nuq2-1%/v.encode", "not sorted"]);
    says(|q| q.model.layers = 3, &["expected F32 [3, 8]"]);
    says(|q| q.model.kv_heads = usize::MAX, &["model"]);
    let mut q = quantizer();
    q.fits.push(q.fits[0].clone());
    assert!(q.to_bytes().unwrap_err().to_string().contains("twice"));
    let e = Quantizer::load(Path::new("no/such/file")).unwrap_err().to_string();
    assert!(e.contains("no/such/file") && e.contains("read"), "{e}");
}

#[test]
fn mixed_fits_that_contradict_themselves_are_refused() {
    let refused = |change: fn(&mut MixedFit), key: bool, problem: &str| {
        let mut q = quantizer();
        let fit = q.fits.last_mut().unwrap();
        let side = if key { &mut fit.layers[1].keys } else { &mut fit.layers[1].values };
        change(side.mixed.as_mut().unwrap());
        let e = Quantizer::from_bytes(&q.to_bytes().unwrap(), "q").unwrap_err().to_string();
        assert!(e.contains(problem) && e.contains("mix2+sink1") && e.contains("layer 1"), "{e}");
    };
    refused(|m| m.widths[0] = 9, true, "ends within");
    refused(|m| m.order[0] = 3, false, "no permutation");
    refused(|m| m.order[0] = 4, false, "no permutation");
    refused(|m| m.steps[0] = 0.02, true, "two steps");
    refused(|m| m.steps[3] = f32::NAN, false, "not a positive number");
    refused(|m| m.posts[3] = -400, true, "not in order");
    refused(|m| m.posts[7] = 8192, true, "not in order");
    refused(|m| m.transform[0] = f32::INFINITY, true, "not finite");
    refused(|m| m.transform[0] = 0.9, false, "not orthogonal");
    let mut q = quantizer();
    q.fits.last_mut().unwrap().layers[1].keys.mixed.as_mut().unwrap().posts.push(0);
    let e = Quantizer::from_bytes(&q.to_bytes().unwrap(), "q").unwrap_err().to_string();
    assert!(e.contains("more entries"), "{e}");
}
