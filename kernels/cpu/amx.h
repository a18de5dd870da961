// SPDX-License-Identifier: Apache-2.0
// bfloat16 inputs on AMX tiles: the query of a state and its update, products in bfloat16, sums in float32.
// Included by isa.h only, in the set that has AMX.
//
// TDPBF16PS: C[m][n] += sum_k A[m][k] B[k][n] for m, n < 16 and k < 32, A row-major, B with pairs of k
// together: [16 pairs][16 n][2]. A tile is 1 kB = 512 bfloat16.
//   query    y^T = S~^T phi^T: A = 16 columns of the state x 32 of its rows (the image), B = phi by token pairs
//   of rows update   S~ += phi^T V:    A = 16 state rows x 32 tokens of phi, B = V (the image of values)

constexpr int64_t kTile16 = 512;  // elements of one tile

inline void amx_begin() {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;  // palette
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = 64;  // bytes per row
    config[48 + i] = 16;      // rows
  }
  // The compiler believes that only the first bytes are read.
  asm volatile("" : : "r"(config) : "memory");
  _tile_loadconfig(config);
}
inline void amx_end() { _tile_release(); }

typedef float Vec16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

// 32 bfloat16: low, then high.
POWERATTN_INLINE __m512i to_bfloat(Vec16 low, Vec16 high) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
// 16 pairs (a_i, b_i).
POWERATTN_INLINE __m512i to_bfloat_pairs(Vec16 a, Vec16 b) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), to_bfloat(a, b));
}

// v[i][j] <-> v[j][i], by exchanging blocks of 1, 2, 4, 8.
POWERATTN_INLINE void transpose16(Vec16 (&v)[16]) {
#pragma GCC unroll 4
  for (int s = 1; s < 16; s *= 2) {
    Int16 low, high;
    for (int l = 0; l < 16; ++l) {
      low[l] = (l & s) ? 16 + l - s : l;
      high[l] = (l & s) ? 16 + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      const Vec16 a = v[i], b = v[i + s];
      v[i] = (Vec16)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b);
      v[i + s] = (Vec16)_mm512_permutex2var_ps((__m512)a, (__m512i)high, (__m512)b);
    }
  }
}

inline int64_t image_blocks(const Call<float> &call) { return (call.D + 31) / 32; }

// The image of state rows row .. row+rows-1 (multiples of 32 but at the end): tiles [ep/16][D/32][16][32].
inline void amx_image(const Call<float> &call, const State<float> &state, int64_t row, int64_t rows,
                      uint16_t *image) {
  const int64_t blocks = image_blocks(call);
  for (int64_t block = row / 32; block * 32 < row + rows; ++block) {
    for (int64_t c = 0; c < call.ep; c += 16) {
      const float *from = state.s + c / 32 * 32 * call.Dp + c % 32;
      Vec16 v[2][16];
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 16; ++i) {
          const int64_t r = block * 32 + h * 16 + i;
          v[h][i] = r < call.D ? load(from + r * 32) : Vec16{};
        }
        transpose16(v[h]);
      }
      uint16_t *to = image + (c / 16 * blocks + block) * kTile16;
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, to_bfloat(v[0][i], v[1][i]));
    }
  }
}

// The image of 32 value rows [32][ep]: tiles [ep/16][16 pairs][16][2].
inline void amx_values(const float *rows, int64_t width, uint16_t *image) {
  for (int64_t c = 0; c < width; c += 16) {
    for (int i = 0; i < 16; ++i) {
      const float *from = rows + 2 * i * width + c;
      _mm512_storeu_si512(image + c / 16 * kTile16 + i * 32, to_bfloat_pairs(load(from), load(from + width)));
    }
  }
}

inline int64_t amx_query_scratch(const Call<float> &call) {
  const int64_t groups = round_up((call.tile + 15) / 16, 2);
  return (groups * 16 * (call.dp + 1) + kRows * 16 + kRows * 16 + groups * 16 * call.ep + 64 * 8) * 4;
}

// As query, for tokens 0 .. count-1 of x [rows][dp]; out [ep/32][out_rows][32], dot [count].
inline void amx_query(const Call<float> &call, const float *x, int64_t count, double common,
                      const float *factor, const uint16_t *image, const float *z, float *out, int64_t out_rows,
                      float *dot, Bump bump) {
  const int64_t groups = round_up((count + 15) / 16, 2), blocks = image_blocks(call), tiles = call.ep / 16;
  float *lanes = bump.take<float>(groups * call.dp * 16);  // [groups][dp][16]
  float *base = bump.take<float>(groups * 16);
  float *raw = bump.take<float>(kRows * 16);              // phi of one group, [kRows][16]
  uint16_t *phi = bump.take<uint16_t>(2 * kRows * 16);    // of two groups, tiles [2][kRows/32]
  float *sums = bump.take<float>(groups * 16 * call.ep);  // y^T, tiles [tiles][groups][16][16]
  for (int64_t i = 0; i < groups * 16 * call.ep; ++i) sums[i] = 0;
  for (int64_t t = 0; t < groups * 16; ++t) {
    base[t] = t < count ? static_cast<float>(common) * (factor != nullptr ? factor[t] : 1.0f) : 0.0f;
    for (int i = 0; i < call.d; ++i)
      lanes[(t / 16 * call.dp + i) * 16 + t % 16] = t < count ? x[t * call.dp + i] : 0.0f;
  }
  Vec16 totals[8] = {};  // at most 128 tokens
  amx_begin();
  for (int64_t row = 0; row < call.D; row += kRows) {
    const int64_t n = lesser(kRows, call.D - row), steps = (n + 31) / 32;
    const Cursor cursor = cursor_at(call.d, call.p, row);
    for (int64_t g = 0; g < groups; g += 2) {
      for (int h = 0; h < 2; ++h) {
        const Vec16 b[1] = {load(base + (g + h) * 16)};
        Vec16 total{};
        const float *zr = z != nullptr ? z + row : nullptr;
        if (zr != nullptr) {
          walk<float, 1, false>(call.d, call.p, cursor, n, lanes + (g + h) * call.dp * 16, 16, b,
                                [&](int64_t r, const Vec16(&value)[1]) {
                                  store(raw + r * 16, value[0]);
                                  total += value[0] * zr[r];
                                });
          totals[g + h] += total;
        } else {
          walk<float, 1, false>(call.d, call.p, cursor, n, lanes + (g + h) * call.dp * 16, 16, b,
                                [&](int64_t r, const Vec16(&value)[1]) { store(raw + r * 16, value[0]); });
        }
        for (int64_t r = n; r < steps * 32; ++r) store(raw + r * 16, Vec16{});
        for (int64_t r = 0; r < steps * 16; ++r) {
          _mm512_storeu_si512(phi + h * kRows * 16 + r * 32,
                              to_bfloat_pairs(load(raw + r * 32), load(raw + r * 32 + 16)));
        }
      }
      for (int64_t c = 0; c < tiles; c += 2) {
        float *s0 = sums + (c * groups + g) * 256, *s1 = s0 + groups * 256;
        _tile_loadd(0, s0, 64);
        _tile_loadd(1, s0 + 256, 64);
        _tile_loadd(2, s1, 64);
        _tile_loadd(3, s1 + 256, 64);
        const uint16_t *a = image + (c * blocks + row / 32) * kTile16;
        for (int64_t k = 0; k < steps; ++k) {
          _tile_loadd(4, a + k * kTile16, 64);
          _tile_loadd(6, phi + k * kTile16, 64);
          _tile_loadd(5, a + (blocks + k) * kTile16, 64);
          _tile_loadd(7, phi + kRows * 16 + k * kTile16, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, s0, 64);
        _tile_stored(1, s0 + 256, 64);
        _tile_stored(2, s1, 64);
        _tile_stored(3, s1 + 256, 64);
      }
    }
  }
  amx_end();
  for (int64_t c = 0; c < tiles; ++c) {
    for (int64_t g = 0; g < groups; ++g) {
      Vec16 v[16];
      for (int i = 0; i < 16; ++i) v[i] = load(sums + ((c * groups + g) * 16 + i) * 16);
      transpose16(v);
      float *to = out + c / 2 * 32 * out_rows + c % 2 * 16 + g * 16 * 32;
      for (int i = 0; i < 16; ++i) store(to + i * 32, load(to + i * 32) + v[i]);
    }
  }
  for (int64_t t = 0; z != nullptr && t < count; ++t) dot[t] += totals[t / 16][t % 16];
}

inline int64_t amx_update_scratch(int64_t rows) {
  const int64_t padded = round_up(rows, 32);
  return padded * kTokens * 2 + padded * 64 + 4 * 1024 + 256;
}

// As update with u = 1; values is the image of the chunk's values, tiles [tokens/32][ep/16].
inline void amx_update(const Call<float> &call, const float *x_cols, const uint16_t *values, const float *base,
                       double factor, double decay, const State<float> &in, const State<float> &out,
                       int64_t tokens, int64_t row, int64_t rows, void *scratch) {
  Bump bump{static_cast<char *>(scratch)};
  const int64_t padded = round_up(rows, 32), tiles = call.ep / 16, steps_max = kTokens / 32;
  const int64_t written = round_up(rows, kMr);          // the rows after these are another unit's
  uint16_t *a = bump.take<uint16_t>(padded * kTokens);  // tiles [padded/16][kTokens/32]
  float *z = bump.take<float>(padded * 16);
  float *sums = bump.take<float>(4 * 256);
  for (int64_t i = rows / 16 * 16 * kTokens; i < padded * kTokens; ++i) a[i] = 0;
  for (int64_t i = 0; i < padded * 16; ++i) z[i] = 0;
  const Cursor cursor = cursor_at(call.d, call.p, row);
  const bool carried = in.s != nullptr && decay != 0;
  const float beta = static_cast<float>(decay);
  amx_begin();
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
    const int64_t steps = (lesser(kTokens, tokens - t0) + 31) / 32;
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t t = t0 + k * 32;
      Vec16 b[2];
      for (int v = 0; v < 2; ++v) {
        b[v] = splat(static_cast<float>(factor));
        if (base != nullptr) b[v] *= load(base + t + v * 16);
      }
      uint16_t *to = a + k * kTile16;
      walk<float, 2, true>(
          call.d, call.p, cursor, rows, x_cols + t * call.dp, 32, b, [&](int64_t r, const Vec16(&value)[2]) {
            _mm512_storeu_si512(to + r / 16 * steps_max * kTile16 + r % 16 * 32, to_bfloat(value[0], value[1]));
            store(z + r * 16, load(z + r * 16) + (value[0] + value[1]));
          });
    }
    for (int64_t r = 0; r < padded; r += 32) {
      const uint16_t *a0 = a + r / 16 * steps_max * kTile16, *a1 = a0 + steps_max * kTile16;
      for (int64_t c = 0; c < tiles; c += 2) {
        const uint16_t *v = values + (t0 / 32 * tiles + c) * kTile16;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < steps; ++k) {
          _tile_loadd(4, a0 + k * kTile16, 64);
          _tile_loadd(6, v + k * tiles * kTile16, 64);
          _tile_loadd(5, a1 + k * kTile16, 64);
          _tile_loadd(7, v + (k * tiles + 1) * kTile16, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        // [2 row tiles][16][32 columns]: a strip of the state.
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
        _tile_stored(2, sums + 512, 128);
        _tile_stored(3, sums + 512 + 16, 128);
        const int64_t at = c / 2 * 32 * call.Dp + (row + r) * 32;
        for (int64_t i = 0; i < lesser<int64_t>(32, written - r) * 32; i += 16) {
          Vec16 before{};
          if (t0 > 0)
            before = load(out.s + at + i);
          else if (carried)
            before = beta * load(in.s + at + i);
          store(out.s + at + i, before + load(sums + i));
        }
      }
    }
  }
  amx_end();
  for (int64_t r = 0; out.z != nullptr && r < rows; ++r) {
    out.z[row + r] = (carried ? beta * in.z[row + r] : 0.0f) + sum<float>(load(z + r * 16));
  }
}
