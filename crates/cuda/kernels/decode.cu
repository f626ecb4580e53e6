// One query token against a compressed history: flash-decoding, a warp takes whole blocks and needs no other warp until
// the end.
//
// Keys:   codes -> (table in shared memory, a copy for each lane) fp16 signposts of two channels -> * scale + zero
//         -> turned by the place in the block -> mma: 16 tokens x 16 channels times 16 channels x 8 query heads
// Values: codes -> signposts of two tokens -> mma: 16 channels x 16 tokens times 16 tokens x 8 heads' weights
// The query is turned back to the block's origin; a value's scale multiplies its weight, its zero point a sum.
// Weights are at most 2^14 in fp16: the running maximum is over score and score + log2(scale).
// Outliers: one lane each, added as integers (shared memory adds those in one instruction) under a power of two that
// no sum of the unit can overflow.

#define REPLICAS (BITS == 2 ? 16 : 32)
#define LUT_BYTES (BITS == 3 ? 8192 : 32768)
#define LUT_ENTRIES (LUT_BYTES / 128)
#define TURN_BYTES (DIM * 128)
#define LUT_KEYS 0
#define LUT_VALUES LUT_BYTES
#define TURN (2 * LUT_BYTES)
#define UNITS_SZ (TURN + TURN_BYTES)
#define QUERIES (UNITS_SZ + DIM * 4)
#define REACH (QUERIES + GROUP * DIM * 4)
#define WARP_PARTS (REACH + 32)
// of a warp
#define NEAR_OUTLIERS 128
#define KEY_CODES 0
#define KEY_OUTLIERS (KEY_CODES + UNIT_BYTES)
#define VALUE_CODES (KEY_OUTLIERS + NEAR_OUTLIERS * 4)
#define SCALES (VALUE_CODES + UNIT_BYTES)
#define VALUE_OUTLIERS (SCALES + 256)
#define SCORES (VALUE_OUTLIERS + NEAR_OUTLIERS * 4)
#define KEY_SUMS (SCORES + GROUP * 256)
#define WEIGHTS (KEY_SUMS + GROUP * 256)
#define VALUE_SUMS (WEIGHTS + GROUP * 128)
#define VALUE_EXTRA (VALUE_SUMS + GROUP * DIM * 4)
#define LOCAL_QUERY (VALUE_EXTRA + GROUP * DIM * 4)
#define FACTORS (LOCAL_QUERY + GROUP * DIM * 2)
#define WARP_BYTES (FACTORS + 64)
static_assert(WARP_PARTS + WARPS * WARP_BYTES == SHARED, "the host counts as we do");

struct DecodeArgs {
  const u8* pool;
  const Sequence* sequences;
  const float* q;          // [sequences][heads][DIM], turned, times log2(e) / sqrt(DIM)
  const float4* origins;   // [blocks][DIM / 4]: cos, sin, cos, sin of the first position of each block
  const uint4* turn;       // [DIM / 16][4][32]: cos, sin of token g + 16 m, then of token g + 16 m + 8; two pairs each
  const u32* key_lut;
  const u32* value_lut;
  const uint4* units;      // [kv_heads][DIM / 4]: scale x, zero x, scale y, zero y; two pairs each
  float* out;              // [sequences][heads][splits][DIM]
  float* sums;             // [sequences][heads][splits][2]: maximum, sum
  u32 heads, kv_heads, splits, passes;
};

// Two codes' signposts for operand N of a group; for 2 bits also those of operand N + 1.
template <int N> FN void look_up(const u8* lut, const u32* w, u32 lane_part, u32& a, u32& b) {
#if BITS == 2
  constexpr int at = N * 4 - 7;
  u32 v = at < 0 ? w[0] << -at : w[N / 8] >> (at % 32 < 0 ? 0 : at % 32);
  if (N == 8) v = __funnelshift_r(w[0], w[1], 25);
  const uint2 e = *(const uint2*)(lut + ((v & 0xff << 7) | lane_part));
  a = e.x, b = e.y;
#else
  constexpr u32 mask = ((1u << 2 * BITS) - 1) << 7;
  auto one = [&](int n) {
    int at = n * 2 * BITS - 7;
    u32 v;
    if (at < 0) v = w[0] << -at;
    else if (at % 32 + 7 + 2 * BITS <= 32) v = w[at / 32] >> at % 32;
    else v = __funnelshift_r(w[at / 32], w[at / 32 + 1 < BITS ? at / 32 + 1 : 0], at % 32);
    return *(const u32*)(lut + ((v & mask) | lane_part));
  };
  a = one(N), b = one(N + 1);
#endif
}

struct Header {
  u32 start[2], count[2];
  float reach[2];
};

FN Header unpack_header(uint4 h) {
  Header r;
  r.start[0] = h.x, r.count[0] = h.y & 0xffff, r.reach[0] = high_float(h.y);
  r.start[1] = h.z, r.count[1] = h.w & 0xffff, r.reach[1] = high_float(h.w);
  return r;
}

FN const u32* outliers_of(const Sequence& s, u32 start) {
  return start & IN_OPEN ? s.open + (start & ~IN_OPEN) : s.arena + start;
}

FN void fetch_codes(u8* to, const u8* unit, u32 lane) {
#pragma unroll
  for (int j = 0; j < DIM * BITS / 64; j++) copy16(to + j * 512 + lane * 16, unit + j * 512 + lane * 16);
}

FN void fetch_outliers(u8* to, const u32* list, u32 count, u32 lane) {
  if (lane * 4 < count) copy16(to + lane * 16, list + lane * 4);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) decode(const DecodeArgs a) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, tq = lane % 4;
  const u32 kv_head = blockIdx.y / a.passes, split = blockIdx.x, seq = blockIdx.z;
  const u32 first_head = kv_head * a.passes * GROUP + blockIdx.y % a.passes * GROUP;
  const Sequence s = a.sequences[seq];

  for (u32 i = threadIdx.x; i < LUT_ENTRIES * REPLICAS; i += WARPS * 32) {
#if BITS == 2
    ((uint2*)(shared + LUT_KEYS))[i] = ((const uint2*)a.key_lut)[i / REPLICAS];
    ((uint2*)(shared + LUT_VALUES))[i] = ((const uint2*)a.value_lut)[i / REPLICAS];
#else
    ((u32*)(shared + LUT_KEYS))[i] = a.key_lut[i / REPLICAS];
    ((u32*)(shared + LUT_VALUES))[i] = a.value_lut[i / REPLICAS];
#endif
  }
  for (u32 i = threadIdx.x; i < TURN_BYTES / 16; i += WARPS * 32) ((uint4*)(shared + TURN))[i] = a.turn[i];
  for (u32 i = threadIdx.x; i < DIM / 4; i += WARPS * 32) ((uint4*)(shared + UNITS_SZ))[i] = a.units[kv_head * (DIM / 4) + i];
  for (u32 i = threadIdx.x; i < GROUP * DIM; i += WARPS * 32)
    ((float*)(shared + QUERIES))[i] = a.q[((u64)seq * a.heads + first_head) * DIM + i];
  __syncthreads();
  if (warp < GROUP) {
    // No turn makes a channel of a pair greater than this.
    float reach = 0;
    const float2* q = (const float2*)(shared + QUERIES) + warp * (DIM / 2);
    for (u32 i = lane; i < DIM / 2; i += 32) reach += 2 * sqrtf(q[i].x * q[i].x + q[i].y * q[i].y);
    reach = warp_sum(reach);
    if (lane == 0) ((float*)(shared + REACH))[warp] = reach;
  }
  if (WARPS < GROUP)
    for (u32 h = WARPS + warp; h < GROUP; h += WARPS) {
      float reach = 0;
      const float2* q = (const float2*)(shared + QUERIES) + h * (DIM / 2);
      for (u32 i = lane; i < DIM / 2; i += 32) reach += 2 * sqrtf(q[i].x * q[i].x + q[i].y * q[i].y);
      reach = warp_sum(reach);
      if (lane == 0) ((float*)(shared + REACH))[h] = reach;
    }
  __syncthreads();

  u8* const own = shared + WARP_PARTS + warp * WARP_BYTES;
  float* const scores = (float*)(own + SCORES);
  int* const key_sums = (int*)(own + KEY_SUMS);
  u32* const weights = (u32*)(own + WEIGHTS);
  int* const value_sums = (int*)(own + VALUE_SUMS);
  float* const extra = (float*)(own + VALUE_EXTRA);
  u32* const local = (u32*)(own + LOCAL_QUERY);
  float* const factors = (float*)(own + FACTORS);
  const float* const queries = (const float*)(shared + QUERIES);

  float top[GROUP], sum[GROUP], zeros[GROUP], o[DIM / 16][4];
#pragma unroll
  for (int h = 0; h < GROUP; h++) top[h] = NONE, sum[h] = 0, zeros[h] = 0;
#pragma unroll
  for (int i = 0; i < DIM / 16; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
  for (u32 i = lane; i < GROUP * DIM; i += 32) extra[i] = 0, value_sums[i] = 0;
  __syncwarp();

  const u64 stride = block_bytes(a.kv_heads), header_from = header_at(a.kv_heads, kv_head);
  const u32 each = (s.blocks + a.splits - 1) / a.splits;
  const u32 from = min(s.blocks, split * each) + warp, to = min(s.blocks, split * each + each);
  const u32 wide = lane % REPLICAS * (128 / REPLICAS);
  uint4 raw_next = make_uint4(0, 0, 0, 0);
  const u8* block_next = a.pool;
  float4 turn_next[(DIM + 127) / 128];
  auto look_ahead = [&](u32 b) {
    if (b < to) {
      block_next = a.pool + s.table[b] * stride;
      raw_next = *(const uint4*)(block_next + header_from);
#pragma unroll
      for (int j = 0; j < (DIM + 127) / 128; j++)
        if (lane + 32 * j < DIM / 4) turn_next[j] = a.origins[(u64)b * (DIM / 4) + lane + 32 * j];
    }
  };
  auto fetch_keys = [&](const u8* block, const Header& h) {
    fetch_codes(own + KEY_CODES, block + unit_at(kv_head, 0), lane);
    fetch_outliers(own + KEY_OUTLIERS, outliers_of(s, h.start[0]), h.count[0], lane);
  };
  auto fetch_values = [&](const u8* block, const Header& h) {
    fetch_codes(own + VALUE_CODES, block + unit_at(kv_head, 1), lane);
    if (lane < 16) copy16(own + SCALES + lane * 16, block + scales_at(a.kv_heads) + lane * 16);
    fetch_outliers(own + VALUE_OUTLIERS, outliers_of(s, h.start[1]), h.count[1], lane);
  };

  look_ahead(from);
  Header head = unpack_header(raw_next);
  if (from < to) fetch_keys(block_next, head);
  copy_commit();
  if (from < to) fetch_values(block_next, head);
  copy_commit();

  // The exact rows before the first block.
  if (split == 0)
    for (u32 r = warp; r < s.exact_rows; r += WARPS) {
      constexpr int N = DIM / 32;
      const u16* key = s.exact + ((u64)kv_head * s.exact_capacity + r) * DIM + lane * N;
      const u16* value = key + (u64)a.kv_heads * s.exact_capacity * DIM;
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        float x = 0;
#pragma unroll
        for (int i = 0; i < N; i++) x += queries[h * DIM + lane * N + i] * half_float(key[i]);
        x = warp_sum(x);
        float m = fmaxf(top[h], x), f = power2(top[h] - m), p = power2(x - m);
        top[h] = m;
        sum[h] = sum[h] * f + (lane == 0 ? p : 0);
#pragma unroll
        for (int i = 0; i < N; i++) {
          float* e = extra + h * DIM + lane * N + i;
          *e = *e * f + p * half_float(value[i]);
        }
      }
    }
  __syncwarp();

  for (u32 b = from; b < to; b += WARPS) {
    const u32 len = b + 1 == s.blocks ? s.last : 64;
    const Header now = head;
    // The query, turned back to the block's origin.
#pragma unroll
    for (int j = 0; j < (DIM + 127) / 128; j++) {
      const u32 i = lane + 32 * j;
      const float4 t = turn_next[j];
      if (i < DIM / 4)
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
          const float4 q = ((const float4*)queries)[h * (DIM / 4) + i];
          ((uint2*)local)[h * (DIM / 4) + i] =
              make_uint2(pack_halves(q.x * t.x + q.y * t.y, q.z * t.z + q.w * t.w),
                         pack_halves(q.y * t.x - q.x * t.y, q.w * t.z - q.z * t.w));
        }
    }
#pragma unroll
    for (int h = 0; h < GROUP; h++) ((int2*)key_sums)[h * 32 + lane] = make_int2(0, 0);
    look_ahead(b + WARPS);
    copy_wait<1>();
    __syncwarp();

    float acc[4][4];
#pragma unroll
    for (int m = 0; m < 4; m++) acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = 0;
#pragma unroll 1
    for (u32 quad = 0; quad < DIM / 64; quad++) {
      u32 w[4 * BITS];
#pragma unroll
      for (int j = 0; j < BITS; j++) {
        const uint4 v = *(const uint4*)(own + KEY_CODES + (quad * BITS + j) * 512 + lane * 16);
        w[4 * j] = v.x, w[4 * j + 1] = v.y, w[4 * j + 2] = v.z, w[4 * j + 3] = v.w;
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const u32 step = quad * 4 + k;
        const uint4 sz = *(const uint4*)(shared + UNITS_SZ + (step * 4 + tq) * 16);
        uint2 q = make_uint2(0, 0);
        if (g < GROUP) q = ((const uint2*)local)[g * (DIM / 4) + step * 4 + tq];
        const u8* turn = shared + TURN + step * 2048 + lane * 16;
        auto tile = [&](auto mm) {
          constexpr int m = decltype(mm)::value;
          const uint4 t = *(const uint4*)(turn + m * 512);
          u32 x0, y0, x1, y1;
          look_up<m * 4>(shared + LUT_KEYS, w + k * BITS, wide, x0, y0);
          look_up<m * 4 + 2>(shared + LUT_KEYS, w + k * BITS, wide, x1, y1);
          x0 = fma2(x0, sz.x, sz.y), y0 = fma2(y0, sz.z, sz.w);
          x1 = fma2(x1, sz.x, sz.y), y1 = fma2(y1, sz.z, sz.w);
          const u32 tx0 = fma2(x0, t.x, neg2(mul2(y0, t.y))), ty0 = fma2(x0, t.y, mul2(y0, t.x));
          const u32 tx1 = fma2(x1, t.z, neg2(mul2(y1, t.w))), ty1 = fma2(x1, t.w, mul2(y1, t.z));
          mma(acc[m], tx0, tx1, ty0, ty1, q.x, q.y);
        };
        tile(Constant<0>{}), tile(Constant<1>{}), tile(Constant<2>{}), tile(Constant<3>{});
      }
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
      if (2 * tq < GROUP) {
        scores[2 * tq * 64 + 16 * m + g] = acc[m][0];
        scores[2 * tq * 64 + 16 * m + 8 + g] = acc[m][2];
      }
      if (2 * tq + 1 < GROUP) {
        scores[(2 * tq + 1) * 64 + 16 * m + g] = acc[m][1];
        scores[(2 * tq + 1) * 64 + 16 * m + 8 + g] = acc[m][3];
      }
    }
    // Outliers of keys: residual times the query turned to the token's place.
    {
      const u32* list = outliers_of(s, now.start[0]);
      for (u32 i = lane; i < now.count[0]; i += 32) {
        const u32 e = i < NEAR_OUTLIERS ? ((const u32*)(own + KEY_OUTLIERS))[i] : list[i];
        const u32 t = outlier_token(e), c = outlier_channel(e);
        const float r = high_float(e);
        const u32 at = ((c / 16 * 4 + t / 16) * 32 + t % 8 * 4 + c / 4 % 4) * 16 + t / 8 % 2 * 8 + c / 2 % 2 * 2;
        const float cs = half_float(*(const u16*)(shared + TURN + at)), sn = half_float(*(const u16*)(shared + TURN + at + 4));
        // x turns to (cos, sin), y to (-sin, cos).
        const float fx = c % 2 ? -sn * r : cs * r, fy = c % 2 ? cs * r : sn * r;
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
          const u16* q = (const u16*)local + h * DIM + c / 4 * 4 + c / 2 % 2;
          const float scale = exponent(29 - exponent_of(now.reach[0] * ((float*)(shared + REACH))[h]));
          const float x = fx * half_float(q[0]) + fy * half_float(q[2]);
          atomicAdd(&key_sums[h * 64 + t], __float2int_rn(x * scale));
        }
      }
    }
    __syncwarp();
    head = unpack_header(raw_next);
    const bool more = b + WARPS < to;
    if (more) fetch_keys(block_next, head);
    copy_commit();
    copy_wait<1>();
    __syncwarp();

    // Weights; this lane has tokens 2 * lane and 2 * lane + 1.
    const uint2 scale2 = ((const uint2*)(own + SCALES))[lane];
    const bool in0 = 2 * lane < len, in1 = 2 * lane + 1 < len;
    const float log0 = logarithm2(low_float(scale2.x)), log1 = logarithm2(low_float(scale2.y));
    const float zero0 = in0 ? high_float(scale2.x) : 0, zero1 = in1 ? high_float(scale2.y) : 0;
    float factor[GROUP];
    bool moved = false;
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
      const float unscale = exponent(exponent_of(now.reach[0] * ((float*)(shared + REACH))[h]) - 29);
      const float2 x = ((const float2*)scores)[h * 32 + lane];
      const int2 k = ((const int2*)key_sums)[h * 32 + lane];
      const float x0 = in0 ? x.x + k.x * unscale : NONE, x1 = in1 ? x.y + k.y * unscale : NONE;
      const float e0 = in0 ? x0 + log0 : NONE, e1 = in1 ? x1 + log1 : NONE;
      const float m = fmaxf(top[h], warp_max(fmaxf(fmaxf(x0, x1), fmaxf(e0, e1))));
      const float p0 = in0 ? power2(x0 - m) : 0, p1 = in1 ? power2(x1 - m) : 0;
      const float w0 = in0 ? power2(e0 - m + 14) : 0, w1 = in1 ? power2(e1 - m + 14) : 0;
      factor[h] = power2(top[h] - m);
      moved |= m != top[h];
      top[h] = m;
      sum[h] = sum[h] * factor[h] + p0 + p1;
      zeros[h] = zeros[h] * factor[h] + p0 * zero0 + p1 * zero1;
      ((float2*)scores)[h * 32 + lane] = make_float2(p0, p1);
      weights[h * 32 + lane] = pack_halves(w0, w1);
      if (lane == 0) factors[h] = factor[h];
    }
    __syncwarp();
    if (moved) {
      const float f0 = 2 * tq < GROUP ? factors[2 * tq] : 0, f1 = 2 * tq + 1 < GROUP ? factors[2 * tq + 1] : 0;
#pragma unroll
      for (int i = 0; i < DIM / 16; i++) o[i][0] *= f0, o[i][1] *= f1, o[i][2] *= f0, o[i][3] *= f1;
    }
    u32 p[8];
#pragma unroll
    for (int i = 0; i < 8; i++) p[i] = 0;
    if (g < GROUP) {
      const uint4 lo = ((const uint4*)weights)[g * 8 + tq * 2], hi = ((const uint4*)weights)[g * 8 + tq * 2 + 1];
      p[0] = lo.x, p[1] = lo.y, p[2] = lo.z, p[3] = lo.w, p[4] = hi.x, p[5] = hi.y, p[6] = hi.z, p[7] = hi.w;
    }
#pragma unroll
    for (int quad = 0; quad < DIM / 64; quad++) {
      u32 w[4 * BITS];
#pragma unroll
      for (int j = 0; j < BITS; j++) {
        const uint4 v = *(const uint4*)(own + VALUE_CODES + (quad * BITS + j) * 512 + lane * 16);
        w[4 * j] = v.x, w[4 * j + 1] = v.y, w[4 * j + 2] = v.z, w[4 * j + 3] = v.w;
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        auto tile = [&](auto kk) {
          constexpr int t = decltype(kk)::value;
          u32 a0, a1, a2, a3;
          look_up<t * 4>(shared + LUT_VALUES, w + k * BITS, wide, a0, a1);
          look_up<t * 4 + 2>(shared + LUT_VALUES, w + k * BITS, wide, a2, a3);
          mma(o[quad * 4 + k], a0, a1, a2, a3, p[2 * t], p[2 * t + 1]);
        };
        tile(Constant<0>{}), tile(Constant<1>{}), tile(Constant<2>{}), tile(Constant<3>{});
      }
    }
    // Outliers of values.
    {
      const u32* list = outliers_of(s, now.start[1]);
      const int e64 = exponent_of(now.reach[1]) + 7;
      const float scale = exponent(30 - e64);
      for (u32 i = lane; i < now.count[1]; i += 32) {
        const u32 e = i < NEAR_OUTLIERS ? ((const u32*)(own + VALUE_OUTLIERS))[i] : list[i];
        const float r = high_float(e) * scale;
#pragma unroll
        for (int h = 0; h < GROUP; h++)
          atomicAdd(&value_sums[h * DIM + outlier_channel(e)], __float2int_rn(scores[h * 64 + outlier_token(e)] * r));
      }
      __syncwarp();
      if (more) fetch_values(block_next, head);
      copy_commit();
      const float unscale = exponent(e64 - 30);
#pragma unroll
      for (int h = 0; h < GROUP; h++)
        for (u32 i = lane; i < DIM / 4; i += 32) {
          const int4 v = ((int4*)value_sums)[h * (DIM / 4) + i];
          float4 x = ((float4*)extra)[h * (DIM / 4) + i];
          x.x = x.x * factor[h] + v.x * unscale, x.y = x.y * factor[h] + v.y * unscale;
          x.z = x.z * factor[h] + v.z * unscale, x.w = x.w * factor[h] + v.w * unscale;
          ((float4*)extra)[h * (DIM / 4) + i] = x;
          ((int4*)value_sums)[h * (DIM / 4) + i] = make_int4(0, 0, 0, 0);
        }
    }
  }
  copy_wait<0>();
  __syncwarp();

  // This warp's state, then all warps' merged.
  float* const result = (float*)own;
#pragma unroll
  for (int i = 0; i < DIM / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 h = 2 * tq + j % 2, c = 16 * i + j / 2 * 8 + g;
      if (h < GROUP) result[h * DIM + c] = o[i][j] * (1.0f / 16384);
    }
  __syncwarp();
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    const float z = warp_sum(zeros[h]), l = warp_sum(sum[h]);
    for (u32 c = lane; c < DIM; c += 32) result[h * DIM + c] += z + extra[h * DIM + c];
    if (lane == 0) factors[2 * h] = top[h], factors[2 * h + 1] = l;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < GROUP * DIM; i += WARPS * 32) {
    const u32 h = i / DIM;
    float m = NONE, l = 0, x = 0;
    for (u32 w = 0; w < WARPS; w++) m = fmaxf(m, ((float*)(shared + WARP_PARTS + w * WARP_BYTES + FACTORS))[2 * h]);
    for (u32 w = 0; w < WARPS; w++) {
      const u8* part = shared + WARP_PARTS + w * WARP_BYTES;
      const float f = power2(((const float*)(part + FACTORS))[2 * h] - m);
      l += ((const float*)(part + FACTORS))[2 * h + 1] * f;
      x += ((const float*)part)[i] * f;
    }
    const u64 at = ((u64)seq * a.heads + first_head + h) * a.splits + split;
    a.out[at * DIM + i % DIM] = x;
    if (i % DIM == 0) a.sums[at * 2] = m, a.sums[at * 2 + 1] = l;
  }
}
