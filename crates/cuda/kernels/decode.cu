// One query token against a compressed history: flash-decoding, a warp takes whole blocks and needs no other warp until
// the end.
//
// Codes become signposts of 8 bits by byte permutations (codes.cuh), four channels or tokens a register. A block's middle
// is where the query is turned back to; a key's place j is counted from there. Keys come in slabs of 16 RoPE pairs:
//
//   turned    the first TURNED slabs: signposts -> halves -> * scale + zero -> turned by j -> mma with fp16 queries
//   series    slow pairs, for one query head: not turned (series.cuh)
//
// Values:   signposts -> integer mma with weights of 16 bits, which reach 65,504 where the likeliest token of a block has the
//           greatest scale; sums are scaled back block by block. A value's scale multiplies its weight, its zero point a sum.
// Outliers: one lane each, added as integers (shared memory adds those in one instruction) under a power of two that
//           no sum of the unit can overflow.

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) decode(const DecodeArgs a) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, tq = lane % 4;
  const u32 kv_head = blockIdx.x / a.passes, split = blockIdx.y, seq = blockIdx.z;
  const u32 first_head = kv_head * a.passes * GROUP + blockIdx.x % a.passes * GROUP;
  let_next_start();

  // Tables, on their way while the first blocks are found: nothing that a kernel writes.
  auto fetch_table = [&](u32 at, const void* from, u32 bytes) {
    for (u32 i = threadIdx.x * 16; i < bytes; i += WARPS * 512) copy16(shared + at + i, (const u8*)from + i);
  };
  fetch_table(TURN, a.turn, TURN_BYTES);
  fetch_table(PLACES, a.places, DIM * 128);
  fetch_table(UNITS_SZ, a.units + kv_head * (DIM / 4), DIM * 4);
#if SERIES
  fetch_table(BASIS, a.basis, 2048);
  fetch_table(TERM_TABLE, a.series, TERMS * DIM * 2);
#endif
  if (threadIdx.x < (1 << BITS) / 4) {
    ((u32*)(shared + POSTS))[threadIdx.x] = a.key_posts[threadIdx.x];
    ((u32*)(shared + POSTS + 16))[threadIdx.x] = a.value_posts[threadIdx.x];
  }
  wait_for_former();
  fetch_table(QUERIES, a.q + ((u64)seq * a.heads + first_head) * DIM, GROUP * DIM * 4);
  copy_commit();
  const Sequence s = a.sequences[seq];
  u8* const own = shared + WARP_PARTS + warp * WARP_BYTES;
  float* const scores = (float*)(own + SCORES);
  int* const key_sums = (int*)(own + KEY_SUMS);
  u16* const weights = (u16*)(own + WEIGHTS);
  int* const value_sums = (int*)(own + VALUE_SUMS);
  u32* const local = (u32*)(own + LOCAL_QUERY);
  const float* const queries = (const float*)(shared + QUERIES);

  // Of heads tq and 4 + tq: channels 16 i + g and 16 i + 8 + g.
  float o[SETS][DIM / 16][2];
  float top[GROUP], sum[GROUP], zeros[GROUP];
#pragma unroll
  for (int h = 0; h < GROUP; h++) top[h] = NONE, sum[h] = 0, zeros[h] = 0;
#pragma unroll
  for (int i = 0; i < DIM / 16; i++)
#pragma unroll
    for (int e = 0; e < SETS; e++) o[e][i][0] = o[e][i][1] = 0;
  for (u32 i = lane; i < GROUP * DIM; i += 32) value_sums[i] = 0;
  __syncwarp();

  const u32 stride = (u32)block_bytes(a.kv_heads), header_from = (u32)header_at(a.kv_heads, kv_head);
  // Rounded up; the last split has what the others leave.
  const u32 each = (u32)(((u64)s.blocks * a.share + 0xffffffff) >> 32);
  const u32 from = min(s.blocks, split * each) + warp, to = min(s.blocks, split * each + each);
  // The last block and its tokens in one register, which some builds are short of.
  constexpr bool PACKED = DIM < 256;
  const u32 end = s.blocks << 7 | s.last;
  uint4 next = make_uint4(0, 0, 0, 0);
  // Where registers are short, the next block is known by its number, and what only looking ahead needs waits in shared memory,
  // where the end's factors will be. Which builds those are the compiler's report says.
  constexpr bool LEAN = __CUDA_ARCH__ / 100 != 9 || (GROUP == 1 && (BITS == 3 || DIM == 256));
  const u8* block_next = a.pool;
  u32 number_next = 0;
  const u32** const table_kept = (const u32**)(own + FACTORS);
  u32* const header_kept = (u32*)(own + FACTORS + 8);
  auto the_next = [&] { return LEAN ? a.pool + (u64)number_next * stride : block_next; };
  // The table is read a block further ahead, so that no header waits for where it lies.
  u32 entry = from < to ? s.table[from] : 0;
  if (LEAN) {
    if (lane == 0) *table_kept = s.table, *header_kept = header_from;
    __syncwarp();
  }
  auto look_ahead = [&](u32 b) {
    if (b < to) {
      number_next = entry, block_next = a.pool + (u64)entry * stride;
      next = *(const uint4*)(the_next() + (LEAN ? *header_kept : header_from));
      if (b + WARPS < to) entry = (LEAN ? *table_kept : s.table)[b + WARPS];
    }
  };
  // Keys and values of the next block, a group of copies each: codes as soon as those of this block are in registers, then
  // its outliers.
  auto near_bytes = [](u32 count) { return min(count, NEAR_OUTLIERS) * 4; };
  auto fetch_key_codes = [&](u32 b) {
    if (b < to) {
      fetch<UNIT_BYTES>(own + KEY_CODES, the_next() + unit_at(kv_head, 0), lane);
      fetch<DIM * 4>(own + ANGLES, a.origins + (u64)b * (DIM / 4), lane);
    }
  };
  auto fetch_key_outliers = [&](u32 b) {
    if (b < to) fetch_few(own + KEY_OUTLIERS, outliers_of(s, start_of(next, 0)), near_bytes(count_of(next, 0)), lane);
    copy_commit();
  };
  auto fetch_value_codes = [&](u32 b) {
    if (b < to) {
      fetch<UNIT_BYTES>(own + VALUE_CODES, the_next() + unit_at(kv_head, 1), lane);
      fetch<256>(own + SCALES, the_next() + scales_at(a.kv_heads), lane);
    }
  };
  auto fetch_value_outliers = [&](u32 b) {
    if (b < to) fetch_few(own + VALUE_OUTLIERS, outliers_of(s, start_of(next, 1)), near_bytes(count_of(next, 1)), lane);
    copy_commit();
  };
  // All but the group that was asked for last.
  auto wait = [] {
    copy_wait<1>();
    __syncwarp();
  };
  look_ahead(from);
  fetch_key_codes(from);
  fetch_key_outliers(from);
  fetch_value_codes(from);
  fetch_value_outliers(from);
  copy_wait<2>();
  __syncthreads();
  for (u32 h = warp; h < GROUP; h += WARPS) {
    // No turn makes a channel of a pair greater than this.
    float reach = 0;
    const float2* q = (const float2*)(shared + QUERIES) + h * (DIM / 2);
    for (u32 i = lane; i < DIM / 2; i += 32) reach += 2 * root(q[i].x * q[i].x + q[i].y * q[i].y);
    reach = warp_sum(reach);
    if (lane == 0) ((float*)(shared + REACH))[h] = reach;
  }
#if SERIES
  prepare_columns((float4*)(shared + COLUMNS), (float4*)(shared + BASIS), (const float*)(shared + QUERIES),
                  (const u16*)(shared + UNITS_SZ), (const float*)(shared + TERM_TABLE));
#endif
  __syncthreads();

  // The two tokens whose scores and weights this lane has.
  const u32 place = 32 * (tq % 2) + 16 * (tq / 2) + g;

  // Sums of values' outliers stay integers for a few blocks, under the last maximum, in units of 2^(value_exponent - 20).
  // EMPTY while there are none.
  constexpr int EMPTY = -126;
  int value_exponent = EMPTY;
  auto take_sums = [&]() {
    const float unit = exponent(value_exponent - 20);
    __syncwarp();
#pragma unroll
    for (int e = 0; e < SETS; e++)
#pragma unroll
      for (int i = 0; i < DIM / 16; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          o[e][i][j] += unit * value_sums[min(4 * e + tq, GROUP - 1) * DIM + place_of(16 * i + 8 * j + g)];
    __syncwarp();
    for (u32 i = lane; i < GROUP * DIM / 4; i += 32) ((int4*)value_sums)[i] = make_int4(0, 0, 0, 0);
    __syncwarp();
    value_exponent = EMPTY;
  };

  for (u32 b = from; b < to; b += WARPS) {
    const u32 len = b + 1 == (PACKED ? end >> 7 : s.blocks) ? (PACKED ? end & 127 : s.last) : 64;
    const uint4 now = next;
    look_ahead(b + WARPS);
    wait();
    // The query, turned back to the block's middle.
#pragma unroll
    for (int j = 0; j < (DIM + 127) / 128; j++) {
      const u32 i = lane + 32 * j;
      if (i < DIM / 4) {
        const float4 t = ((const float4*)(own + ANGLES))[i];
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
          const float4 q = ((const float4*)queries)[h * (DIM / 4) + i];
          ((uint2*)local)[h * (DIM / 4) + i] =
              make_uint2(pack_halves(q.x * t.x + q.y * t.y, q.z * t.z + q.w * t.w),
                         pack_halves(q.y * t.x - q.x * t.y, q.w * t.z - q.z * t.w));
        }
      }
    }
#pragma unroll
    for (int h = 0; h < GROUP; h++) ((int2*)key_sums)[h * 32 + lane] = make_int2(0, 0);
    __syncwarp();

#if SERIES
    u32 high[SERIES][2], low[SERIES][2];
    int zero_terms[2];
    make_columns((const float4*)(shared + COLUMNS), own + ANGLES, lane, high, low, zero_terms);
    float part[4][2];
#endif
    const Signposts key_posts = load_signposts((const u32*)(shared + POSTS));
    u32 w[4 * BITS];
    // Several heads gain by a loop half as long, one head by what it computes meanwhile, where registers allow.
#pragma unroll(SLABS % 4 == 0 && (GROUP > 1 || __CUDA_ARCH__ / 100 > 9) ? 1 : 2)
    for (int half = 0; half < 2; half++) {
      float acc[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = 0;
#if SERIES
      int hi[2][4], lo[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) hi[m][i] = 0, lo[m][i] = zero_terms[i % 2];
#endif
#pragma unroll
      for (int slab = 0; slab < SLABS; slab++) {
        const int two = half * SLABS + slab;
        if (two % 4 == 0) load_words(w, own + KEY_CODES, two / 4, lane);
        u32 r[2][4];
        look_up(w + two % 4 * BITS, slab < TURNED ? biased(key_posts) : key_posts, r);
        if (slab < TURNED) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const u32 step = slab * 2 + i;
            const uint4 sz = *(const uint4*)(shared + UNITS_SZ + (step * 4 + tq) * 16);
            uint2 q = make_uint2(0, 0);
            if (g < GROUP) q = ((const uint2*)local)[g * (DIM / 4) + step * 4 + tq];
#pragma unroll
            for (int m = 0; m < 2; m++) {
              const uint4 t = *(const uint4*)(shared + TURN + step * 2048 + (half * 2 + m) * 512 + lane * 16);
              const u32 p0 = r[m][2 * i], p1 = r[m][2 * i + 1];
              const u32 x0 = fma2(halves_of<0>(p0), sz.x, sz.y), y0 = fma2(halves_of<1>(p0), sz.z, sz.w);
              const u32 x1 = fma2(halves_of<0>(p1), sz.x, sz.y), y1 = fma2(halves_of<1>(p1), sz.z, sz.w);
              const u32 tx0 = fma2(x0, t.x, neg2(mul2(y0, t.y))), ty0 = fma2(x0, t.y, mul2(y0, t.x));
              const u32 tx1 = fma2(x1, t.z, neg2(mul2(y1, t.w))), ty1 = fma2(x1, t.w, mul2(y1, t.z));
              mma(acc[m], tx0, tx1, ty0, ty1, q.x, q.y);
            }
          }
        }
#if SERIES
        else {
#pragma unroll
          for (int m = 0; m < 2; m++) {
            const int column = slab < TURNED ? 0 : slab - TURNED;
            mma_signed(hi[m], r[m], high[column][0], high[column][1]);
            mma_unsigned(lo[m], r[m], low[column][0], low[column][1]);
          }
        }
#endif
      }
#if SERIES
      // Terms 2 tq and 2 tq + 1 of tokens 16 m + g and 16 m + 8 + g.
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const float4 t = ((const float4*)(shared + BASIS))[(half * 2 + m) * 32 + lane];
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = (float)(hi[m][i] * 256 + lo[m][i]);
        part[half * 2 + m][0] = fmaf(v[0], t.x, fmaf(v[1], t.y, acc[m][0]));
        part[half * 2 + m][1] = fmaf(v[2], t.z, fmaf(v[3], t.w, acc[m][2]));
      }
#else
#pragma unroll
      for (int m = 0; m < 2; m++) {
        float* to = scores + 2 * tq * 64 + half * 32 + 16 * m + g;
        if (2 * tq < GROUP) to[0] = acc[m][0], to[8] = acc[m][2];
        if (2 * tq + 1 < GROUP) to[64] = acc[m][1], to[72] = acc[m][3];
      }
#endif
    }
    __syncwarp();
    fetch_key_codes(b + WARPS);
#if SERIES
    // Lanes of a row each take two tokens' sums.
    float mine[2];
    {
      const bool odd = tq % 2, upper = tq / 2;
      float two[2][2];
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          two[m][i] = (odd ? part[m + 2][i] : part[m][i]) + __shfl_xor_sync(WARP, odd ? part[m][i] : part[m + 2][i], 1);
#pragma unroll
      for (int i = 0; i < 2; i++)
        mine[i] = (upper ? two[1][i] : two[0][i]) + __shfl_xor_sync(WARP, upper ? two[0][i] : two[1][i], 2);
    }
#endif
    // Outliers of keys: residual times the query turned to the token's place.
    float key_scale[GROUP];
#pragma unroll
    for (int h = 0; h < GROUP; h++) key_scale[h] = exponent(20 - exponent_of(reach_of(now, 0) * ((float*)(shared + REACH))[h]));
    {
      auto value = [&](u32 e, int* sums) {
        const u32 pair = outlier_pair(e), turn = *(const u32*)(shared + PLACES + e % (DIM * 32) * 4);
        const float r = high_float(e), cs = low_float(turn) * r, sn = high_float(turn) * r;
        // x turns to (cos, sin), y to (-sin, cos).
        const bool is_y = outlier_is_y(e);
        const float fx = is_y ? -sn : cs, fy = is_y ? cs : sn;
        const u16* q = (const u16*)local + pair * 2 - pair % 2;
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
          const float x = fx * half_float(q[h * DIM]) + fy * half_float(q[h * DIM + 2]);
          sums[h] = rounded(x * key_scale[h]);
        }
      };
      add_outliers((const u32*)(own + KEY_OUTLIERS), outliers_of(s, start_of(now, 0)), count_of(now, 0), 64, lane, value,
                   [&](u32 e) { return key_sums + outlier_token(e); });
    }
    __syncwarp();
    fetch_key_outliers(b + WARPS);
    wait();

    // Weights, under the block's own maximum.
    const u32 sz0 = ((const u32*)(own + SCALES))[place], sz1 = ((const u32*)(own + SCALES))[place + 8];
    const bool in0 = place < len, in1 = place + 8 < len;
    const float scale0 = in0 ? low_float(sz0) : 0, scale1 = in1 ? low_float(sz1) : 0;
    const float zero0 = in0 ? high_float(sz0) : 0, zero1 = in1 ? high_float(sz1) : 0;
    // The greatest weight is at most the greatest scale, which needs no scores. Scales are not negative: their bits have their order.
    const float most = __uint_as_float(__reduce_max_sync(WARP, __float_as_uint(fmaxf(scale0, scale1))));
    const float steps = most > 0 ? __fdividef(65504.0f, most) : 0, unit = most * (a.value_step * (1 / 65504.0f));
    float old_factor[GROUP], new_factor[GROUP], value_factor[GROUP];
    bool moved = false;
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
      const float unscale = inverse_exponent(key_scale[h]);
#if SERIES
      const float d0 = mine[0], d1 = mine[1];
#else
      const float d0 = scores[h * 64 + place], d1 = scores[h * 64 + place + 8];
#endif
      const float x0 = in0 ? d0 + key_sums[h * 64 + place] * unscale : NONE;
      const float x1 = in1 ? d1 + key_sums[h * 64 + place + 8] * unscale : NONE;
      const float here = warp_max_ordered(fmaxf(x0, x1)), m = fmaxf(top[h], here);
      const float p0 = in0 ? power2(x0 - here) : 0, p1 = in1 ? power2(x1 - here) : 0;
      old_factor[h] = power2(top[h] - m), new_factor[h] = power2(here - m);
      value_factor[h] = new_factor[h] * unit;
      moved |= m != top[h];
      top[h] = m;
      sum[h] = fmaf(sum[h], old_factor[h], new_factor[h] * (p0 + p1));
      zeros[h] = fmaf(zeros[h], old_factor[h], new_factor[h] * (p0 * zero0 + p1 * zero1));
      // The mantissa ends in the integer: 2^23.
      weights[h * 64 + place] = (u16)__float_as_uint(fmaf(p0, scale0 * steps, 8388608.0f));
      weights[h * 64 + place + 8] = (u16)__float_as_uint(fmaf(p1, scale1 * steps, 8388608.0f));
      if (count_of(now, 1)) scores[h * 64 + place] = p0 * new_factor[h], scores[h * 64 + place + 8] = p1 * new_factor[h];
    }
    __syncwarp();
    float old_mine[SETS], new_mine[SETS];
    u32 column[SETS][4];
#pragma unroll
    for (int e = 0; e < SETS; e++) {
      old_mine[e] = old_factor[0], new_mine[e] = value_factor[0];
#pragma unroll
      for (int h = 4 * e; h < GROUP; h++)
        if (h == 4 * e + (int)tq) old_mine[e] = old_factor[h], new_mine[e] = value_factor[h];
      // Column g: high bytes of head g / 2 where g is even, low bytes where it is odd.
      const u32 h = min(4 * e + g / 2, GROUP - 1), pick = g % 2 ? 0x6420 : 0x7531;
      const uint4 x = ((const uint4*)(weights + h * 64))[tq * 2], y = ((const uint4*)(weights + h * 64))[tq * 2 + 1];
      column[e][0] = permute(x.x, x.y, pick), column[e][1] = permute(x.z, x.w, pick);
      column[e][2] = permute(y.x, y.y, pick), column[e][3] = permute(y.z, y.w, pick);
    }
    const int reach = max(EMPTY + 1, exponent_of(reach_of(now, 1)));
    const bool apart = count_of(now, 1), eighth = b / WARPS % 8 == 0;
    if (value_exponent > EMPTY && (moved || eighth || (apart && reach > value_exponent))) take_sums();
    if (apart && value_exponent == EMPTY) value_exponent = reach;
    if (moved) {
#pragma unroll
      for (int e = 0; e < SETS; e++)
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) o[e][i][0] *= old_mine[e], o[e][i][1] *= old_mine[e];
    }
    const Signposts value_posts = load_signposts((const u32*)(shared + POSTS + 16));
#pragma unroll
    for (int quad = 0; quad < DIM / 64; quad++) {
      load_words(w, own + VALUE_CODES, quad, lane);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        u32 r[2][4];
#if BITS == 4
        u32 p[2][4];
        look_up_both(w + k * BITS, value_posts, r, p);
#else
        look_up(w + k * BITS, value_posts, r);
#endif
#pragma unroll
        for (int e = 0; e < SETS; e++) {
          int x[4] = {0, 0, 0, 0};
          mma_unsigned(x, r[0], column[e][0], column[e][1]);
          mma_unsigned(x, r[1], column[e][2], column[e][3]);
#if BITS == 4
          mma_unsigned(x, p[0], column[e][0], column[e][1]);
          mma_unsigned(x, p[1], column[e][2], column[e][3]);
#endif
          float* to = o[e][quad * 4 + k];
          to[0] = fmaf((float)(x[0] * 256 + x[1]), new_mine[e], to[0]);
          to[1] = fmaf((float)(x[2] * 256 + x[3]), new_mine[e], to[1]);
        }
      }
    }
    __syncwarp();
    fetch_value_codes(b + WARPS);
    // Outliers of values.
    {
      const float scale = exponent(20 - value_exponent);
      auto value = [&](u32 e, int* sums) {
        const float r = high_float(e) * scale;
#pragma unroll
        for (int h = 0; h < GROUP; h++) sums[h] = rounded(scores[h * 64 + outlier_token(e)] * r);
      };
      if (apart)
        add_outliers((const u32*)(own + VALUE_OUTLIERS), outliers_of(s, start_of(now, 1)), count_of(now, 1), DIM, lane, value,
                     [&](u32 e) { return value_sums + outlier_place(e); });
    }
    __syncwarp();
    fetch_value_outliers(b + WARPS);
  }
  copy_wait<0>();
  __syncwarp();

  finish(a, own, o, top, sum, zeros, value_exponent > EMPTY ? exponent(value_exponent - 20) : 0);
}
