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
  u32 first_block, rows;
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

// fp16 rows with keys turned to their positions, from the signposts that the decode kernel has. A warp takes every fourth
// two tiles. Rows of shared memory first hold residuals, then numbers.
// grid: (blocks, kv_heads, 2), 128 threads
#define PITCH (DIM + 8)

extern "C" __global__ void __launch_bounds__(128) dense_rows(const DenseArgs a) {
  __shared__ __align__(16) u16 tile[64 * PITCH];
  const Sequence s = *a.sequence;
  const u32 block = a.first_block + blockIdx.x, head = blockIdx.y, side = blockIdx.z, kv_heads = gridDim.y;
  const u32 len = block + 1 == s.blocks ? s.last : 64;
  const u32 lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, tq = lane % 4;
  const u8* record = a.pool + s.table[block] * block_bytes(kv_heads);
  const u8* unit = record + unit_at(head, side);
  u32 w[DIM / 64][BITS];
#pragma unroll
  for (int k = 0; k < DIM / 64; k++)
#pragma unroll
    for (int j = 0; j < BITS; j++) w[k][j] = *(const u32*)(unit + word_byte(lane, (k * 4 + warp) * BITS + j));
  const u32* header = (const u32*)(record + header_at(kv_heads, head)) + 2 * side;
  const u32 start = header[0], count = header[1] & 0xffff;
  for (u32 i = threadIdx.x; i < 64 * PITCH / 8; i += 128) ((uint4*)tile)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const u32* list = outliers_of(s, start);
  for (u32 i = threadIdx.x; i < count; i += 128) {
    const u32 e = list[i];
    tile[outlier_token(e) * PITCH + outlier_channel(e)] = e >> 16;
  }
  __syncthreads();
  if (side == 0) {
    const Signposts posts = biased(load_signposts(a.key_steps));
#pragma unroll
    for (int k = 0; k < DIM / 64; k++) {
      const u32 two = k * 4 + warp, slab = two % (DIM / 32);
      u32 r[2][4];
      look_up(w[k], posts, r);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32 at = slab * 8 + half * 4 + tq;  // of two pairs
        const uint4 sz = a.units[head * (DIM / 4) + at];
        const float4 n = a.origins[(u64)block * (DIM / 4) + at];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 t = two / (DIM / 32) * 32 + i * 8 + g, p = r[i / 2][half * 2 + i % 2];
          const u32 x = fma2(halves_of<0>(p), sz.x, sz.y), y = fma2(halves_of<1>(p), sz.z, sz.w);
          const float4 j = a.places[t * (DIM / 4) + at];
          uint2* to = (uint2*)(tile + t * PITCH + at * 4);
          const uint2 rest = *to;
          float x0, y0, x1, y1;
          turn_pair(low_float(x) + low_float(rest.x), low_float(y) + high_float(rest.x), n.x * j.x - n.y * j.y,
                    n.y * j.x + n.x * j.y, &x0, &y0);
          turn_pair(high_float(x) + low_float(rest.y), high_float(y) + high_float(rest.y), n.z * j.z - n.w * j.w,
                    n.w * j.z + n.z * j.w, &x1, &y1);
          *to = make_uint2(pack_halves(x0, y0), pack_halves(x1, y1));
        }
      }
    }
  } else {
    const Signposts posts = biased(load_signposts(a.value_steps));
    const u32* scales = (const u32*)(record + scales_at(kv_heads));
    const float unit_step = a.value_step * 128;
#pragma unroll
    for (int k = 0; k < DIM / 64; k++) {
      u32 r[2][4];
#if BITS == 4
      u32 q[2][4];
      look_up_both(w[k], load_signposts(a.value_steps), r, q);
#else
      look_up(w[k], posts, r);
#endif
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32 c = (k * 4 + warp) * 16 + i % 2 * 8 + g, t = tq * 16 + i / 2 * 4, p = r[i / 4][i % 4];
#if BITS == 4
        // No entry's sum leaves a byte: one part is 0 or -1.
        const u32 sum = __vadd4(p, q[i / 4][i % 4]) ^ 0x80808080;
        const u32 v[2] = {halves_of<0>(sum), halves_of<1>(sum)};
#else
        const u32 v[2] = {halves_of<0>(p), halves_of<1>(p)};
#endif
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const u32 sz = t + e < len ? scales[t + e] : 0;
          u16* to = tile + (t + e) * PITCH + c;
          const float x = e % 2 ? high_float(v[e / 2]) : low_float(v[e / 2]);
          *to = float_half(fmaf(low_float(sz) * unit_step, x, high_float(sz)) + half_float(*to));
        }
      }
    }
  }
  __syncthreads();
  uint4* out = (uint4*)a.out + (((u64)side * kv_heads + head) * a.rows + (u64)blockIdx.x * 64) * (DIM / 8);
  for (u32 i = threadIdx.x; i < 64 * DIM / 8; i += 128) {
    const u32 t = i / (DIM / 8), piece = i % (DIM / 8);
    if (blockIdx.x * 64 + t < a.rows) out[i] = *(const uint4*)(tile + t * PITCH + piece * 8);
  }
}
