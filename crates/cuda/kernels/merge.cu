// Partial states of splits to one output row: out = sum f_i o_i / sum f_i l_i. One block a row, one thread a channel.
#define MOST_SPLITS 256

struct MergeArgs {
  const float* parts;  // [rows][splits][DIM]
  const float* sums;   // [rows][splits][2]
  void* out;           // [rows][DIM], f32 or fp16
  u32 splits, halves;
};

extern "C" __global__ void merge(const MergeArgs a) {
  const float *parts = a.parts, *sums = a.sums;
  const u32 splits = a.splits;
  __shared__ float factors[MOST_SPLITS];
  __shared__ float total;
  const u64 first = (u64)blockIdx.x * splits;
  const u32 c = threadIdx.x;
  let_next_start();
  wait_for_former();
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
  x = total > 0 ? x / total : 0;
  const u64 at = (u64)blockIdx.x * DIM + c;
  if (a.halves) ((u16*)a.out)[at] = float_half(x);
  else ((float*)a.out)[at] = x;
}
