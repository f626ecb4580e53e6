// One query token against an fp16 history, the base line: rows [2][kv_heads][capacity][DIM], keys turned. A row is read
// by DIM / 8 neighbouring lanes, 16 bytes each, ROWS rows of a warp in flight at a time.
#define LANES (DIM / 8)
#define AT_ONCE (32 / LANES)
#define ROWS (GROUP > 2 ? 4 : 8)
// Results of all warps fit 48 KB of shared memory.
#define WARPS (GROUP * DIM > 1024 ? 4 : 8)
// Outputs of many heads need the registers of a second block.
#define AT_A_TIME (GROUP > 4 && WARPS > 4 ? 1 : 2)

struct ExactArgs {
  const u16* rows;
  const float* q;   // [sequences][heads][DIM], turned, times log2(e) / sqrt(DIM)
  float* out;       // [sequences][heads][splits][DIM]
  float* sums;      // [sequences][heads][splits][2]
  const u32* after; // how many tokens there are; or null for `tokens`
  u64 next;         // halves from one sequence to the next
  u32 heads, kv_heads, splits, passes, tokens, capacity;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, AT_A_TIME) exact_decode(const ExactArgs a) {
  __shared__ float results[WARPS][GROUP][DIM];
  __shared__ float states[WARPS][GROUP][2];
  let_next_start();
  wait_for_former();
  const u32 tokens = a.after ? *a.after : a.tokens;
  const u32 lane = lane_id(), warp = threadIdx.x / 32, part = lane % LANES, row = lane / LANES;
  const u32 kv_head = blockIdx.y / a.passes, split = blockIdx.x, seq = blockIdx.z;
  const u32 first_head = kv_head * a.passes * GROUP + blockIdx.y % a.passes * GROUP;
  const uint4* keys = (const uint4*)(a.rows + seq * a.next + (u64)kv_head * a.capacity * DIM) + part;
  const uint4* values = keys + (u64)a.kv_heads * a.capacity * DIM / 8;
  float q[GROUP][8], o[GROUP][8], top[GROUP], sum[GROUP];
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    top[h] = NONE, sum[h] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) q[h][i] = a.q[((u64)seq * a.heads + first_head + h) * DIM + part * 8 + i], o[h][i] = 0;
  }
  const u32 step = AT_ONCE * ROWS, chunks = (tokens + step - 1) / step;
  const u32 each = (chunks + a.splits - 1) / a.splits;
  const u32 to = min(chunks, split * each + each);
  for (u32 chunk = split * each + warp; chunk < to; chunk += WARPS) {
    uint4 k[ROWS], v[ROWS];
    const u32 t0 = chunk * step + row;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const u64 t = min(t0 + r * AT_ONCE, tokens - 1);
      k[r] = __ldcs(keys + t * LANES);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const u64 t = min(t0 + r * AT_ONCE, tokens - 1);
      v[r] = __ldcs(values + t * LANES);
    }
    float x[GROUP][ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float f[8] = {low_float(k[r].x), high_float(k[r].x), low_float(k[r].y), high_float(k[r].y),
                          low_float(k[r].z), high_float(k[r].z), low_float(k[r].w), high_float(k[r].w)};
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) s += q[h][i] * f[i];
#pragma unroll
        for (int i = LANES / 2; i; i /= 2) s += __shfl_xor_sync(WARP, s, i);
        x[h][r] = t0 + r * AT_ONCE < tokens ? s : NONE;
      }
    }
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
      float m = top[h];
#pragma unroll
      for (int r = 0; r < ROWS; r++) m = fmaxf(m, x[h][r]);
      const float f = power2(top[h] - m);
      top[h] = m, sum[h] *= f;
#pragma unroll
      for (int i = 0; i < 8; i++) o[h][i] *= f;
#pragma unroll
      for (int r = 0; r < ROWS; r++) x[h][r] = x[h][r] == NONE ? 0 : power2(x[h][r] - m), sum[h] += x[h][r];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float f[8] = {low_float(v[r].x), high_float(v[r].x), low_float(v[r].y), high_float(v[r].y),
                          low_float(v[r].z), high_float(v[r].z), low_float(v[r].w), high_float(v[r].w)};
#pragma unroll
      for (int h = 0; h < GROUP; h++)
#pragma unroll
        for (int i = 0; i < 8; i++) o[h][i] += x[h][r] * f[i];
    }
  }
  // The rows of a warp, then the warps.
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
#pragma unroll
    for (int j = LANES; j < 32; j *= 2) {
      float m, f0, f1;
      merge_factors(top[h], __shfl_xor_sync(WARP, top[h], j), &m, &f0, &f1);
      sum[h] = sum[h] * f0 + __shfl_xor_sync(WARP, sum[h], j) * f1;
#pragma unroll
      for (int i = 0; i < 8; i++) o[h][i] = o[h][i] * f0 + __shfl_xor_sync(WARP, o[h][i], j) * f1;
      top[h] = m;
    }
    if (row == 0)
#pragma unroll
      for (int i = 0; i < 8; i++) results[warp][h][part * 8 + i] = o[h][i];
    if (lane == 0) states[warp][h][0] = top[h], states[warp][h][1] = sum[h];
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < GROUP * DIM; i += WARPS * 32) {
    const u32 h = i / DIM;
    float m = NONE, l = 0, x = 0;
    for (u32 w = 0; w < WARPS; w++) m = fmaxf(m, states[w][h][0]);
    for (u32 w = 0; w < WARPS; w++) {
      const float f = power2(states[w][h][0] - m);
      l += states[w][h][1] * f, x += results[w][h][i % DIM] * f;
    }
    const u64 at = ((u64)seq * a.heads + first_head + h) * a.splits + split;
    a.out[at * DIM + i % DIM] = x;
    if (i % DIM == 0) a.sums[at * 2] = m, a.sums[at * 2 + 1] = l;
  }
}
