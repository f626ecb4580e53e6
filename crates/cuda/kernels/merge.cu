// Partial states of splits to one output row: out = sum f_i o_i / sum f_i l_i. One block a row, one thread a channel.
#define MOST_SPLITS 256

extern "C" __global__ void merge(const float* __restrict__ parts, const float* __restrict__ sums, float* __restrict__ out,
                                 u32 splits) {
  __shared__ float factors[MOST_SPLITS];
  __shared__ float total;
  const u64 first = (u64)blockIdx.x * splits;
  const u32 c = threadIdx.x;
  if (c < 32) {
    float m = NONE, l = 0;
    for (u32 i = c; i < splits; i += 32) m = fmaxf(m, sums[(first + i) * 2]);
    m = warp_max(m);
    for (u32 i = c; i < splits; i += 32) {
      float to, none, f;
      merge_factors(m, sums[(first + i) * 2], &to, &none, &f);
      factors[i] = f, l += f * sums[(first + i) * 2 + 1];
    }
    l = warp_sum(l);
    if (c == 0) total = l;
  }
  __syncthreads();
  float x = 0;
#pragma unroll 8
  for (u32 i = 0; i < splits; i++) x += factors[i] * parts[(first + i) * DIM + c];
  out[(u64)blockIdx.x * DIM + c] = total > 0 ? x / total : 0;
}
