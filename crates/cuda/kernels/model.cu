// What lies between the products of a forward pass. The residual stream and sums are f32, what products read is fp16.

#define THREADS 256

// Over a block of up to 1024 threads; `parts` may be used again after the next barrier.
template <class Op> FN float block_reduce(float x, float* parts, Op op) {
  for (int i = 16; i; i /= 2) x = op(x, __shfl_xor_sync(WARP, x, i));
  if (lane_id() == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (u32 i = 1; i < blockDim.x / 32; i++) x = op(x, parts[i]);
  return x;
}
FN float block_sum(float x, float* parts) {
  return block_reduce(x, parts, [](float a, float b) { return a + b; });
}
FN float block_max(float x, float* parts) {
  return block_reduce(x, parts, [](float a, float b) { return fmaxf(a, b); });
}
FN bool is_finite(float x) { return fabsf(x) <= 3.4028235e38f; }

// The rows of the table that tokens name, as the residual stream. A block of threads a token.
extern "C" __global__ void __launch_bounds__(THREADS) embed(const u32* tokens, const u16* table, float* x, u32 n, float scale) {
  let_next_start();
  wait_for_former();
  const u16* row = table + (u64)tokens[blockIdx.x] * n;
  for (u32 i = threadIdx.x; i < n; i += THREADS) x[(u64)blockIdx.x * n + i] = half_float(row[i]) * scale;
}

struct NormArgs {
  float* x;             // [rows][n], the residual stream
  const float* y;       // [rows][n], added to it; or null
  const float* scales;  // [rows], what y is to be multiplied with; or null for 1
  const float* post;    // [n], y is normed with these weights before; or null
  const float* weight;  // [n], of the norm; or null for none
  u32* out;             // [rows][n] fp16, the norm of the sum
  u32* status;          // the first layer whose sum is not finite
  u32 layer, n;         // n is even
  float eps;
};

// The residual sum and the norm after it. A block of threads a row.
extern "C" __global__ void __launch_bounds__(THREADS) add_norm(const NormArgs a) {
  let_next_start();
  wait_for_former();
  __shared__ float parts[2][THREADS / 32];
  const u32 pairs = a.n / 2;
  float2* x = (float2*)(a.x + (u64)blockIdx.x * a.n);
  float sum = 0;
  if (a.y) {
    const float2* y = (const float2*)(a.y + (u64)blockIdx.x * a.n);
    float by = a.scales ? a.scales[blockIdx.x] : 1;
    if (a.post) {
      float squares = 0;
      for (u32 i = threadIdx.x; i < pairs; i += THREADS) {
        const float2 v = y[i];
        squares += v.x * by * (v.x * by) + v.y * by * (v.y * by);
      }
      squares = block_sum(squares, parts[0]);
      by /= sqrtf(squares / a.n + a.eps);
    }
    for (u32 i = threadIdx.x; i < pairs; i += THREADS) {
      float2 v = y[i], s = x[i];
      v.x *= by, v.y *= by;
      if (a.post) {
        const float2 w = ((const float2*)a.post)[i];
        v.x *= w.x, v.y *= w.y;
      }
      s.x += v.x, s.y += v.y;
      if (!is_finite(s.x) || !is_finite(s.y)) atomicMin(a.status, a.layer);
      x[i] = s;
      sum += s.x * s.x + s.y * s.y;
    }
  } else {
    for (u32 i = threadIdx.x; i < pairs; i += THREADS) {
      const float2 s = x[i];
      sum += s.x * s.x + s.y * s.y;
    }
  }
  if (!a.weight) return;
  sum = block_sum(sum, parts[1]);
  const float by = 1 / sqrtf(sum / a.n + a.eps);
  u32* out = a.out + (u64)blockIdx.x * pairs;
  for (u32 i = threadIdx.x; i < pairs; i += THREADS) {
    const float2 s = x[i], w = ((const float2*)a.weight)[i];
    out[i] = pack_halves(s.x * by * w.x, s.y * by * w.y);
  }
}

struct HeadsArgs {
  const float* qkv;      // [rows][(heads + 2 * kv_heads) * DIM]
  const float* bias;     // [(heads + 2 * kv_heads) * DIM]; or null
  const float* q_norm;   // [DIM], norm of every head; or null
  const float* k_norm;
  const float* q_scale;  // [DIM], what queries are multiplied with after the norm; or null
  const float2* angles;  // [rows][DIM / 2] cos, sin: queries are turned; or null
  float* q;              // [rows][heads][DIM], times `scale`
  float* k;              // [rows][kv_heads][DIM]
  float* v;              // [rows][kv_heads][DIM]
  u32 heads, kv_heads;
  float scale, eps;
};

// One product's rows to queries, keys and values. grid: (heads + 2 * kv_heads, rows), a thread for a pair of channels.
extern "C" __global__ void __launch_bounds__(DIM / 2) heads(const HeadsArgs a) {
  let_next_start();
  wait_for_former();
  __shared__ float parts[DIM / 64];
  const u32 head = blockIdx.x, row = blockIdx.y, i = threadIdx.x, all = a.heads + 2 * a.kv_heads;
  float2 x = ((const float2*)a.qkv)[((u64)row * all + head) * (DIM / 2) + i];
  if (a.bias) {
    const float2 b = ((const float2*)a.bias)[head * (DIM / 2) + i];
    x.x += b.x, x.y += b.y;
  }
  const bool is_q = head < a.heads, is_k = !is_q && head < a.heads + a.kv_heads;
  const float* norm = is_q ? a.q_norm : is_k ? a.k_norm : nullptr;
  if (norm) {
    const float by = 1 / sqrtf(block_sum(x.x * x.x + x.y * x.y, parts) / DIM + a.eps);
    const float2 w = ((const float2*)norm)[i];
    x.x *= by * w.x, x.y *= by * w.y;
  }
  if (is_q) {
    if (a.q_scale) {
      const float2 s = ((const float2*)a.q_scale)[i];
      x.x *= s.x, x.y *= s.y;
    }
    if (a.angles) {
      const float2 t = a.angles[row * (DIM / 2) + i];
      turn_pair(x.x, x.y, t.x, t.y, &x.x, &x.y);
    }
    ((float2*)a.q)[((u64)row * a.heads + head) * (DIM / 2) + i] = make_float2(x.x * a.scale, x.y * a.scale);
  } else {
    const u32 h = head - a.heads - (is_k ? 0 : a.kv_heads);
    ((float2*)(is_k ? a.k : a.v))[((u64)row * a.kv_heads + h) * (DIM / 2) + i] = x;
  }
}

// Attention's output in fp16 [rows][heads][DIM], from f32 [heads][rows][DIM]; n pairs.
extern "C" __global__ void __launch_bounds__(THREADS) attended(const float* x, u32* out, u32 rows, u32 heads, u32 n) {
  let_next_start();
  wait_for_former();
  const u32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= n) return;
  const u32 pair = i % (DIM / 2), head = i / (DIM / 2) % heads, row = i / (DIM / 2) / heads;
  const float2 v = ((const float2*)x)[(head * (u64)rows + row) * (DIM / 2) + pair];
  out[i] = pack_halves(v.x, v.y);
}

FN float gated(float g, float u, u32 gelu) {
  // tanh's GELU is x times the logistic function of twice what the tangent takes.
  const float t = gelu ? 1.5957691216f * (g + 0.044715f * g * g * g) : g;
  return g / (1 + expf(-t)) * u;
}

// An MLP's gate times its other half, in fp16, divided by a power of two of the row's own where it would not fit.
// gate_up [rows][2][n], out [rows][n], scales [rows]; n is even. A block of threads a row.
extern "C" __global__ void __launch_bounds__(1024) gate(const float* gate_up, u32* out, float* scales, u32 n, u32 gelu) {
  let_next_start();
  wait_for_former();
  __shared__ float parts[32];
  const float2* g = (const float2*)(gate_up + (u64)blockIdx.x * 2 * n);
  const float2* u = g + n / 2;
  float most = 0;
  for (u32 i = threadIdx.x; i < n / 2; i += blockDim.x)
    most = fmaxf(most, fmaxf(fabsf(gated(g[i].x, u[i].x, gelu)), fabsf(gated(g[i].y, u[i].y, gelu))));
  most = block_max(most, parts);
  const int down = most < 16384 ? 0 : exponent_of(most) - 13;
  const float by = exponent(-down);
  if (threadIdx.x == 0) scales[blockIdx.x] = exponent(down);
  for (u32 i = threadIdx.x; i < n / 2; i += blockDim.x)
    out[(u64)blockIdx.x * (n / 2) + i] =
        pack_halves(gated(g[i].x, u[i].x, gelu) * by, gated(g[i].y, u[i].y, gelu) * by);
}
