// The device functions of kernels/layout.cuh as host C++: numbers from standard input, results to standard output, both
// binary. tests/host.rs compares them with the Rust code. BITS and DIM come from the command line.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "layout.cuh"

static u32 failures = 0;

template <class T> std::vector<T> input() {
  std::vector<T> all;
  T one;
  while (fread(&one, sizeof one, 1, stdin) == 1) all.push_back(one);
  return all;
}
template <class T> void output(T x) { fwrite(&x, sizeof x, 1, stdout); }

static u32 code_at(const u8* unit, u32 side, u32 channel, u32 token) {
  return get_code(unit, side, side ? value_spot(channel, token) : key_spot(channel, token));
}

// Which code, and which of its bits, each bit of a unit holds: channel, token, weight; for both sides.
static void bits() {
  alignas(16) static u8 unit[UNIT_BYTES];
  for (u32 side = 0; side < 2; side++)
    for (u32 bit = 0; bit < UNIT_BYTES * 8; bit++) {
      unit[bit / 8] = 1 << bit % 8;
      u32 found = 0, where[3] = {0, 0, 0};
      for (u32 c = 0; c < DIM; c++)
        for (u32 t = 0; t < 64; t++)
          if (u32 code = code_at(unit, side, c, t)) where[0] = c, where[1] = t, where[2] = code, found++;
      unit[bit / 8] = 0;
      if (found != 1) failures++;
      for (u32 w : where) output(w);
    }
}

// Codes [side][channel][token] to units.
static void encode() {
  auto codes = input<u8>();
  codes.resize(2 * DIM * 64);
  for (u32 side = 0; side < 2; side++) {
    alignas(16) static u8 unit[UNIT_BYTES];
    memset(unit, 0, sizeof unit);
    for (u32 c = 0; c < DIM; c++)
      for (u32 t = 0; t < 64; t++) {
        const Spot s = side ? value_spot(c, t) : key_spot(c, t);
        u32 w[BITS];
        for (u32 i = 0; i < BITS; i++) memcpy(w + i, unit + word_byte(s.lane, s.tile / 2 * BITS + i), 4);
        put_code(w, side, s.tile % 2, s.n, codes[(side * DIM + c) * 64 + t]);
        for (u32 i = 0; i < BITS; i++) memcpy(unit + word_byte(s.lane, s.tile / 2 * BITS + i), w + i, 4);
      }
    for (u8 byte : unit) output(byte);
  }
}

// Units to codes [side][channel][token].
static void decode() {
  auto bytes = input<u8>();
  bytes.resize(2 * UNIT_BYTES);
  for (u32 side = 0; side < 2; side++) {
    alignas(16) static u8 unit[UNIT_BYTES];
    memcpy(unit, bytes.data() + side * UNIT_BYTES, UNIT_BYTES);
    for (u32 c = 0; c < DIM; c++)
      for (u32 t = 0; t < 64; t++) output((u8)code_at(unit, side, c, t));
  }
}

// Every outlier there can be, packed and unpacked: channel, token, residual.
static void outliers() {
  for (u32 c = 0; c < DIM; c++)
    for (u32 t = 0; t < 64; t++) {
      const u32 e = outlier_word(c, t, (u16)(c * 977 + t * 4099));
      output(outlier_channel(e)), output(outlier_token(e)), output(e >> 16);
    }
}

// Bounds [2^BITS - 1][DIM], then values [..][DIM], to codes.
static void codes() {
  const auto x = input<float>();
  const u32 bounds = ((1 << BITS) - 1) * DIM;
  for (u32 i = bounds; i < x.size(); i++) output((u8)code_of(x[i], x.data() + i % DIM, DIM));
}

// x, y, cos, sin to the turned pair.
static void turn() {
  const auto x = input<float>();
  for (size_t i = 0; i + 4 <= x.size(); i += 4) {
    float tx, ty;
    turn_pair(x[i], x[i + 1], x[i + 2], x[i + 3], &tx, &ty);
    output(tx), output(ty);
  }
}

// Maximum, sum and output of two states to those of both.
static void merge() {
  const auto x = input<float>();
  for (size_t i = 0; i + 6 <= x.size(); i += 6) {
    float m, f0, f1;
    merge_factors(x[i], x[i + 3], &m, &f0, &f1);
    output(m), output(x[i + 1] * f0 + x[i + 4] * f1), output(x[i + 2] * f0 + x[i + 5] * f1);
  }
}

static void ranks() {
  for (float x : input<float>()) output(rank_of(x));
}

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)();
  } all[] = {{"bits", bits}, {"encode", encode}, {"decode", decode}, {"outliers", outliers}, {"codes", codes},
             {"turn", turn}, {"merge", merge},   {"ranks", ranks}};
  for (auto& f : all)
    if (argc == 2 && !strcmp(argv[1], f.name)) return f.run(), failures ? 2 : 0;
  return 1;
}
