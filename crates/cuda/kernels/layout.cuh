// Where codes and outliers lie, and the small mathematics that the kernels share with the CPU. This file also compiles
// as host C++ (tests/host.rs), where it is compared with the Rust code; so it knows nothing of warps.
//
// A unit is one KV head's keys or values in a block of 64 tokens: 64 * DIM codes of BITS bits. Each lane of a warp owns
// 2 * DIM of them, exactly the operands of the matrix instructions that this lane feeds, as one stream of bits:
//
//   byte of a unit     | j = 0: lane 0 .. lane 31, 16 bytes each | j = 1: .. | ... | j = DIM * BITS / 64 - 1 |
//   a lane's stream    its 16-byte pieces, j = 0, 1, ..: groups of BITS words, one group for each 16 channels
//   a group            16 operands n of two codes: the code at bit 2 * BITS * n is the low half, the next the high half
//
//   lane = 4 * g + q           g in 0..8, q in 0..4
//   keys     group = channel / 16, q = channel % 16 / 4, g = token % 8; operand n = token / 16 * 4 + token / 8 % 2 * 2 + y
//            y = channel % 2 (x or y of the RoPE pair), half = channel / 2 % 2: one operand holds x or y of two pairs
//   values   group = channel / 16, g = channel % 8, q = token / 16; operand n = token / 4 % 4 * 4 + token / 2 % 2 * 2 + r
//            r = channel / 8 % 2, half = token % 2
//
// An outlier is a word: residual (fp16) << 16 | channel << 6 | token.
// BITS and DIM come from the compiler's command line.
#ifdef __CUDACC__
#define FN __device__ __forceinline__
#else
#define FN static inline
#endif
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define UNIT_BYTES (DIM * 8 * BITS)

struct Spot {
  u32 lane, bit;
};

FN Spot key_spot(u32 channel, u32 token) {
  u32 n = token / 16 * 4 + token / 8 % 2 * 2 + channel % 2;
  return {token % 8 * 4 + channel % 16 / 4, (channel / 16 * 16 + n) * 2 * BITS + channel / 2 % 2 * BITS};
}

FN Spot value_spot(u32 channel, u32 token) {
  u32 n = token / 4 % 4 * 4 + token / 2 % 2 * 2 + channel / 8 % 2;
  return {channel % 8 * 4 + token / 16, (channel / 16 * 16 + n) * 2 * BITS + token % 2 * BITS};
}

// The byte of a unit at which a word of a lane's stream begins.
FN u32 word_byte(u32 lane, u32 word) { return word / 4 * 512 + lane * 16 + word % 4 * 4; }

FN u32 get_code(const u8* unit, Spot s) {
  u32 word = s.bit / 32, shift = s.bit % 32;
  u32 low = *(const u32*)(unit + word_byte(s.lane, word)) >> shift;
  if (shift + BITS > 32) low |= *(const u32*)(unit + word_byte(s.lane, word + 1)) << (32 - shift);
  return low & ((1u << BITS) - 1);
}

FN u32 outlier_word(u32 channel, u32 token, u16 residual) { return (u32)residual << 16 | channel << 6 | token; }
FN u32 outlier_token(u32 e) { return e & 63; }
FN u32 outlier_channel(u32 e) { return e >> 6 & 255; }

// One pair turned forward: products and sums rounded one by one.
FN void turn_pair(float x, float y, float c, float s, float* tx, float* ty) {
#ifdef __CUDACC__
  *tx = __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
  *ty = __fadd_rn(__fmul_rn(x, s), __fmul_rn(y, c));
#else
  float xc = x * c, ys = y * s, xs = x * s, yc = y * c;
  *tx = xc - ys;
  *ty = xs + yc;
#endif
}

// What two states' sums are multiplied with when they merge under a common maximum (scores in units of log2 e).
FN void merge_factors(float m0, float m1, float* m, float* f0, float* f1) {
  *m = m0 > m1 ? m0 : m1;
  bool none = *m < -3.0e38f;
#ifdef __CUDACC__
  *f0 = none ? 0.0f : exp2f(m0 - *m);
  *f1 = none ? 0.0f : exp2f(m1 - *m);
#else
  *f0 = none ? 0.0f : __builtin_exp2f(m0 - *m);
  *f1 = none ? 0.0f : __builtin_exp2f(m1 - *m);
#endif
}

// Places of an f32 in the order of its value; both zeros share one.
FN u32 rank_of(float x) {
  union {
    float f;
    u32 u;
  } v = {x + 0.0f};
  return v.u >> 31 ? ~v.u : v.u | 0x80000000u;
}

// The code of x: how many bounds lie below it.
FN u32 code_of(float x, const float* bounds, u32 stride) {
  u32 code = 0;
  for (int m = 0; m < (1 << BITS) - 1; m++) code += x > bounds[m * stride];
  return code;
}
