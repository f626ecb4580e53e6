//! Instructions of aarch64 for which the oldest supported compiler has no intrinsic, or none that inlines where the
//! feature is chosen by a const argument.

use std::arch::aarch64::*;
use std::arch::asm;

/// sums + 4 dot products of 4 signed bytes each.
///
/// # Safety
/// The CPU has NEON, and the dot product extension where DOT.
#[inline(always)]
pub(crate) unsafe fn dot<const DOT: bool>(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; the instruction touches registers only.
    unsafe {
        if DOT {
            asm!(
                ".arch_extension dotprod",
                "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                inout(vreg) sums, in(vreg) a, in(vreg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
            sums
        } else {
            let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
            let high = vmull_high_s8(a, b);
            vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
        }
    }
}

/// x + a * b, or x - a * b where MINUS, of fractions of 2^15, the product rounded; in one instruction where RDM.
///
/// # Safety
/// The CPU has NEON, and rounding doubling multiplication (RDM) where RDM.
#[inline(always)]
pub(crate) unsafe fn add_fraction<const RDM: bool, const MINUS: bool>(
    mut x: int16x8_t,
    a: int16x8_t,
    b: int16x8_t,
) -> int16x8_t {
    // SAFETY: the caller's promise; the instructions touch registers only.
    unsafe {
        match (RDM, MINUS) {
            (true, false) => {
                asm!(
                    ".arch_extension rdma",
                    "sqrdmlah {0:v}.8h, {1:v}.8h, {2:v}.8h",
                    inout(vreg) x, in(vreg) a, in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags)
                );
                x
            }
            (true, true) => {
                asm!(
                    ".arch_extension rdma",
                    "sqrdmlsh {0:v}.8h, {1:v}.8h, {2:v}.8h",
                    inout(vreg) x, in(vreg) a, in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags)
                );
                x
            }
            (false, false) => vaddq_s16(x, vqrdmulhq_s16(a, b)),
            (false, true) => vsubq_s16(x, vqrdmulhq_s16(a, b)),
        }
    }
}

/// Four fp16 values as f32.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
pub(crate) unsafe fn four_halves(bits: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: part of NEON; registers only.
    unsafe {
        asm!(
            "fcvtl {0:v}.4s, {1:v}.4h",
            out(vreg) out, in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    out
}
