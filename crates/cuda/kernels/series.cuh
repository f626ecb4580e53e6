// Scores without turning keys. For slow pairs cos(theta j) and sin(theta j), j from -32 to 31, are polynomials of j with
// TERMS terms (Chebyshev, c_r), so
//
//   q R(j) k = sum_r T_r(j / 32) (sum_i c_r(theta_i) q_i . k_i),  odd terms with q a quarter turn back
//
// Each term is a column of an integer product: queries of 16 bits in two bytes, 8 columns for the high bytes and 8 for
// the low ones. The polynomials are summed once a token.
#define SLABS (DIM / 32)
#define SERIES (SLABS - TURNED)
#define TERMS 8

#if SERIES
// What the lanes' columns are made of: for term g and the lane's four pairs of a slab, in steps of the integer queries,
//   column x = A cos + B sin, column y = C cos - D sin, its product with the zero points = U cos + W sin
// of the angle of the block's middle.
// `units` are halves: scales of x of two pairs, zeros, scales of y, zeros.
// The basis is there as it is, and becomes one of values.
FN void prepare_columns(float4* columns, float4* basis, const float* q, const u16* units, const float* series) {
  auto unit = [&](u32 pair, u32 y, u32 zero) { return half_float(units[pair / 2 * 8 + y * 4 + zero * 2 + pair % 2]); };
  float most = 1e-30f, zeros = 0;
  for (u32 pair = TURNED * 16 + lane_id(); pair < DIM / 2; pair += 32) {
    const float x = q[2 * pair], y = q[2 * pair + 1];
    const float size = root(x * x + y * y);
    most = fmaxf(most, size * fmaxf(unit(pair, 0, 0), unit(pair, 1, 0)));
    zeros += size * (fabsf(unit(pair, 0, 1)) + fabsf(unit(pair, 1, 1)));
  }
  most = warp_max_ordered(most), zeros = warp_sum(zeros);
  // No coefficient of a term is above 1.17. What the zero points bring must leave room in 32 bits too.
  const float step = fmaxf(most * (1 / (27000.0f * 128.0f)), zeros * (1 / 8e8f));
  const float per_step = __fdividef(1, step), steps = per_step * (1 / 128.0f);
  for (u32 i = threadIdx.x; i < SERIES * 6 * 32; i += blockDim.x) {
    const u32 lane = i % 32, part = i / 32 % 6, slab = TURNED + i / 192, term = lane / 4;
    // Parts 0 to 3 are A, B, C, D of a pair; 4 and 5 hold U, W of two pairs.
    const u32 which = part < 4 ? part : part * 2 - 8, first = slab * 16 + which / 2 * 8 + lane % 4 * 2;
    const u32 pairs[2] = {first + which % 2, part < 4 ? first + which % 2 : first + 1};
    float c[2], out[4];
#pragma unroll
    for (int k = 0; k < 2; k++) c[k] = series[term * (DIM / 2) + pairs[k]];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float x = q[2 * pairs[k]], y = q[2 * pairs[k] + 1];
      // Odd terms belong to the sine: the query a quarter turn back.
      const float qx = c[k] * (term % 2 ? y : x), qy = c[k] * (term % 2 ? -x : y);
      if (part < 4) {
        const float scale = unit(pairs[k], k, 0) * steps;
        out[2 * k] = scale * (k ? qy : qx), out[2 * k + 1] = scale * (k ? qx : qy);
      } else {
        const float zx = unit(pairs[k], 0, 1) * per_step, zy = unit(pairs[k], 1, 1) * per_step;
        out[2 * k] = qx * zx + qy * zy, out[2 * k + 1] = qy * zx - qx * zy;
      }
    }
    columns[i] = make_float4(out[0], out[1], out[2], out[3]);
  }
  for (u32 i = threadIdx.x; i < 128; i += blockDim.x) {
    const float4 b = basis[i];
    basis[i] = make_float4(b.x * step, b.y * step, b.z * step, b.w * step);
  }
}

// A block's columns: high and low bytes of the queries, and what the zero points bring to terms 2 tq and 2 tq + 1.
FN void make_columns(const float4* columns, const u8* angles, u32 lane, u32 (*high)[2], u32 (*low)[2], int* zeros) {
  const u32 tq = lane % 4;
  float zero = 0;
#pragma unroll
  for (int s = 0; s < SERIES; s++) {
    const float4* part = columns + s * 192 + lane;
    const float4* turn = (const float4*)(angles + (TURNED + s) * 128);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float4 t = turn[h * 4 + tq], u = part[(4 + h) * 32];
      u32 n[2][2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float4 p = part[(2 * h + e) * 32];
        const float c = e ? t.z : t.x, sn = e ? t.w : t.y;
        // The mantissa ends in the integer: 1.5 * 2^23.
        n[0][e] = __float_as_uint(fmaf(p.x, c, fmaf(p.y, sn, 12582912.0f)));
        n[1][e] = __float_as_uint(fmaf(p.z, c, fmaf(-p.w, sn, 12582912.0f)));
      }
      zero = fmaf(u.x, t.x, fmaf(u.y, t.y, zero));
      zero = fmaf(u.z, t.z, fmaf(u.w, t.w, zero));
      // Bytes x0, x1, y0, y1: low bytes of both, then high bytes.
      const u32 x = permute(n[0][0], n[0][1], 0x5140), y = permute(n[1][0], n[1][1], 0x5140);
      low[s][h] = permute(x, y, 0x5410), high[s][h] = permute(x, y, 0x7632);
    }
  }
  zero += __shfl_xor_sync(WARP, zero, 1);
  zero += __shfl_xor_sync(WARP, zero, 2);
  const int z = __float2int_rn(zero);
  zeros[0] = __shfl_sync(WARP, z, tq * 8), zeros[1] = __shfl_sync(WARP, z, tq * 8 + 4);
}
#endif
