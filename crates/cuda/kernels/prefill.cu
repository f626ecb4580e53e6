// Many query rows of one head against fp16 rows, KEYS keys at a time, through the tensor cores. Compressed history comes as
// fp16 rows too, section by section (dense.cu): the cost of decoding it is shared by all query rows.
// Between sections a row's state (maximum, sum, output) stays in memory, so that any number of sections follow.
// A block of 8 warps has 128 rows. Rows of shared memory are swizzled: piece i of row r lies at i ^ (r % 8).
#define ROWS 128
#define KEYS (DIM > 128 ? 32 : 64)  // twice that many keys and values fit the shared memory of every card since sm_80
#define PIECES (DIM / 8)
#define ROW_BYTES (DIM * 2)

struct PrefillArgs {
  const u8* q;      // [heads][query_capacity][DIM] fp16, turned, times log2(e) / sqrt(DIM)
  const u8* rows;   // [2][kv_heads][capacity][DIM] fp16, keys turned
  float* out;       // [heads][queries][DIM]
  float* sums;      // [heads][queries][2]
  u32 queries, query_capacity, keys, capacity, group, kv_heads;
  int visible;      // keys that query 0 sees; each later one sees one more
  u32 first;        // whether there is no state yet
  u32 last;         // whether to divide by the sum
};

FN void load_matrices(u32* r, const u8* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
FN void load_transposed(u32* r, const u8* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
FN u32 piece_at(u32 row, u32 piece) { return row * ROW_BYTES + (piece ^ row % 8) * 16; }

FN void fetch_rows(u8* to, const u8* from, u32 rows, u32 there) {
  for (u32 i = threadIdx.x; i < rows * PIECES; i += blockDim.x) {
    const u32 row = i / PIECES, piece = i % PIECES;
    u8* at = to + piece_at(row, piece);
    if (row < there) copy16(at, from + (u64)row * ROW_BYTES + piece * 16);
    else *(uint4*)at = make_uint4(0, 0, 0, 0);
  }
}

extern "C" __global__ void __launch_bounds__(256, 1) prefill(const PrefillArgs a) {
  extern __shared__ __align__(1024) u8 shared[];  // queries [128][DIM], then keys and values [KEYS][DIM], twice
  u8* const sq = shared;
  u8* const sk = shared + ROWS * ROW_BYTES;
  u8* const sv = sk + 2 * KEYS * ROW_BYTES;
  const u32 lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, tq = lane % 4;
  // The longest rows first.
  const u32 tile = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, kv_head = head / a.group, q0 = tile * ROWS;
  const u8* keys = a.rows + (u64)kv_head * a.capacity * ROW_BYTES;
  const u8* values = keys + (u64)a.kv_heads * a.capacity * ROW_BYTES;
  const int seen = min((int)a.keys, a.visible + (int)min(q0 + ROWS, a.queries) - 1);
  const int tiles = seen > 0 ? (seen + KEYS - 1) / KEYS : 0;

  fetch_rows(sq, a.q + ((u64)head * a.query_capacity + q0) * ROW_BYTES, ROWS, min(ROWS, a.queries - q0));
  if (tiles > 0) {
    fetch_rows(sk, keys, KEYS, min(KEYS, a.keys));
    fetch_rows(sv, values, KEYS, min(KEYS, a.keys));
  }
  copy_commit();

  float o[DIM / 8][4], top[2], sum[2];
  const u32 mine = q0 + warp * 16 + g;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 r = mine + 8 * i;
    const bool old = !a.first && r < a.queries;
    top[i] = old ? a.sums[((u64)head * a.queries + r) * 2] : NONE;
    // Lanes of a row hold parts of its sum.
    sum[i] = old && tq == 0 ? a.sums[((u64)head * a.queries + r) * 2 + 1] : 0;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
      float2 v = make_float2(0, 0);
      if (old) v = *(const float2*)(a.out + ((u64)head * a.queries + r) * DIM + n * 8 + 2 * tq);
      o[n][2 * i] = v.x, o[n][2 * i + 1] = v.y;
    }
  }
  for (int j = 0; j < tiles; j++) {
    if (j + 1 < tiles) {
      const u32 at = (j + 1) * KEYS, there = min(KEYS, a.keys - at);
      fetch_rows(sk + (j + 1) % 2 * KEYS * ROW_BYTES, keys + (u64)at * ROW_BYTES, KEYS, there);
      fetch_rows(sv + (j + 1) % 2 * KEYS * ROW_BYTES, values + (u64)at * ROW_BYTES, KEYS, there);
    }
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    const u8* k = sk + j % 2 * KEYS * ROW_BYTES;
    const u8* v = sv + j % 2 * KEYS * ROW_BYTES;
    float s[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll(DIM > 128 ? 4 : DIM / 16)
    for (int c = 0; c < DIM / 16; c++) {
      u32 qa[4];
      load_matrices(qa, sq + piece_at(warp * 16 + lane % 16, c * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        u32 b[4];
        load_matrices(b, k + piece_at(n * 16 + lane / 16 * 8 + lane % 8, c * 2 + lane / 8 % 2));
        mma(s[2 * n], qa[0], qa[1], qa[2], qa[3], b[0], b[1]);
        mma(s[2 * n + 1], qa[0], qa[1], qa[2], qa[3], b[2], b[3]);
      }
    }
    const int first_key = j * KEYS;
    const bool whole = first_key + KEYS <= min((int)a.keys, a.visible + (int)(q0 + warp * 16));
    if (!whole)
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = first_key + n * 8 + 2 * tq + i % 2, row = (int)mine + i / 2 * 8;
          if (key >= (int)a.keys || key >= a.visible + row) s[n][i] = NONE;
        }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float m = top[i];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) m = fmaxf(m, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      m = fmaxf(m, __shfl_xor_sync(WARP, m, 1));
      m = fmaxf(m, __shfl_xor_sync(WARP, m, 2));
      const float f = power2(top[i] - m), low = m == NONE ? 0 : m;
      top[i] = m, sum[i] *= f;
#pragma unroll
      for (int n = 0; n < DIM / 8; n++) o[n][2 * i] *= f, o[n][2 * i + 1] *= f;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; e++) s[n][e] = power2(s[n][e] - low), sum[i] += s[n][e];
    }
#pragma unroll
    for (int c = 0; c < KEYS / 16; c++) {
      const u32 p0 = pack_halves(s[2 * c][0], s[2 * c][1]), p1 = pack_halves(s[2 * c][2], s[2 * c][3]);
      const u32 p2 = pack_halves(s[2 * c + 1][0], s[2 * c + 1][1]), p3 = pack_halves(s[2 * c + 1][2], s[2 * c + 1][3]);
#pragma unroll
      for (int n = 0; n < DIM / 16; n++) {
        u32 b[4];
        load_transposed(b, v + piece_at(c * 16 + lane % 16, n * 2 + lane / 16));
        mma(o[2 * n], p0, p1, p2, p3, b[0], b[1]);
        mma(o[2 * n + 1], p0, p1, p2, p3, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  copy_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 r = mine + 8 * i;
    float l = sum[i];
    l += __shfl_xor_sync(WARP, l, 1);
    l += __shfl_xor_sync(WARP, l, 2);
    const float f = !a.last ? 1 : l > 0 ? 1 / l : 0;
    if (r < a.queries) {
#pragma unroll
      for (int n = 0; n < DIM / 8; n++)
        *(float2*)(a.out + ((u64)head * a.queries + r) * DIM + n * 8 + 2 * tq) =
            make_float2(o[n][2 * i] * f, o[n][2 * i + 1] * f);
      if (tq == 0) a.sums[((u64)head * a.queries + r) * 2] = top[i], a.sums[((u64)head * a.queries + r) * 2 + 1] = l;
    }
  }
}
