// Codes to signposts in registers: a byte permutation reads up to 8 entries, four codes at a time. Signposts are
// integers of 8 bits, -127 to 127, times a unit that the host folds into scales.

FN u32 permute(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// 2^BITS signposts, four a register.
struct Signposts {
  u32 of[BITS == 4 ? 4 : BITS - 1];
};

FN Signposts load_signposts(const u32* table) {
  Signposts s;
#pragma unroll
  for (int i = 0; i < (int)(sizeof s.of / 4); i++) s.of[i] = table[i];
  return s;
}

// The first operands of two tiles: r[tile][register], from a lane's BITS words (layout.cuh). At 4 bits: of keys.
FN void look_up(const u32* w, const Signposts& s, u32 (*r)[4]) {
#if BITS == 2
#pragma unroll
  for (int t = 0; t < 2; t++) {
    const u32 x = w[t] & 0x33333333, y = w[t] >> 2 & 0x33333333;
    r[t][0] = permute(s.of[0], s.of[0], x), r[t][1] = permute(s.of[0], s.of[0], x >> 16);
    r[t][2] = permute(s.of[0], s.of[0], y), r[t][3] = permute(s.of[0], s.of[0], y >> 16);
  }
#elif BITS == 3
  u32 x[4];
#pragma unroll
  for (int m = 0; m < 3; m++) x[m] = w[m] & 0x77777777;
  x[3] = w[0] >> 3 & 0x11111111 | w[1] >> 2 & 0x22222222 | w[2] >> 1 & 0x44444444;
#pragma unroll
  for (int m = 0; m < 4; m++) {
    r[m / 2][m % 2 * 2] = permute(s.of[0], s.of[1], x[m]);
    r[m / 2][m % 2 * 2 + 1] = permute(s.of[0], s.of[1], x[m] >> 16);
  }
#else
#pragma unroll
  for (int m = 0; m < 4; m++) {
    const u32 x = w[m] & 0x77777777;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 v = i ? w[m] << 4 : w[m], at = i ? x >> 16 : x;
      const u32 upper = permute(v, v, 0xba98);  // each byte's sign, eight times
      const u32 a = permute(s.of[0], s.of[1], at), b = permute(s.of[2], s.of[3], at);
      r[m / 2][m % 2 * 2 + i] = (a & ~upper) | (b & upper);
    }
  }
#endif
}

#if BITS == 4
// Values: the sum of two operands. A nibble's top bit makes a permutation repeat the entry's sign, 0 or -1, in one
// table or in the other; the host made up for that in both.
FN void look_up_both(const u32* w, const Signposts& s, u32 (*r)[4], u32 (*q)[4]) {
#pragma unroll
  for (int m = 0; m < 4; m++) {
    const u32 x = w[m], y = w[m] ^ 0x88888888;
    r[m / 2][m % 2 * 2] = permute(s.of[0], s.of[1], x), r[m / 2][m % 2 * 2 + 1] = permute(s.of[0], s.of[1], x >> 16);
    q[m / 2][m % 2 * 2] = permute(s.of[2], s.of[3], y), q[m / 2][m % 2 * 2 + 1] = permute(s.of[2], s.of[3], y >> 16);
  }
}
#endif

// Signposts plus 128, as `halves_of` takes them.
FN Signposts biased(const Signposts& s) {
  Signposts b;
#pragma unroll
  for (int i = 0; i < (int)(sizeof s.of / 4); i++) b.of[i] = s.of[i] ^ 0x80808080;
  return b;
}

// Bytes 0 and 1, or 2 and 3, of four biased signposts as halves, times 2^-7.
template <int HIGH> FN u32 halves_of(u32 posts) {
  // 0x6400 | u is 1024 + u; u = signpost + 128.
  return fma2(permute(posts, 0x64646464, HIGH ? 0x4342 : 0x4140), 0x20002000, 0xc880c880);
}

FN void mma_signed(int* d, const u32* a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FN void mma_unsigned(int* d, const u32* a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
