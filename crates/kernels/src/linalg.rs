//! Dense f32 products on slices (row-major), threaded with rayon.
/// c[m,n] = alpha * op(a) op(b) + beta * c. Strides in elements: a[i,k] = a[i*a_rs + k*a_cs], b[k,j] = b[k*b_rs + j*b_cs], c row-major with row stride c_rs. `threads` = 1 keeps it on the caller's thread.
pub fn gemm(_m: usize, _n: usize, _k: usize, _alpha: f32, _a: &[f32], _a_rs: usize, _a_cs: usize, _b: &[f32], _b_rs: usize, _b_cs: usize, _beta: f32, _c: &mut [f32], _c_rs: usize, _threads: usize) { todo!() }
