// Units back to numbers, for all queries of a prefill step, and for tests.

struct DenseArgs {
  const u8* pool;
  const Sequence* sequence;
  const float* key_posts;    // [CHANNELS][2^BITS]
  const float* value_posts;  // [2^BITS]
  const u32* key_steps;      // 2^BITS signposts of 8 bits, as in decode.cu
  const u32* value_steps;
  const uint4* units;        // as in decode.cu
  const float4* origins;     // [blocks][DIM / 4] cos, sin of each block's middle
  const float4* places;      // [64][DIM / 4] cos, sin of each place, from there
  void* out;                 // [2][kv_heads][rows][DIM]
  float value_step;
  u32 first_block, rows, kv_heads;
  u32 heads;  // that a block of threads takes, of dense_rows
};

// Each dense value as the CPU has it, step by step in f32, plus its outlier's residual; keys not turned.
// grid: (blocks, kv_heads, 2), 128 threads
extern "C" __global__ void __launch_bounds__(128) dense(const DenseArgs a) {
  extern __shared__ __align__(16) float tile[];  // [64][DIM]
  const Sequence s = *a.sequence;
  const u32 block = a.first_block + blockIdx.x, head = blockIdx.y, side = blockIdx.z, kv_heads = gridDim.y;
  const u32 len = block + 1 == s.blocks ? s.last : 64;
  const u8* record = a.pool + s.table[block] * block_bytes(kv_heads);
  const u8* unit = record + unit_at(head, side);
  const u32* scales = (const u32*)(record + scales_at(kv_heads));
  for (u32 i = threadIdx.x; i < 64 * DIM; i += 128) {
    const u32 t = i / DIM, c = i % DIM;
    float x = 0;
    if (t < len) {
      const u32 code = get_code(unit, side, side ? value_spot(c, t) : key_spot(c, t));
      x = side ? __fadd_rn(__fmul_rn(low_float(scales[t]), a.value_posts[code]), high_float(scales[t]))
               : a.key_posts[(head * DIM + c) << BITS | code];
    }
    tile[i] = x;
  }
  __syncthreads();
  const u32* header = (const u32*)(record + header_at(kv_heads, head)) + 2 * side;
  const u32* list = outliers_of(s, header[0]);
  for (u32 i = threadIdx.x; i < (header[1] & 0xffff); i += 128) {
    const u32 e = list[i];
    float* x = tile + outlier_token(e) * DIM + outlier_channel(e);
    *x = __fadd_rn(*x, high_float(e));
  }
  __syncthreads();
  float* out = (float*)a.out + (((u64)side * kv_heads + head) * a.rows + (u64)blockIdx.x * 64) * DIM;
  for (u32 i = threadIdx.x; i < 64 * DIM; i += 128)
    if (blockIdx.x * 64 + i / DIM < a.rows) out[i] = tile[i];
}

// fp16 rows with keys turned to their positions, from the signposts that the decode kernel has. A block of threads takes
// `heads` KV heads one after the other: what keys turn by, and values' scales, are theirs alike and stay in registers. A warp
// has two tiles; numbers meet in shared memory, where outliers are added.
// grid: (blocks, kv_heads / heads, 2), 2 * DIM threads: few registers each, so that a block fits beside one of prefill.cu
#define PITCH (DIM + 16)

// Where a value lies in the tile: tokens of neighbouring lanes are 16 apart and must not meet in a bank.
FN u32 value_at(u32 t, u32 c) { return t * PITCH + (c ^ t / 16 * 16); }

extern "C" __global__ void __launch_bounds__(DIM * 2, 512 / DIM) dense_rows(const DenseArgs a) {
  __shared__ __align__(16) u16 tile[64 * PITCH];
  const Sequence s = *a.sequence;
  const u32 block = a.first_block + blockIdx.x, side = blockIdx.z, kv_heads = a.kv_heads;
  const u32 first_head = blockIdx.y * a.heads, last_head = min(kv_heads, first_head + a.heads);
  const u32 len = block + 1 == s.blocks ? s.last : 64;
  const u32 lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, tq = lane % 4;
  const u8* record = a.pool + s.table[block] * block_bytes(kv_heads);
  const float2* const origins = (const float2*)a.origins + (u64)block * (DIM / 2);

  // Keys: cos and sin of two pairs at four tokens. Values: scales and zero points of two tokens each.
  u32 shared_by_heads[2][4][2];
  if (side == 0) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 at = warp % (DIM / 32) * 8 + half * 4 + tq;  // of two pairs
      const float4 n = ((const float4*)origins)[at];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float4 j = a.places[(warp / (DIM / 32) * 32 + i * 8 + g) * (DIM / 4) + at];
        shared_by_heads[half][i][0] = pack_halves(n.x * j.x - n.y * j.y, n.z * j.z - n.w * j.w);
        shared_by_heads[half][i][1] = pack_halves(n.y * j.x + n.x * j.y, n.w * j.z + n.z * j.w);
      }
    }
  } else {
    const u32* scales = (const u32*)(record + scales_at(kv_heads));
    const float unit_step = a.value_step * 128;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 t = tq * 16 + i * 4 + h * 2;
        const u32 x = t < len ? scales[t] : 0, y = t + 1 < len ? scales[t + 1] : 0;
        shared_by_heads[h][i][0] = pack_halves(low_float(x) * unit_step, low_float(y) * unit_step);
        shared_by_heads[h][i][1] = permute(x, y, 0x7632);
      }
  }

  for (u32 head = first_head; head < last_head; head++) {
    const u8* unit = record + unit_at(head, side);
    const uint2 header = *(const uint2*)(record + header_at(kv_heads, head) + side * 8);
    const u32* list = outliers_of(s, header.x);
    const u32 count = header.y & 0xffff;
    u32 w[BITS], r[2][4];
#pragma unroll
    for (int j = 0; j < BITS; j++) w[j] = *(const u32*)(unit + word_byte(lane, warp * BITS + j));
    if (side == 0) {
      look_up(w, biased(load_signposts(a.key_steps)), r);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32 at = warp % (DIM / 32) * 8 + half * 4 + tq;
        const uint4 sz = a.units[head * (DIM / 4) + at];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 t = warp / (DIM / 32) * 32 + i * 8 + g, p = r[i / 2][half * 2 + i % 2];
          const u32 x = fma2(halves_of<0>(p), sz.x, sz.y), y = fma2(halves_of<1>(p), sz.z, sz.w);
          const u32 c = shared_by_heads[half][i][0], n = shared_by_heads[half][i][1];
          const u32 tx = fma2(x, c, neg2(mul2(y, n))), ty = fma2(x, n, mul2(y, c));
          *(uint2*)(tile + t * PITCH + at * 4) = make_uint2(permute(tx, ty, 0x5410), permute(tx, ty, 0x7632));
        }
      }
    } else {
#if BITS == 4
      u32 q[2][4];
      look_up_both(w, load_signposts(a.value_steps), r, q);
      // No entry's sum leaves a byte: one part is 0 or -1.
#pragma unroll
      for (int i = 0; i < 8; i++) r[i / 4][i % 4] = __vadd4(r[i / 4][i % 4], q[i / 4][i % 4]) ^ 0x80808080;
#else
      look_up(w, biased(load_signposts(a.value_steps)), r);
#endif
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32 c = warp * 16 + i % 2 * 8 + g, t = tq * 16 + i / 2 * 4, p = r[i / 4][i % 4];
        const u32 v[2] = {halves_of<0>(p), halves_of<1>(p)};
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 x = fma2(v[h], shared_by_heads[h][i / 2][0], shared_by_heads[h][i / 2][1]);
          tile[value_at(t + 2 * h, c)] = x, tile[value_at(t + 2 * h + 1, c)] = x >> 16;
        }
      }
    }
    // Of keys those at x first: both of a pair go to the same two numbers, in this order always.
#pragma unroll 1
    for (u32 y = 0; y < (side ? 1 : 2); y++) {
      __syncthreads();
#pragma unroll 1
      for (u32 i = threadIdx.x; i < count; i += DIM * 2) {
        const u32 e = list[i], t = outlier_token(e);
        if (side) {
          u16* to = tile + value_at(t, outlier_channel(e));
          *to = float_half(half_float(*to) + high_float(e));
        } else if ((outlier_is_y(e) != 0) == y) {
          const u32 pair = outlier_pair(e);
          const float2 n = origins[pair], j = ((const float2*)a.places)[t * (DIM / 2) + pair];
          const float r = high_float(e), c = r * (n.x * j.x - n.y * j.y), sn = r * (n.y * j.x + n.x * j.y);
          u32* to = (u32*)(tile + t * PITCH) + pair;
          *to = pack_halves(low_float(*to) + (y ? -sn : c), high_float(*to) + (y ? c : sn));
        }
      }
    }
    __syncthreads();
    uint4* out = (uint4*)a.out + (((u64)side * kv_heads + head) * a.rows + (u64)blockIdx.x * 64) * (DIM / 8);
    for (u32 i = threadIdx.x; i < 64 * DIM / 8; i += DIM * 2) {
      const u32 t = i / (DIM / 8), piece = i % (DIM / 8) ^ (side ? t / 16 * 2 : 0);
      if (blockIdx.x * 64 + t < a.rows) out[i] = *(const uint4*)(tile + t * PITCH + piece * 8);
    }
    __syncthreads();
  }
}
