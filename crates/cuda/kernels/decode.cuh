// What the decode kernel works in, and how it ends. A block of threads has tables that its warps share, then each warp's own
// part.
#define SETS ((GROUP + 3) / 4)
#define TURN_BYTES (TURNED * 4096)
#define TURN 0
#define PLACES (TURN + TURN_BYTES)
#define UNITS_SZ (PLACES + DIM * 128)
#define QUERIES (UNITS_SZ + DIM * 4)
#define REACH (QUERIES + GROUP * DIM * 4)
#define POSTS (REACH + 32)
#define BASIS (POSTS + 32)
#define TERM_TABLE (BASIS + (SERIES ? 2048 : 0))
#define COLUMNS (TERM_TABLE + (SERIES ? TERMS * DIM * 2 : 0))
#define WARP_PARTS (COLUMNS + SERIES * 6 * 512)
// of a warp
#define NEAR_OUTLIERS 128
#define KEY_CODES 0
#define KEY_OUTLIERS (KEY_CODES + UNIT_BYTES)
#define ANGLES (KEY_OUTLIERS + NEAR_OUTLIERS * 4)
#define VALUE_CODES (ANGLES + DIM * 4)
#define SCALES (VALUE_CODES + UNIT_BYTES)
#define VALUE_OUTLIERS (SCALES + 256)
#define SCORES (VALUE_OUTLIERS + NEAR_OUTLIERS * 4)
#define KEY_SUMS (SCORES + GROUP * 256)
#define WEIGHTS (KEY_SUMS + GROUP * 256)
#define VALUE_SUMS (WEIGHTS + GROUP * 128)
#define LOCAL_QUERY (VALUE_SUMS + GROUP * DIM * 4)
#define FACTORS (LOCAL_QUERY + GROUP * DIM * 2)
#define WARP_BYTES (FACTORS + 64)
static_assert(WARP_PARTS + WARPS * WARP_BYTES == SHARED, "the host counts as we do");
static_assert(SERIES == 0 || GROUP == 1, "terms of one query head fill the columns of a product");

struct DecodeArgs {
  const u8* pool;
  const Sequence* sequences;
  const float* q;          // [sequences][heads][DIM], turned, times log2(e) / sqrt(DIM)
  const float4* origins;   // [blocks][DIM / 4]: cos, sin, cos, sin of the middle of each block
  const uint4* turn;       // [DIM / 16][4][32]: cos, sin of token g + 16 m, then of token g + 16 m + 8; two pairs each
  const uint4* places;     // [DIM / 2][16]: cos, sin of 64 places, in fp16
  const float* series;     // [TERMS][DIM / 2]: c_r(theta_i)
  const float4* basis;     // [4][32]: T_r of token g + 16 m for r = 2 q, 2 q + 1, then of token g + 16 m + 8
  const u32* key_posts;    // 2^BITS signposts
  const u32* value_posts;
  const uint4* units;      // [kv_heads][DIM / 4]: scale x, zero x, scale y, zero y; two pairs each; scales of 128 steps
  float* out;              // [sequences][heads][splits][DIM]
  float* sums;             // [sequences][heads][splits][2]: maximum, sum
  float value_step;        // one step of a value's signpost
  u32 heads, kv_heads, splits, passes;
  u32 share;               // of a history that a split has, in 2^-32
};

// Parts of a block's header.
FN u32 count_of(uint4 h, u32 side) { return (side ? h.w : h.y) & 0xffff; }
FN u32 start_of(uint4 h, u32 side) { return side ? h.z : h.x; }
FN float reach_of(uint4 h, u32 side) { return high_float(side ? h.w : h.y); }

// Nearest integer of a number below 2^21.
FN int rounded(float x) { return __float_as_int(x + 12582912.0f) - 0x4b400000; }

// Where a channel's sum of outliers is.
FN u32 place_of(u32 channel) { return channel / 2 + channel % 2 * (DIM / 2); }

// Words of four times two tiles.
FN void load_words(u32* w, const u8* codes, int quad, u32 lane) {
#pragma unroll
  for (int j = 0; j < BITS; j++) {
    const uint4 v = *(const uint4*)(codes + (quad * BITS + j) * 512 + lane * 16);
    w[4 * j] = v.x, w[4 * j + 1] = v.y, w[4 * j + 2] = v.z, w[4 * j + 3] = v.w;
  }
}

// Adds to an integer in shared memory, where `is` says so: without a branch, which pays for one head.
FN void add_if(bool is, int* to, int x) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p red.shared.add.u32 [%1], %2;}" ::"r"((u32)is), "r"(shared_address(to)), "r"(x)
               : "memory");
}

// Adds the outliers of a block's list, of which a warp has copied the near ones: `value(e, x)` says what e adds for each head,
// `to(e)` where, for head 0; heads' sums are `pitch` apart. Most blocks have up to 96, three a lane, which are computed side by
// side whether they are there or not: any word can be computed.
template <class Value, class To>
FN void add_outliers(const u32* near, const u32* far, u32 count, int pitch, u32 lane, Value value, To to) {
  u32 e[3];
  int x[3][GROUP];
#pragma unroll
  for (u32 j = 0; j < 3; j++) e[j] = near[lane + 32 * j];
#pragma unroll
  for (u32 j = 0; j < 3; j++) value(e[j], x[j]);
#pragma unroll
  for (u32 j = 0; j < 3; j++)
#pragma unroll
    for (int h = 0; h < GROUP; h++)
      if (GROUP == 1) add_if(lane + 32 * j < count, to(e[j]), x[j][0]);
      else if (lane + 32 * j < count) atomicAdd(to(e[j]) + h * pitch, x[j][h]);
#pragma unroll 1
  for (u32 i = 96 + lane; i < count; i += 32) {
    const u32 one = i < NEAR_OUTLIERS ? near[i] : far[i];
    value(one, x[0]);
#pragma unroll
    for (int h = 0; h < GROUP; h++) atomicAdd(to(one) + h * pitch, x[0][h]);
  }
}

// A warp's copy of up to 512 bytes, in pieces of 16.
FN void fetch_few(u8* to, const void* from, u32 bytes, u32 lane) {
  if (lane * 16 < bytes) copy16(to + lane * 16, (const u8*)from + lane * 16);
}
template <u32 BYTES> FN void fetch(u8* to, const void* from, u32 lane) {
#pragma unroll
  for (u32 i = 0; i < BYTES / 512; i++) copy16(to + i * 512 + lane * 16, (const u8*)from + i * 512 + lane * 16);
  if (BYTES % 512) fetch_few(to + BYTES / 512 * 512, (const u8*)from + BYTES / 512 * 512, BYTES % 512, lane);
}

// Special registers are read again, so that the loop need not keep what is made of them.
#define READ_AGAIN(name, special)                          \
  FN u32 name() {                                          \
    u32 r;                                                 \
    asm volatile("mov.u32 %0, %%" special ";" : "=r"(r));  \
    return r;                                              \
  }
READ_AGAIN(thread_again, "tid.x")
READ_AGAIN(heads_again, "ctaid.x")
READ_AGAIN(split_again, "ctaid.y")
READ_AGAIN(sequence_again, "ctaid.z")
// So is what a sequence says of its exact rows.
FN void read_exact_again(const Sequence* s, const u16*& rows, u32& count, u32& capacity) {
  asm volatile("ld.global.u64 %0, [%1];" : "=l"(rows) : "l"(&s->exact));
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(count), "=r"(capacity) : "l"(&s->exact_rows));
}

// This warp's state with its sums of outliers, in units of `unit`, and with exact rows, then all warps' merged.
FN void finish(const DecodeArgs& a, u8* own, const float (&o)[SETS][DIM / 16][2], float (&top)[GROUP],
               float (&sum)[GROUP], const float (&zeros)[GROUP], float unit) {
  const u32 thread = thread_again(), lane = thread % 32, warp = thread / 32, g = lane / 4, tq = lane % 4;
  const u32 split = split_again(), heads = heads_again(), kv_head = heads / a.passes, seq = sequence_again();
  u8* const shared = own - warp * WARP_BYTES - WARP_PARTS;
  float *const result = (float*)own, *const factors = (float*)(own + FACTORS);
  const float* const queries = (const float*)(shared + QUERIES);
  const int* const value_sums = (const int*)(own + VALUE_SUMS);
#pragma unroll
  for (int e = 0; e < SETS; e++)
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 h = 4 * e + tq, c = 16 * i + j * 8 + g;
        if (h < GROUP) result[h * DIM + c] = o[e][i][j];
      }
  __syncwarp();
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    const float z = warp_sum(zeros[h]);
    for (u32 c = lane; c < DIM; c += 32) result[h * DIM + c] += z + unit * value_sums[h * DIM + place_of(c)];
  }
  __syncwarp();
  // The exact rows before the first block.
  if (split == 0) {
    const u16* exact;
    u32 rows, capacity;
    read_exact_again(a.sequences + seq, exact, rows, capacity);
    for (u32 r = warp; r < rows; r += WARPS) {
      constexpr int N = DIM / 32;
      const u16* key = exact + ((u64)kv_head * capacity + r) * DIM + lane * N;
      const u16* value = key + (u64)a.kv_heads * capacity * DIM;
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        float x = 0;
#pragma unroll
        for (int i = 0; i < N; i++) x += queries[h * DIM + lane * N + i] * half_float(key[i]);
        x = warp_sum(x);
        float m = fmaxf(top[h], x), f = power2(top[h] - m), p = power2(x - m);
        top[h] = m;
        sum[h] = sum[h] * f + (lane == 0 ? p : 0);
#pragma unroll
        for (int i = 0; i < N; i++) {
          float* e = result + h * DIM + lane * N + i;
          *e = *e * f + p * half_float(value[i]);
        }
      }
    }
  }
  __syncwarp();

#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    const float l = warp_sum(sum[h]);
    if (lane == 0) factors[2 * h] = top[h], factors[2 * h + 1] = l;
  }
  __syncthreads();
  for (u32 i = thread; i < GROUP * DIM; i += WARPS * 32) {
    const u32 h = i / DIM;
    float m = NONE, l = 0, x = 0;
#pragma unroll 4
    for (u32 w = 0; w < WARPS; w++) m = fmaxf(m, ((float*)(shared + WARP_PARTS + w * WARP_BYTES + FACTORS))[2 * h]);
#pragma unroll 4
    for (u32 w = 0; w < WARPS; w++) {
      const u8* part = shared + WARP_PARTS + w * WARP_BYTES;
      const float f = power2(((const float*)(part + FACTORS))[2 * h] - m);
      l += ((const float*)(part + FACTORS))[2 * h + 1] * f;
      x += ((const float*)part)[i] * f;
    }
    const u32 head = heads * GROUP + h;
    const u64 at = ((u64)seq * a.heads + head) * a.splits + split;
    a.out[at * DIM + i % DIM] = x;
    if (i % DIM == 0) a.sums[at * 2] = m, a.sums[at * 2 + 1] = l;
  }
}
