// Units back to numbers: each dense value as the CPU has it, step by step in f32, plus its outlier's residual. Prefill
// attention reads the result, fp16 rows with keys turned to their positions; tests read the f32 form.
// grid: (blocks, kv_heads, 2), 128 threads

struct DenseArgs {
  const u8* pool;
  const Sequence* sequence;
  const float* key_posts;    // [CHANNELS][2^BITS]
  const float* value_posts;  // [2^BITS]
  const float2* origins;     // [blocks][DIM / 2] cos, sin of each block's first position
  const float2* places;      // [64][DIM / 2] cos, sin of each place in a block
  u32* halves;               // [2][kv_heads][rows][DIM] fp16, or null
  float* floats;             // [2][kv_heads][rows][DIM] f32, keys not turned, or null
  u32 first_block, rows;
};

extern "C" __global__ void __launch_bounds__(128) dense(const DenseArgs a) {
  extern __shared__ __align__(16) float tile[];  // [64][DIM + 4]
  constexpr u32 PITCH = DIM + 4;
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
      const u32 code = get_code(unit, side ? value_spot(c, t) : key_spot(c, t));
      x = side ? __fadd_rn(__fmul_rn(low_float(scales[t]), a.value_posts[code]), high_float(scales[t]))
               : a.key_posts[(head * DIM + c) << BITS | code];
    }
    tile[t * PITCH + c] = x;
  }
  __syncthreads();
  const u32* header = (const u32*)(record + header_at(kv_heads, head)) + 2 * side;
  const u32 start = header[0], count = header[1] & 0xffff;
  const u32* list = start & IN_OPEN ? s.open + (start & ~IN_OPEN) : s.arena + start;
  for (u32 i = threadIdx.x; i < count; i += 128) {
    const u32 e = list[i];
    float* x = tile + outlier_token(e) * PITCH + outlier_channel(e);
    *x = __fadd_rn(*x, high_float(e));
  }
  __syncthreads();
  const u64 out = (((u64)side * kv_heads + head) * a.rows + (u64)blockIdx.x * 64) * (DIM / 2);
  for (u32 i = threadIdx.x; i < 64 * DIM / 2; i += 128) {
    const u32 t = i / (DIM / 2), pair = i % (DIM / 2);
    if (blockIdx.x * 64 + t >= a.rows) continue;
    float x = tile[t * PITCH + 2 * pair], y = tile[t * PITCH + 2 * pair + 1];
    if (a.floats) ((float2*)a.floats)[out + i] = make_float2(x, y);
    if (a.halves) {
      if (side == 0) {
        const float2 p = a.origins[(u64)block * (DIM / 2) + pair], j = a.places[t * (DIM / 2) + pair];
        turn_pair(x, y, p.x * j.x - p.y * j.y, p.y * j.x + p.x * j.y, &x, &y);
      }
      a.halves[out + i] = pack_halves(x, y);
    }
  }
}
