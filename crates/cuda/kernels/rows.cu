// Rows turned to their positions: queries for the attention kernels, and keys and values that stay in fp16.
// x [tokens][heads][DIM], angles [tokens][DIM / 2] (cos, sin). A thread has one pair.

FN void turned(const float* x, const float2* angles, u32 heads, u32 i, float* tx, float* ty) {
  const u32 pair = i % (DIM / 2), token = i / (DIM / 2) / heads;
  const float2 v = ((const float2*)x)[i];
  *tx = v.x, *ty = v.y;
  if (angles) {
    const float2 t = angles[token * (DIM / 2) + pair];
    turn_pair(v.x, v.y, t.x, t.y, tx, ty);
  }
}

// Queries for decoding: f32, in place order, times `scale`.
extern "C" __global__ void turn_queries(const float* x, const float2* angles, float* out, float scale, u32 heads, u32 n) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float tx, ty;
  turned(x, angles, heads, i, &tx, &ty);
  ((float2*)out)[i] = make_float2(tx * scale, ty * scale);
}

// Rows into fp16 tables [heads][capacity][DIM] from row `first` on, or, of a single token, into the last of `after` rows. In a grid
// of two rows also values, which are not turned, into a second table behind the first.
extern "C" __global__ void store_rows(const float* x, const float* values, const float2* angles, u32* out, const u32* after,
                                      float scale, u32 heads, u32 first, u32 capacity, u32 n) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  let_next_start();
  wait_for_former();
  if (after) first = *after - 1;
  if (blockIdx.y) x = values, angles = nullptr, out += (u64)heads * capacity * (DIM / 2);
  if (i >= n) return;
  const u32 pair = i % (DIM / 2), head = i / (DIM / 2) % heads, token = i / (DIM / 2) / heads;
  float tx, ty;
  turned(x, angles, heads, i, &tx, &ty);
  out[((u64)head * capacity + first + token) * (DIM / 2) + pair] = pack_halves(tx * scale, ty * scale);
}
