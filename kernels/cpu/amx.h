// SPDX-License-Identifier: Apache-2.0
// AMX tiles: configuration, conversions, and the images of what they multiply. Included by isa.h only, in the
// set that has AMX. The query of a state is in amx_query.h, its update in amx_update.h, the pairs of a chunk in
// amx_output.h.
//
// TDPBF16PS: C[m][n] += sum_k A[m][k] B[k][n] for m, n < 16 and k < 32, A row-major, B with pairs of k
// together: [16 pairs][16 n][2]. A tile is 1 kB = 512 bfloat16.
//
// A product takes 16 cycles and runs beside vector instructions and tile loads, which take 8 cycles from L1 and
// 21 from L2; a vector store that misses L1 takes 4. So the loops are cut such that L1 holds what they write.

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

// (x_0, x_0, x_2, x_2, ...), and (p_0, p_1, p_0, p_1, ...).
POWERATTN_INLINE Vec16 twice(Vec16 x) { return (Vec16)_mm512_maskz_moveldup_ps(0xffff, (__m512)x); }
POWERATTN_INLINE Vec16 pair(const float *p) {
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return (Vec16)_mm512_set1_pd(both);
}

// sums + the two bfloat16 of each lane's pair.
POWERATTN_INLINE Vec16 add_bfloats(Vec16 sums, const uint16_t *pairs) {
  const __m512i ones = (__m512i)(Int16{} + 0x3f803f80);
  return (Vec16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(pairs), (__m512bh)ones);
}

// What vectors wrote is in memory before tiles read it: the intrinsic of the tile load does not tell the
// compiler.
POWERATTN_INLINE void before_tile_loads() { asm volatile("" : : : "memory"); }

// 2 x 2 products: tiles 0 .. 3 += (a0, a1) x (b0, b1).
POWERATTN_INLINE void multiply_tiles(const uint16_t *a0, const uint16_t *a1, int64_t a_stride,
                                     const uint16_t *b0, const uint16_t *b1) {
  _tile_loadd(4, a0, a_stride);
  _tile_loadd(6, b0, 64);
  _tile_loadd(5, a1, a_stride);
  _tile_loadd(7, b1, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
POWERATTN_INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
// The four sums of 2 x 2 products: at + m * down + n * right.
POWERATTN_INLINE void load_tiles(const float *at, int64_t down, int64_t right, int64_t stride) {
  _tile_loadd(0, at, stride);
  _tile_loadd(1, at + right, stride);
  _tile_loadd(2, at + down, stride);
  _tile_loadd(3, at + down + right, stride);
}
POWERATTN_INLINE void store_tiles(float *at, int64_t down, int64_t right, int64_t stride) {
  _tile_stored(0, at, stride);
  _tile_stored(1, at + right, stride);
  _tile_stored(2, at + down, stride);
  _tile_stored(3, at + down + right, stride);
}

// Sums of the 16 vectors of `rows`, one per lane.
POWERATTN_INLINE Vec16 sum_rows(const float *rows) {
  Vec16 v[16];
  for (int i = 0; i < 16; ++i) v[i] = load(rows + i * 16);
  transpose16(v);
  Vec16 total = v[0];
  for (int i = 1; i < 16; ++i) total += v[i];
  return total;
}

inline int64_t image_blocks(const Call<float> &call) { return (call.D + 31) / 32; }
// Where the image's tiles of columns c .. c + 63, c a multiple of 64, begin.
inline int64_t image_block(const Call<float> &call, int64_t c) { return c / 16 * image_blocks(call) * kTile16; }
// Behind the tiles z in float32, zero from row D to the next multiple of 32.
inline float *image_z(const Call<float> &call, uint16_t *image) {
  return reinterpret_cast<float *>(image + image_block(call, call.ep));
}

// 32 rows of the image for 16 columns, a tile, from pairs of rows: row pair m of column n in lane n of
// pairs[m].
POWERATTN_INLINE void store_image(Vec16 (&pairs)[16], uint16_t *tile) {
  transpose16(pairs);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 32, (__m512i)pairs[i]);
}

// The image of state rows row .. row+rows-1 (multiples of 32 but at the end): tiles [ep/64][D/32][4][16][32],
// two tiles instead of four where 32 columns are left; then z.
inline void amx_image(const Call<float> &call, const State<float> &state, int64_t row, int64_t rows,
                      uint16_t *image) {
  for (int64_t block = row / 32; block * 32 < row + rows; ++block) {
    for (int64_t c = 0; c < call.ep; c += 16) {
      const float *from = state.s + c / 32 * 32 * call.Dp + c % 32;
      Vec16 pairs[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t r = block * 32 + 2 * i;
        pairs[i] = (Vec16)to_bfloat_pairs(r < call.D ? load(from + r * 32) : Vec16{},
                                          r + 1 < call.D ? load(from + r * 32 + 32) : Vec16{});
      }
      const int64_t first = c / 64 * 64, tiles = lesser<int64_t>(64, call.ep - first) / 16;
      store_image(pairs, image + image_block(call, first) + (block * tiles + (c - first) / 16) * kTile16);
    }
  }
  if (state.z == nullptr) return;
  float *z = image_z(call, image);
  for (int64_t r = row; r < row + rows; ++r) z[r] = state.z[r];
  for (int64_t r = row + rows; row + rows == call.D && r % 32 != 0; ++r) z[r] = 0;
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

// The image of 32 key rows [32][width]: tiles [2][width/32][16 pairs of columns][16 keys][2].
inline void amx_keys(const float *rows, int64_t width, uint16_t *image) {
  for (int64_t t = 0; t < 32; t += 16) {
    for (int64_t c = 0; c < width; c += 32, image += kTile16) {
      Vec16 v[16];
      for (int i = 0; i < 16; ++i) {
        const float *from = rows + (t + i) * width + c;
        v[i] = (Vec16)to_bfloat(load(from), load(from + 16));
      }
      transpose16(v);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(image + i * 32, (__m512i)v[i]);
    }
  }
}

// 16 pairs of bfloat16.
POWERATTN_INLINE Int16 load_pairs(const uint16_t *p) {
  Int16 pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

// The columns of 32 key rows [32][width] in bfloat16: [width][16][2], tokens l and l + 16 side by side.
inline void amx_token_pairs(const float *rows, int64_t width, uint16_t *out) {
  for (int64_t c = 0; c < width; c += 16) {
    Vec16 v[16];
    for (int i = 0; i < 16; ++i) {
      v[i] = (Vec16)to_bfloat_pairs(load(rows + i * width + c), load(rows + (i + 16) * width + c));
    }
    transpose16(v);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c + i) * 32, (__m512i)v[i]);
  }
}

// cols [width][32] of 32 rows [32][width].
inline void amx_columns(const float *rows, int64_t width, float *cols) {
  for (int64_t t = 0; t < 32; t += 16) {
    for (int64_t c = 0; c < width; c += 16) {
      Vec16 v[16];
      for (int i = 0; i < 16; ++i) v[i] = load(rows + (t + i) * width + c);
      transpose16(v);
      for (int i = 0; i < 16; ++i) store(cols + (c + i) * 32 + t, v[i]);
    }
  }
}
