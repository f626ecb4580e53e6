//! Dense f32 products on strided slices, by the `gemm` crate, which picks its kernels at run time.

use gemm::Parallelism;

/// The last element that a strided m x n view touches, plus one.
fn extent(m: usize, n: usize, rs: usize, cs: usize) -> usize {
    if m == 0 || n == 0 { 0 } else { (m - 1) * rs + (n - 1) * cs + 1 }
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
    assert!(extent(m, k, a_rs, a_cs) <= a.len(), "a reaches beyond its slice");
    assert!(extent(k, n, b_rs, b_cs) <= b.len(), "b reaches beyond its slice");
    assert!(extent(m, n, c_rs, 1) <= c.len() && (m <= 1 || c_rs >= n), "c reaches beyond its slice or overlaps itself");
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
    #[should_panic(expected = "beyond its slice")]
    fn a_short_slice_is_refused() {
        gemm(2, 2, 2, 1.0, &[0.0; 3], 2, 1, &[0.0; 4], 2, 1, 0.0, &mut [0.0; 4], 2, 1);
    }
}
