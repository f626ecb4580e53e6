//! Dense f32 products on strided slices, by the `gemm` crate, which picks its kernels at run time; with
//! `KVQUANT_KERNEL=scalar`, by plain loops.

use gemm::Parallelism;

use crate::dispatch::{self, Isa};

/// The last element that a strided m x n view touches, plus one.
fn extent(m: usize, n: usize, rs: usize, cs: usize) -> Option<usize> {
    if m == 0 || n == 0 {
        return Some(0);
    }
    (m - 1).checked_mul(rs)?.checked_add((n - 1).checked_mul(cs)?)?.checked_add(1)
}

fn fits(m: usize, n: usize, rs: usize, cs: usize, len: usize) -> bool {
    extent(m, n, rs, cs).is_some_and(|end| end <= len)
}

/// c = alpha a b + beta c, with a `[m, k]`, b `[k, n]`, c `[m, n]`.
///
/// Strides count elements: a(i, p) = a[i * a_rs + p * a_cs], b(p, j) = b[p * b_rs + j * b_cs], and the columns of c are
/// next to each other. `threads` of 1 stays on the caller's thread; 0 takes all.
///
/// # Panics
/// A view reaches beyond its slice.
pub fn gemm(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    a_rs: usize,
    a_cs: usize,
    b: &[f32],
    b_rs: usize,
    b_cs: usize,
    beta: f32,
    c: &mut [f32],
    c_rs: usize,
    threads: usize,
) {
    assert!(fits(m, k, a_rs, a_cs, a.len()), "a reaches beyond its slice");
    assert!(fits(k, n, b_rs, b_cs, b.len()), "b reaches beyond its slice");
    assert!(fits(m, n, c_rs, 1, c.len()) && (m <= 1 || c_rs >= n), "c reaches beyond its slice or overlaps itself");
    // An override that this CPU can't follow is refused where weights are loaded; here it only has to be safe.
    if k == 0 || dispatch::isa().unwrap_or(Isa::Scalar) == Isa::Scalar {
        return plain(m, n, k, alpha, a, a_rs, a_cs, b, b_rs, b_cs, beta, c, c_rs);
    }
    let parallelism = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    // SAFETY: the three views lie inside their slices (asserted above), and rows of c do not overlap; `c` is
    // borrowed mutably, so that it overlaps neither `a` nor `b`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_rs as isize,
            beta != 0.0,
            a.as_ptr(),
            a_cs as isize,
            a_rs as isize,
            b.as_ptr(),
            b_cs as isize,
            b_rs as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The twin: a row of c gains a multiple of each row of b.
fn plain(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    a_rs: usize,
    a_cs: usize,
    b: &[f32],
    b_rs: usize,
    b_cs: usize,
    beta: f32,
    c: &mut [f32],
    c_rs: usize,
) {
    if n == 0 {
        return;
    }
    for i in 0..m {
        let row = &mut c[i * c_rs..][..n];
        if beta == 0.0 {
            row.fill(0.0);
        } else {
            row.iter_mut().for_each(|x| *x *= beta);
        }
        for p in 0..k {
            let x = alpha * a[i * a_rs + p * a_cs];
            if b_cs == 1 {
                for (to, y) in row.iter_mut().zip(&b[p * b_rs..][..n]) {
                    *to += x * y;
                }
            } else {
                for (j, to) in row.iter_mut().enumerate() {
                    *to += x * b[p * b_rs + j * b_cs];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_and_scales_are_followed() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..20).map(|i| (i % 7) as f32).collect();
        for (a_rs, a_cs, b_rs, b_cs) in [(4, 1, 5, 1), (1, 3, 1, 4)] {
            let mut c = vec![1.0; 3 * 6];
            gemm(3, 5, 4, 0.5, &a, a_rs, a_cs, &b, b_rs, b_cs, 2.0, &mut c, 6, 1);
            for i in 0..3 {
                for j in 0..5 {
                    let want: f32 =
                        (0..4).map(|p| a[i * a_rs + p * a_cs] * b[p * b_rs + j * b_cs]).sum::<f32>() * 0.5 + 2.0;
                    assert_eq!(c[i * 6 + j], want);
                }
                assert_eq!(c[i * 6 + 5], 1.0, "what lies between rows is left alone");
            }
        }
    }

    #[test]
    fn the_twin_agrees_at_edges_of_tiles() {
        const RTOL: f32 = 1e-6;
        let x: Vec<f32> = (0..9000).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect();
        for (m, n, k) in [(1, 1, 1), (7, 17, 33), (33, 5, 64), (48, 50, 3), (3, 4, 0), (0, 3, 4), (3, 0, 4)] {
            for (b_rs, b_cs) in [(n, 1), (1, k)] {
                for beta in [0.0, 1.0] {
                    let (mut got, mut want) = (x[..m * n].to_vec(), x[..m * n].to_vec());
                    gemm(m, n, k, 0.7, &x, k, 1, &x[100..], b_rs, b_cs, beta, &mut got, n, 2);
                    plain(m, n, k, 0.7, &x, k, 1, &x[100..], b_rs, b_cs, beta, &mut want, n);
                    for (got, want) in got.iter().zip(&want) {
                        assert!((got - want).abs() <= RTOL * (k + 1) as f32, "{m} {n} {k}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "beyond its slice")]
    fn strides_that_overflow_are_refused() {
        gemm(3, 2, 2, 1.0, &[0.0; 3], usize::MAX / 2 + 1, 1, &[0.0; 4], 2, 1, 0.0, &mut [0.0; 6], 2, 1);
    }

    #[test]
    #[should_panic(expected = "beyond its slice")]
    fn a_short_slice_is_refused() {
        gemm(2, 2, 2, 1.0, &[0.0; 3], 2, 1, &[0.0; 4], 2, 1, 0.0, &mut [0.0; 4], 2, 1);
    }
}
