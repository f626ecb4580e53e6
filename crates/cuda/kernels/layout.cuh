// Where codes and outliers lie, and the small mathematics that the kernels share with the CPU. This file also compiles
// as host C++, where it is compared with the Rust code; so it knows nothing of warps.
//
// A unit is one KV head's keys or values in a block of 64 tokens: 64 * DIM codes of BITS bits. It is cut into tiles, each the
// first operand of one matrix instruction: 16 rows x 32 columns, 4 registers of 4 codes a lane. Tiles go two by two: a lane
// has BITS words of each two.
//
//   byte of a unit     | j = 0: lane 0 .. lane 31, 16 bytes each | j = 1: .. | ... | j = DIM * BITS / 64 - 1 |
//   a lane's stream    its 16-byte pieces, j = 0, 1, ..: BITS words for tiles 0 and 1, BITS words for tiles 2 and 3, ..
//
//   lane = 4 * g + q           g in 0..8, q in 0..4; code n = 4 * register + byte of a tile
//   keys     rows are tokens, columns channels: tile = token / 32 * (DIM / 16) + channel / 32 * 2 + token / 16 % 2, g = token % 8,
//            q = pair / 2 % 4, register = pair / 8 % 2 * 2 + token / 8 % 2, byte = channel % 2 * 2 + pair % 2; pair = channel / 2
//   values   rows are channels, columns tokens: tile = channel / 16 * 2 + token / 8 % 2, g = channel % 8,
//            q = token / 16, register = token / 4 % 2 * 2 + channel / 8 % 2, byte = token % 4
//
// Within the words of two tiles every code has a nibble, where a byte permutation reads it:
//
//   2 bits   tile t is word t: codes 0 to 7 are the low halves of its nibbles, 8 to 15 the high halves
//   3 bits   codes 0 to 7 and 8 to 15 of the even tile and 0 to 7 of the odd one are the low three bits of the nibbles of
//            words 0, 1, 2; bit k of codes 8 to 15 of the odd tile are the nibbles' top bits of word k
//   4 bits   half h of tile t is word 2 t + h. Values: code i is nibble i. Keys: so are its low three bits, but the top bits of
//            codes 0 to 3 are bits 7, 15, 23, 31, those of codes 4 to 7 bits 3, 11, 19, 27: a byte's sign makes a mask
//
// An outlier is a word: residual (fp16) << 16 | (channel / 2 + channel % 2 * DIM / 2) << 6 | token.
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

// Code n of a tile, of a lane.
struct Spot {
  u32 lane, tile, n;
};

FN Spot key_spot(u32 channel, u32 token) {
  u32 pair = channel / 2;
  return {token % 8 * 4 + pair / 2 % 4, token / 32 * (DIM / 16) + channel / 32 * 2 + token / 16 % 2,
          (pair / 8 % 2 * 2 + token / 8 % 2) * 4 + channel % 2 * 2 + pair % 2};
}

FN Spot value_spot(u32 channel, u32 token) {
  return {channel % 8 * 4 + token / 16, channel / 16 * 2 + token / 8 % 2,
          (token / 4 % 2 * 2 + channel / 8 % 2) * 4 + token % 4};
}

// The byte of a unit at which a word of a lane's stream begins.
FN u32 word_byte(u32 lane, u32 word) { return word / 4 * 512 + lane * 16 + word % 4 * 4; }

// Where the top bit of code i of a word lies, at 4 bits.
FN u32 top_bit(u32 side, u32 i) { return side ? 4 * i + 3 : i < 4 ? 8 * i + 7 : 8 * i - 29; }

// Adds a code's bits to the words of two tiles, which have none of them yet; `tile` is 0 or 1, `side` 0 for keys.
FN void put_code(u32* w, u32 side, u32 tile, u32 n, u32 code) {
  u32 i = n % 8;
#if BITS == 2
  w[tile] |= code << (4 * i + n / 8 * 2);
#elif BITS == 3
  u32 m = tile * 2 + n / 8;
  if (m < 3) w[m] |= code << 4 * i;
  else {
    w[0] |= (code & 1) << (4 * i + 3);
    w[1] |= (code >> 1 & 1) << (4 * i + 3);
    w[2] |= (code >> 2 & 1) << (4 * i + 3);
  }
#else
  u32 m = tile * 2 + n / 8;
  w[m] |= (code & 7) << 4 * i | code >> 3 << top_bit(side, i);
#endif
}

FN u32 get_code(const u8* unit, u32 side, Spot s) {
  u32 i = s.n % 8, first = s.tile / 2 * BITS, tile = s.tile % 2;
#define WORD(m) (*(const u32*)(unit + word_byte(s.lane, first + (m))))
#if BITS == 2
  return WORD(tile) >> (4 * i + s.n / 8 * 2) & 3;
#elif BITS == 3
  u32 m = tile * 2 + s.n / 8, top = 4 * i + 3;
  if (m < 3) return WORD(m) >> 4 * i & 7;
  return (WORD(0) >> top & 1) | (WORD(1) >> top & 1) << 1 | (WORD(2) >> top & 1) << 2;
#else
  u32 w = WORD(tile * 2 + s.n / 8);
  return (w >> 4 * i & 7) | (w >> top_bit(side, i) & 1) << 3;
#endif
#undef WORD
}

FN u32 outlier_word(u32 channel, u32 token, u16 residual) {
  return (u32)residual << 16 | (channel / 2 + channel % 2 * (DIM / 2)) << 6 | token;
}
FN u32 outlier_token(u32 e) { return e & 63; }
// The pair, and whether it is y; their order is that of sums of outliers.
FN u32 outlier_pair(u32 e) { return e >> 6 & (DIM / 2 - 1); }
FN u32 outlier_is_y(u32 e) { return e & DIM * 32; }
FN u32 outlier_place(u32 e) { return e >> 6 & (DIM - 1); }
FN u32 outlier_channel(u32 e) { return outlier_pair(e) * 2 + (outlier_is_y(e) != 0); }

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
