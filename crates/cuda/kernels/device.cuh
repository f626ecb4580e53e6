// What the kernels share and only a GPU has. No header of a toolkit is needed: NVRTC compiles this with nothing installed.
#define WARP 0xffffffffu
#define NONE (-3.4e38f)

template <int N> struct Constant {
  static constexpr int value = N;
};

FN u32 lane_id() { return threadIdx.x % 32; }

FN float half_float(u32 bits) {
  float f;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(bits));
  return f;
}
FN float low_float(u32 h2) { return half_float(h2 & 0xffff); }
FN float high_float(u32 h2) { return half_float(h2 >> 16); }
FN u32 float_half(float f) {
  u32 r;
  asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(r) : "f"(f));
  return r;
}
FN u32 pack_halves(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
FN u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
FN u32 mul2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
FN u32 neg2(u32 a) {
  u32 r;
  asm("neg.f16x2 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}
FN float power2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
FN float logarithm2(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
FN float root(float x) {
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
FN void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
FN u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
FN void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
FN void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> FN void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// What comes next in the queue may take room on the card from now on, if the host allowed it; it must wait all the same.
FN void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// All that came before in the queue is done and can be read.
FN void wait_for_former() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
FN float warp_max(float x) {
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(WARP, x, i));
  return x;
}
// The same for numbers that are not NaN, in one instruction for all lanes.
FN float warp_max_ordered(float x) {
  int i = __float_as_int(x);
  i = __reduce_max_sync(WARP, i ^ (i >> 31 & 0x7fffffff));
  return __int_as_float(i ^ (i >> 31 & 0x7fffffff));
}
FN float warp_sum(float x) {
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(WARP, x, i);
  return x;
}
// 2^k as a float, k brought into range.
FN float exponent(int k) { return __int_as_float((max(-126, min(127, k)) + 127) << 23); }
// 1 / x for a power of two; 0 where that would be too small.
FN float inverse_exponent(float x) { return __uint_as_float((254u << 23) - __float_as_uint(x)); }
FN int exponent_of(float x) { return (int)(__float_as_uint(x) >> 23 & 255) - 127; }

// One sequence's part of a layer, as the host fills it in.
struct Sequence {
  const u32* table;    // block numbers, oldest first
  const u32* arena;    // outliers of full blocks
  const u32* open;     // outliers of the last block while it is not full: [kv_heads][2][OPEN_OUTLIERS]
  const u16* exact;    // [2][kv_heads][exact_capacity][DIM] fp16 rows before the first block, keys turned
  u32 blocks;          // entries of the table
  u32 last;            // tokens of the last block, 1 to 64
  u32 exact_rows;
  u32 exact_capacity;
};
#define OPEN_OUTLIERS (DIM * 16)
#define IN_OPEN 0x80000000u

FN const u32* outliers_of(const Sequence& s, u32 start) {
  return start & IN_OPEN ? s.open + (start & ~IN_OPEN) : s.arena + start;
}

// A block: [kv_heads][keys, values] units, [kv_heads] headers, [64] scales.
//   header   {start, count | greatest |residual| (fp16) << 16} for keys, then for values
//   scale    fp16 scale | fp16 zero << 16, of a token's values
FN u64 unit_at(u32 head, u32 side) { return (u64)(head * 2 + side) * UNIT_BYTES; }
FN u64 header_at(u32 heads, u32 head) { return (u64)heads * 2 * UNIT_BYTES + head * 16; }
FN u64 scales_at(u32 heads) { return (u64)heads * (2 * UNIT_BYTES + 16); }
FN u64 block_bytes(u32 heads) { return scales_at(heads) + 256; }
