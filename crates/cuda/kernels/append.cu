// New tokens to codes. `ranges` finds each token's value scale and the bounds of its outliers; `append` quantizes and packs
// them, a block of threads for one KV head's keys or values in one block of tokens, a warp for 16 channels. Codes, scales and outliers are those of
// kvquant_quant::SideQuantizer, bit for bit: every product and sum is rounded by itself.
// CHANNELS = kv_heads * head_dim.

// A token's values: an entry is an outlier if its (rank, channel) is at most (low, low_at), or its rank is above `high`,
// or equal to it at a channel up to high_at.
struct Range {
  u32 low, high;
  int low_at, high_at;
  u32 scale;  // fp16 scale | fp16 zero << 16
};

// Threads that look for a token's range.
#define RANGE_THREADS (CHANNELS >= 4096 ? 1024 : CHANNELS >= 2048 || DIM == 256 ? 512 : 256)
#define EACH ((CHANNELS + RANGE_THREADS - 1) / RANGE_THREADS)

// A thread's entries: their places in order, and which there are.
struct Entries {
  u32 rank[EACH];
  u32 real;
};
FN u32 channel_of(int i) { return threadIdx.x * EACH + i; }
// Whether there is an i-th: always, where threads divide the channels.
FN bool is_real(int i) { return CHANNELS % RANGE_THREADS == 0 || channel_of(i) < CHANNELS; }
FN float value_of(u32 rank) { return __uint_as_float(rank >> 31 ? rank & 0x7fffffff : ~rank); }

FN u32 least_of(u32 x) { return __reduce_min_sync(WARP, x); }
FN u32 most_of(u32 x) { return __reduce_max_sync(WARP, x); }

// The smallest and the greatest rank among the flagged entries of all threads.
FN uint2 ends_of(const Entries& e, u32 flags) {
  __shared__ uint2 ends[RANGE_THREADS / 32];
  const u32 lane = lane_id();
  u32 least = 0xffffffffu, most = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (flags >> i & 1) least = min(least, e.rank[i]), most = max(most, e.rank[i]);
  least = least_of(least), most = most_of(most);
  if (lane == 0) ends[threadIdx.x / 32] = make_uint2(least, most);
  __syncthreads();
  const uint2 all = lane < RANGE_THREADS / 32 ? ends[lane] : make_uint2(0xffffffffu, 0);
  return make_uint2(least_of(all.x), most_of(all.y));
}

// The sum of what lanes before this one have.
FN u32 sum_before(u32 mine) {
  u32 before = mine;
  for (int i = 1; i < 32; i *= 2) {
    u32 other = __shfl_up_sync(WARP, before, i);
    if (lane_id() >= i) before += other;
  }
  return before - mine;
}

// The channel of the n-th entry (from 1) that a thread flags, in order of channels; -1 for n = 0.
FN int nth_flagged(u32 flags, u32 n, u32* shared, int* found) {
  const u32 warp = threadIdx.x / 32, mine = __popc(flags);
  u32 before = sum_before(mine);
  if (lane_id() == 31) shared[warp] = before + mine;
  if (threadIdx.x == 0) *found = -1;
  __syncthreads();
  for (u32 i = 0; i < warp; i++) before += shared[i];
  if (n > before && n <= before + mine) {
    u32 left = n - before;
    for (int i = 0; i < EACH; i++)
      if (flags >> i & 1 && --left == 0) *found = (int)channel_of(i);
  }
  __syncthreads();
  const int at = *found;
  __syncthreads();
  return at;
}

// For any entries: a byte of their ranks at a time. Sets the outliers of a range; the ends of what is left.
FN uint2 find_by_bytes(const Entries& e, u32 extremes, Range& r) {
  __shared__ u32 counts[2][256];
  __shared__ uint2 chosen[2];
  __shared__ u32 twice;
  __shared__ int found;
  const u32 lane = lane_id(), warp = threadIdx.x / 32;
  // The n-th smallest rank, and of the reversed ranks the n-th smallest; n counts on among equal ones.
  u32 at[2] = {0, 0}, n[2] = {extremes, extremes}, low = 0, high = 0;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < 512; i += RANGE_THREADS) ((u32*)counts)[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int side = 0; side < 2; side++) {
        const u32 y = side ? ~e.rank[i] : e.rank[i];
        if (e.real >> i & 1 && (u64)(y ^ at[side]) >> (shift + 8) == 0) atomicAdd(&counts[side][y >> shift & 255], 1u);
      }
    __syncthreads();
    if (warp < 2) {
      u32 mine = 0;
      for (int i = 0; i < 8; i++) mine += counts[warp][lane * 8 + i];
      u32 before = sum_before(mine);
      const u32 want = warp ? n[1] : n[0];
      if (before < want && want <= before + mine) {
        u32 i = lane * 8;
        while (before + counts[warp][i] < want) before += counts[warp][i++];
        chosen[warp] = make_uint2(i, want - before);
      }
    }
    __syncthreads();
#pragma unroll
    for (int side = 0; side < 2; side++) at[side] |= chosen[side].x << shift, n[side] = chosen[side].y;
  }
  r.low = at[0], r.high = ~at[1];
  if (threadIdx.x == 0) twice = 0;
  u32 same = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (e.real >> i & 1 && e.rank[i] == r.low) same |= 1u << i;
  r.low_at = nth_flagged(same, n[0], counts[0], &found);
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (e.real >> i & 1 && (e.rank[i] < r.low || (e.rank[i] == r.low && (int)channel_of(i) <= r.low_at))) low |= 1u << i;
  // Entries above `high` that are low outliers exist only where nearly all are outliers.
  u32 both = 0;
  same = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    both += (low >> i & 1) && e.rank[i] > r.high;
    if (e.real >> i & 1 && !(low >> i & 1) && e.rank[i] == r.high) same |= 1u << i;
  }
  if (both) atomicAdd(&twice, both);
  __syncthreads();
  r.high_at = nth_flagged(same, n[1] + twice, counts[0], &found);
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (e.real >> i & 1 && !(low >> i & 1) && (e.rank[i] > r.high || (e.rank[i] == r.high && (int)channel_of(i) <= r.high_at)))
      high |= 1u << i;
  return ends_of(e, e.real & ~low & ~high);
}

// The same where few entries lie about both limits, as is usual: bins of equal width between the ends, then the entries of
// the bins with the last outlier and the next entry, in order. False, and nothing set, where it does not hold.
#define BINS 512
#define NEAR 128
FN bool find_by_bins(const Entries& e, uint2 ends, u32 extremes, Range& r, uint2& left) {
  __shared__ __align__(16) u32 counts[BINS];
  __shared__ uint2 chosen[2];  // first bin | last bin << 16, entries beyond the first
  __shared__ u64 near[2][NEAR];
  __shared__ u32 found[2];
  __shared__ uint2 last[2];
  __shared__ u32 next[2];
  const u32 lane = lane_id(), warp = threadIdx.x / 32;
  if (2 * extremes + 2 > CHANNELS) return false;
  for (u32 i = threadIdx.x; i < BINS; i += RANGE_THREADS) counts[i] = 0;
  if (threadIdx.x < 2) found[threadIdx.x] = 0;
  // Rounding keeps the order: no entry's bin is below a smaller entry's.
  const float least = value_of(ends.x), per_bin = BINS / (value_of(ends.y) - least);
  u32 bin[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) bin[i] = min((u32)((value_of(e.rank[i]) - least) * per_bin), BINS - 1);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (e.real >> i & 1) atomicAdd(&counts[bin[i]], 1u);
  __syncthreads();
  if (warp < 2) {
    constexpr int OWN = BINS / 32;
    u32 own[OWN], mine = 0;
#pragma unroll
    for (int i = 0; i < OWN; i += 4) {
      const uint4 c = ((const uint4*)counts)[(warp ? BINS - OWN - lane * OWN + (OWN - 4 - i) : lane * OWN + i) / 4];
      own[i] = warp ? c.w : c.x, own[i + 1] = warp ? c.z : c.y, own[i + 2] = warp ? c.y : c.z, own[i + 3] = warp ? c.x : c.w;
      mine += c.x + c.y + c.z + c.w;
    }
    u32 before = sum_before(mine), first = BINS, second = BINS, beyond = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      if (before < extremes && extremes <= before + own[i]) first = lane * OWN + i, beyond = before;
      before += own[i];
      if (second == BINS && before > extremes) second = lane * OWN + i;
    }
    first = least_of(first), second = least_of(second), beyond = most_of(beyond);
    if (lane == 0) chosen[warp] = make_uint2(first | second << 16, beyond);
  }
  __syncthreads();
  const u32 from[2] = {chosen[0].x & 0xffff, chosen[1].x & 0xffff}, to[2] = {chosen[0].x >> 16, chosen[1].x >> 16};
  if (to[0] + to[1] >= BINS - 1) return false;
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const u32 b = side ? BINS - 1 - bin[i] : bin[i];
      if (e.real >> i & 1 && b >= from[side] && b <= to[side]) {
        const u32 at = atomicAdd(&found[side], 1u);
        if (at < NEAR) near[side][at] = (u64)(side ? ~e.rank[i] : e.rank[i]) << 32 | channel_of(i);
      }
    }
  __syncthreads();
  if (max(found[0], found[1]) > NEAR) return false;
  if (warp < 2) {
    const u32 n = found[warp], want = extremes - chosen[warp].y;
    for (u32 i = lane; i < n; i += 32) {
      const u64 mine = near[warp][i];
      u32 before = 0;
      for (u32 j = 0; j < n; j++) before += near[warp][j] < mine;
      const u32 rank = warp ? ~(u32)(mine >> 32) : mine >> 32;
      if (before + 1 == want) last[warp] = make_uint2(rank, (u32)mine);
      if (before == want) next[warp] = rank;
    }
  }
  __syncthreads();
  r.low = last[0].x, r.low_at = (int)last[0].y, r.high = last[1].x, r.high_at = (int)last[1].y;
  left = make_uint2(next[0], next[1]);
  return true;
}

// The range of a token's values x, by all threads of a block.
FN Range find_range(const float* x, u32 extremes, u32* status) {
  static_assert(EACH <= 32, "flags of a thread fit a word");
  Entries e;
  e.real = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const float v = is_real(i) ? x[channel_of(i)] : 0;
    if (is_real(i)) e.real |= 1u << i;
    if (!(fabsf(v) <= 65504.0f)) atomicMax(status, 1u);
    e.rank[i] = rank_of(v);
  }
  Range r = {0, 0xffffffffu, -1, -1, 0};
  uint2 left = ends_of(e, e.real);
  if (extremes && !find_by_bins(e, left, extremes, r, left)) left = find_by_bytes(e, extremes, r);
  // Where nothing is left there is nothing to scale.
  const bool none = left.x > left.y;
  const float least = none ? __int_as_float(0x7f800000) : value_of(left.x), most = none ? -least : value_of(left.y);
  const u32 scale = float_half(__fsub_rn(__fmul_rn(most, 0.5f), __fmul_rn(least, 0.5f)));
  const u32 zero = float_half(__fadd_rn(__fmul_rn(most, 0.5f), __fmul_rn(least, 0.5f)));
  r.scale = scale | zero << 16;
  return r;
}

// grid: tokens
extern "C" __global__ void __launch_bounds__(RANGE_THREADS, 1) ranges(const float* values, Range* out, u32 extremes, u32* status) {
  const Range r = find_range(values + (u64)blockIdx.x * CHANNELS, extremes, status);
  if (threadIdx.x == 0) out[blockIdx.x] = r;
}

struct AppendArgs {
  const float* keys;     // [tokens][CHANNELS], before RoPE
  const float* values;
  const Range* ranges;   // [tokens]
  const float* bounds;   // [2^BITS - 1][CHANNELS]: where a key's code goes up
  const float* lower;    // [CHANNELS]
  const float* upper;    // [CHANNELS]
  const float* key_posts;     // [CHANNELS][2^BITS]
  const float* value_bounds;  // [2^BITS - 1], before scale and zero
  const float* value_posts;   // [2^BITS]
  u8* pool;
  const u32* table;
  u32* arena;
  u32* open;
  u32* top;              // next free entry of the arena
  u32* status;           // 0: fine, 1: not a finite fp16 number, 2: too many outliers in a unit, 3: the arena is full, 4: residual
  const Sequence* after; // of a single token: the history with it, which says its place; or null
  u32 arena_size;
  u32 first;             // place of the first token after the exact rows
  u32 tokens;
  u32 keep;              // whether keys beyond the thresholds are kept apart
  u32 extremes;          // value outliers on each side of a token
};

// With ONE a single token, whose range is found here; a block of threads may then have more than DIM / 16 warps.
template <bool ONE> FN void append_block(const AppendArgs& a) {
  constexpr int POSTS = 1 << BITS;
  __shared__ u32 list[OPEN_OUTLIERS];
  __shared__ u32 count, greatest, from;
  const u32 lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, tq = lane % 4, head = blockIdx.y, side = blockIdx.z, kv_heads = gridDim.y;
  const u32 first = ONE && a.after ? a.after->blocks * 64 + a.after->last - 65 : a.first;
  const u32 block = first / 64 + blockIdx.x;
  const u32 t0 = blockIdx.x == 0 ? first % 64 : 0, t1 = min(64, first + a.tokens - block * 64);
  // Of token 0 of the block; used for tokens from t0 on.
  const long row = (long)block * 64 - first;
  u8* const record = a.pool + a.table[block] * block_bytes(kv_heads);
  u8* const unit = record + unit_at(head, side);
  u32* const header = (u32*)(record + header_at(kv_heads, head)) + 2 * side;
  u32* const open = a.open + (head * 2 + side) * OPEN_OUTLIERS;
  const u32 before = t0 ? header[1] & 0xffff : 0;
  if (threadIdx.x == 0) count = before, greatest = t0 ? header[1] >> 16 : 0;
  if (t1 == 64)
    for (u32 i = threadIdx.x; i < before; i += blockDim.x) list[i] = open[i];
  __syncthreads();
  auto keep = [&](u32 c, u32 t, float exact, float dense) {
    const float residual = __fsub_rn(exact, dense);
    if (!(fabsf(residual) <= 65504.0f)) atomicMax(a.status, 4u);
    const u32 bits = float_half(residual), at = atomicAdd(&count, 1u);
    atomicMax(&greatest, bits & 0x7fff);
    if (at < OPEN_OUTLIERS) list[at] = outlier_word(c, t, bits);
  };
  // Tiles 2 * warp and 2 * warp + 1.
  u32 w[BITS];
#pragma unroll
  for (int i = 0; i < BITS; i++) w[i] = t0 && warp < DIM / 16 ? *(const u32*)(unit + word_byte(lane, warp * BITS + i)) : 0;
  Range only;
  if (ONE && side == 1) only = find_range(a.values, a.extremes, a.status);
  if (warp < DIM / 16) {
    if (side == 0) {
      // 32 channels, of which this lane has 8, for 32 tokens, of which it has 4.
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32 pair = warp % (DIM / 32) * 16 + i / 4 * 8 + tq * 2 + i % 2, c = pair * 2 + i / 2 % 2, all = head * DIM + c;
        float bound[POSTS - 1];
#pragma unroll
        for (int m = 0; m < POSTS - 1; m++) bound[m] = a.bounds[m * CHANNELS + all];
        const float lower = a.lower[all], upper = a.upper[all];
        // One channel's loads after another's: all at once would not fit the registers of 1,024 threads.
        if (ONE && BITS == 4) __syncwarp();
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const u32 t = warp / (DIM / 32) * 32 + r * 8 + g;
          if (t >= t0 && t < t1) {
            const float x = a.keys[(row + t) * CHANNELS + all];
            if (!(fabsf(x) <= 65504.0f)) atomicMax(a.status, 1u);
            u32 code = 0;
#pragma unroll
            for (int m = 0; m < POSTS - 1; m++) code += x > bound[m];
            put_code(w, 0, r / 2, (i / 4 * 2 + r % 2) * 4 + i % 4, code);
            if (a.keep && (x < lower || x > upper)) keep(c, t, x, a.key_posts[all * POSTS + code]);
          }
        }
      }
    } else {
      // 16 channels, of which this lane has 2, for 64 tokens, of which it has 16.
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const u32 t = tq * 16 + i;
        if (t >= t0 && t < t1) {
          const Range range = ONE ? only : a.ranges[row + t];
          const float scale = low_float(range.scale), zero = high_float(range.scale);
          const float inverse = scale != 0 ? __fdiv_rn(1.0f, scale) : 0;
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const u32 c = warp * 16 + r * 8 + g, all = head * DIM + c;
            const float x = a.values[(row + t) * CHANNELS + all];
            const float y = __fmul_rn(__fsub_rn(x, zero), inverse);
            u32 code = 0;
#pragma unroll
            for (int m = 0; m < POSTS - 1; m++) code += y > a.value_bounds[m];
            put_code(w, 1, i / 8, (i / 4 % 2 * 2 + r) * 4 + i % 4, code);
            const u32 rank = rank_of(x);
            const bool low = rank < range.low || (rank == range.low && (int)all <= range.low_at);
            if (low || rank > range.high || (rank == range.high && (int)all <= range.high_at))
              keep(c, t, x, __fadd_rn(__fmul_rn(scale, a.value_posts[code]), zero));
          }
        }
      }
      if (warp == 0 && head == 0)
        for (u32 t = t0 + lane; t < t1; t += 32) ((u32*)(record + scales_at(kv_heads)))[t] = ONE ? only.scale : a.ranges[row + t].scale;
    }
#pragma unroll
    for (int i = 0; i < BITS; i++) *(u32*)(unit + word_byte(lane, warp * BITS + i)) = w[i];
  }
  __syncthreads();
  u32 n = count;
  if (n > OPEN_OUTLIERS) {
    if (threadIdx.x == 0) atomicMax(a.status, 2u);
    n = OPEN_OUTLIERS;
  }
  if (t1 == 64) {
    if (threadIdx.x == 0) {
      const u32 room = (n + 3) / 4 * 4;
      from = atomicAdd(a.top, room);
      if (from + room > a.arena_size || from + room < from) atomicMax(a.status, 3u), from = 0xffffffffu;
    }
    __syncthreads();
    if (from == 0xffffffffu) n = 0;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) a.arena[from + i] = list[i];
    if (threadIdx.x == 0) header[0] = n ? from : 0, header[1] = n | greatest << 16;
  } else {
    for (u32 i = before + threadIdx.x; i < n; i += blockDim.x) open[i] = list[i];
    if (threadIdx.x == 0) header[0] = IN_OPEN | (head * 2 + side) * OPEN_OUTLIERS, header[1] = n | greatest << 16;
  }
}

// grid: (blocks touched, kv_heads, 2), a warp for two tiles
extern "C" __global__ void __launch_bounds__(DIM * 2, 1) append(const AppendArgs a) { append_block<false>(a); }

// grid: (1, kv_heads, 2)
extern "C" __global__ void __launch_bounds__(RANGE_THREADS, 1) append_one(const AppendArgs a) {
  let_next_start();
  wait_for_former();
  append_block<true>(a);
}
