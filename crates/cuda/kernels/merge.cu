// Partial states of splits to one output row: out = sum f_i o_i / sum f_i l_i. One block a row, one thread a channel.
extern "C" __global__ void merge(const float* __restrict__ parts, const float* __restrict__ sums, float* __restrict__ out,
                                 u32 splits) {
  const u64 row = blockIdx.x;
  const u32 c = threadIdx.x;
  float m = NONE, l = 0, x = 0;
  for (u32 i = 0; i < splits; i++) {
    const u64 at = row * splits + i;
    float to, f0, f1;
    merge_factors(m, sums[at * 2], &to, &f0, &f1);
    m = to, l = l * f0 + sums[at * 2 + 1] * f1, x = x * f0 + parts[at * DIM + c] * f1;
  }
  out[row * DIM + c] = l > 0 ? x / l : 0;
}
