//! The device functions that know nothing of warps, compiled as host C++ and compared with the Rust code: bit for bit where
//! they decode, turn and choose codes, to rounding where states merge.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bytemuck::Pod;
use kvquant_kernels::attend::State;
use kvquant_kernels::rope::Rope;
use kvquant_quant::{
    CodebookKind, CodedSpec, FisherWeights, KeyStage, LayerFit, Rule, Scope, Side, SideFit, SideQuantizer, TokenCodes,
    normal_float,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The functions for one width of codes and one head dimension.
struct Host {
    program: PathBuf,
    bits: usize,
    dim: usize,
    _folder: tempfile::TempDir,
}

/// What compiles C++ here.
fn compiler() -> String {
    let asked = std::env::var("CXX").ok();
    let known = ["c++", "g++", "clang++"].map(String::from);
    let works = |c: &String| Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success());
    asked.into_iter().chain(known).find(works).expect("this test needs a C++ compiler: install g++, or set CXX")
}

impl Host {
    fn new(bits: usize, dim: usize) -> Host {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("host");
        let built = Command::new(compiler())
            // No product and sum may become one step: the kernels round each.
            .args(["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wno-unused-function", "-Werror"])
            .args([format!("-DBITS={bits}"), format!("-DDIM={dim}")])
            .arg(format!("-I{}", here.join("kernels").display()))
            .arg(here.join("tests/host.cpp"))
            .arg("-o")
            .arg(&program)
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Host { program, bits, dim, _folder: folder }
    }

    /// Runs a function of host.cpp over numbers.
    fn run<I: Pod, O: Pod>(&self, what: &str, input: &[I]) -> Vec<O> {
        let mut child = Command::new(&self.program)
            .arg(what)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program that was just built");
        let mut pipe = child.stdin.take().unwrap();
        let bytes = bytemuck::cast_slice::<I, u8>(input).to_vec();
        let writer = std::thread::spawn(move || pipe.write_all(&bytes));
        let out = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        assert!(out.status.success(), "{what} at {} bits x {}: {}", self.bits, self.dim, out.status);
        out.stdout.chunks_exact(size_of::<O>()).map(bytemuck::pod_read_unaligned).collect()
    }

    fn unit_bits(&self) -> usize {
        64 * self.dim * self.bits
    }
}

fn each(dims: &[usize], test: impl Fn(&Host)) {
    for bits in [2, 3, 4] {
        dims.iter().for_each(|dim| test(&Host::new(bits, *dim)));
    }
}

#[test]
fn a_unit_holds_every_code_once_and_nothing_else() {
    each(&[64, 128], |host| {
        let (bits, dim, n) = (host.bits, host.dim, host.unit_bits());
        // For each bit of both units: channel, token, weight.
        let found: Vec<[u32; 3]> = bytemuck::cast_slice(&host.run::<u8, u32>("bits", &[])).to_vec();
        assert_eq!(found.len(), 2 * n);
        for side in found.chunks_exact(n) {
            let mut seen = vec![0u32; 64 * dim];
            for [channel, token, weight] in side {
                assert!(weight.is_power_of_two() && *weight < 1 << bits, "{weight} at {bits} bits");
                let place = &mut seen[*channel as usize * 64 + *token as usize];
                assert_eq!(*place & weight, 0, "two bits for one");
                *place |= weight;
            }
            assert!(seen.iter().all(|s| *s == (1 << bits) - 1));
        }
        // Codes put there bit by bit come back.
        let mut rng = ChaCha8Rng::seed_from_u64(bits as u64);
        let codes: Vec<u8> = (0..2 * 64 * dim).map(|_| rng.random_range(0..1 << bits)).collect();
        let mut units = vec![0u8; 2 * n / 8];
        for (bit, [channel, token, weight]) in found.iter().enumerate() {
            let code = codes[bit / n * 64 * dim + *channel as usize * 64 + *token as usize];
            units[bit / 8] |= ((code as u32 & weight != 0) as u8) << (bit % 8);
        }
        assert_eq!(host.run::<u8, u8>("decode", &units), codes);
        assert!(host.run::<u8, u8>("encode", &codes) == units, "codes are put where they are read");
    });
}

#[test]
fn an_outlier_is_found_where_it_was_put() {
    for dim in [64, 128, 256] {
        let got: Vec<[u32; 3]> = bytemuck::cast_slice(&Host::new(4, dim).run::<u8, u32>("outliers", &[])).to_vec();
        assert_eq!(got.len(), dim * 64);
        for (i, got) in got.iter().enumerate() {
            let (c, t) = (i as u32 / 64, i as u32 % 64);
            assert_eq!(*got, [c, t, (c * 977 + t * 4099) & 0xffff]);
        }
    }
}

fn key_quantizer(bits: usize, dim: usize, rng: &mut ChaCha8Rng) -> SideQuantizer {
    let spec = CodedSpec {
        bits: bits as u32,
        codebook: CodebookKind::Nuq,
        outliers: 100,
        keys: Scope::Channel,
        values: Scope::Token,
        stage: KeyStage::PreRope,
        sinks: 0,
        recent: 0,
        qnorm: false,
        weights: FisherWeights::FisherScale2,
        zero_point: true,
        online: false,
    };
    let (lower, upper) = (0..dim).map(|_| (-3.0 * rng.random::<f32>() - 0.1, 3.0 * rng.random::<f32>() + 0.1)).unzip();
    let book = normal_float(bits as u32);
    let keys = SideFit { lower, upper, encode: book.clone(), decode: book.clone(), mixed: None };
    let values = SideFit { lower: vec![], upper: vec![], encode: book.clone(), decode: book, mixed: None };
    SideQuantizer::new(&spec, Side::Key, 1, dim, Some(&LayerFit { keys, values })).unwrap()
}

#[test]
fn codes_are_those_of_the_quantizer() {
    each(&[64, 256], |host| {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let quantizer = key_quantizer(host.bits, host.dim, &mut rng);
        let Rule::Channel { bounds, .. } = quantizer.rule() else { panic!("a rule by channels") };
        let mut x: Vec<f32> = (0..50 * host.dim).map(|_| 8.0 * rng.random::<f32>() - 4.0).collect();
        // The bounds themselves, and their neighbours.
        for m in bounds {
            x.extend(m);
            x.extend(m.iter().map(|b| b.next_up()));
            x.extend(m.iter().map(|b| b.next_down()));
        }
        let mut expected = Vec::new();
        let mut codes = TokenCodes::default();
        for token in x.chunks_exact(host.dim) {
            quantizer.quantize(token, &mut codes).unwrap();
            expected.extend_from_slice(&codes.codes);
        }
        let input = [bounds.concat(), x].concat();
        assert_eq!(host.run::<f32, u8>("codes", &input), expected);
    });
}

#[test]
fn pairs_turn_as_those_of_the_cpu() {
    let host = Host::new(3, 128);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let rope = Rope { inv_freq: (0..64).map(|i| 500_000f64.powf(-(i as f64) / 64.0)).collect() };
    let (mut input, mut expected) = (Vec::new(), Vec::new());
    for position in [0, 1, 63, 64, 8_191, 1_000_003] {
        let rotation = rope.rotation(position);
        let mut head: Vec<f32> = (0..128).map(|_| 20.0 * rng.random::<f32>() - 10.0).collect();
        for (i, pair) in head.chunks_exact(2).enumerate() {
            input.extend([pair[0], pair[1], rotation.cos[i], rotation.sin[i]]);
        }
        rotation.apply(&mut head);
        expected.extend(head.iter().map(|x| x.to_bits()));
    }
    assert_eq!(host.run::<f32, u32>("turn", &input), expected);
}

#[test]
fn states_merge_as_those_of_the_cpu() {
    let host = Host::new(3, 128);
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let none = -3.4e38f32;
    let mut states: Vec<[f32; 3]> = (0..400)
        .map(|_| [40.0 * rng.random::<f32>() - 20.0, 10.0 * rng.random::<f32>(), 6.0 * rng.random::<f32>() - 3.0])
        .collect();
    // The state of no tokens, on either side and on both.
    states[10] = [none, 0.0, 0.0];
    states[21] = [none, 0.0, 0.0];
    states[30] = [none, 0.0, 0.0];
    states[31] = [none, 0.0, 0.0];
    let got: Vec<[f32; 3]> = bytemuck::cast_slice(&host.run::<f32, f32>("merge", states.as_flattened())).to_vec();
    for (pair, got) in states.chunks_exact(2).zip(&got) {
        // Scores of the kernels are in units of log2 e.
        let state = |s: &[f32; 3]| {
            let mut state = State::empty(1, 1);
            if s[0] != none {
                (state.max[0], state.sum[0], state.out[0]) = (s[0] * std::f32::consts::LN_2, s[1], s[2]);
            }
            state
        };
        let mut both = state(&pair[0]);
        both.merge(&state(&pair[1]));
        assert_eq!(got[0], pair[0][0].max(pair[1][0]));
        for (got, want, parts) in [(got[1], both.sum[0], 1), (got[2], both.out[0], 2)] {
            // Relative to what was added: signs may cancel.
            let size = pair[0][parts].abs() + pair[1][parts].abs();
            assert!((got - want).abs() <= 1e-5 * size, "{got} {want} of {pair:?}");
        }
    }
}

#[test]
fn ranks_are_in_the_order_of_their_numbers() {
    let host = Host::new(3, 128);
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let mut x: Vec<f32> = (0..1000).map(|_| f32::from_bits(rng.random())).filter(|x| x.is_finite()).collect();
    x.extend([0.0, f32::MIN_POSITIVE, -f32::MIN_POSITIVE, 65504.0, -65504.0, f32::MAX, f32::MIN]);
    x.sort_by(f32::total_cmp);
    x.dedup();
    let ranks = host.run::<f32, u32>("ranks", &x);
    assert!(ranks.is_sorted_by(|a, b| a < b));
    // Both zeros share a rank.
    let zeros = host.run::<f32, u32>("ranks", &[0.0, -0.0]);
    assert_eq!(zeros[0], zeros[1]);
}
