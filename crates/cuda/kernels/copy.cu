// What the memory can do: reads and writes counted both.
extern "C" __global__ void copy(const uint4* __restrict__ from, uint4* __restrict__ to, u64 n) {
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) to[i] = __ldcs(from + i);
}

// Numbers like a model's: about normal, from a hash of the place.
extern "C" __global__ void noise(float* out, u64 n, u32 seed, float size) {
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u64 z = (i + (u64)seed * 0x100000001ull) * 0x9E3779B97F4A7C15ull;
    float sum = 0;
    for (int k = 0; k < 4; k++) {
      z ^= z >> 29, z *= 0xBF58476D1CE4E5B9ull, z ^= z >> 32;
      sum += (float)(u32)z * (1.0f / 4294967296.0f) - 0.5f;
    }
    out[i] = sum * 1.7320508f * size;
  }
}
