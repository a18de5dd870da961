// SPDX-License-Identifier: Apache-2.0
// bfloat16 inputs on AMX tiles: the query of a state and its update, products in bfloat16, sums in float32.
// Included by isa.h only, in the set that has AMX. The pairs of a chunk are in amx_output.h.
//
// TDPBF16PS: C[m][n] += sum_k A[m][k] B[k][n] for m, n < 16 and k < 32, A row-major, B with pairs of k
// together: [16 pairs][16 n][2]. A tile is 1 kB = 512 bfloat16.
//   query    y^T = S~^T phi^T: A = 16 columns of the state x 32 of its rows (the image), B = phi by row pairs
//   update   S~ += phi^T V:    A = 16 state rows x 32 tokens of phi, B = V (the image of values)
//
// A product takes 16 cycles, and a tile load from L1 8: blocks of 2 x 2 tiles load 4 tiles for 4 products.
// Making phi takes about as many vector cycles as its products take tile cycles, so both loops make the phi of
// one block while the tiles work on the block before: `Products::step` is called from inside the walk.

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

// 32 rows of the image for 16 columns, a tile, from pairs of rows: row pair m of column n in lane n of
// pairs[m].
POWERATTN_INLINE void store_image(Vec16 (&pairs)[16], uint16_t *tile) {
  transpose16(pairs);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 32, (__m512i)pairs[i]);
}

// The image of state rows row .. row+rows-1 (multiples of 32 but at the end): tiles [ep/16][D/32][16][32].
inline void amx_image(const Call<float> &call, const State<float> &state, int64_t row, int64_t rows,
                      uint16_t *image) {
  const int64_t blocks = image_blocks(call);
  for (int64_t block = row / 32; block * 32 < row + rows; ++block) {
    for (int64_t c = 0; c < call.ep; c += 16) {
      const float *from = state.s + c / 32 * 32 * call.Dp + c % 32;
      Vec16 pairs[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t r = block * 32 + 2 * i;
        pairs[i] = (Vec16)to_bfloat_pairs(r < call.D ? load(from + r * 32) : Vec16{},
                                          r + 1 < call.D ? load(from + r * 32 + 32) : Vec16{});
      }
      store_image(pairs, image + (c / 16 * blocks + block) * kTile16);
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

// ---- The query -----------------------------------------------------------------------------------------

// 32 tokens in four vectors of 8 tokens, two lanes each: (x_j, x_j+1) of a token side by side, so that the
// conversion to bfloat16 leaves row pairs where B wants them.
constexpr int kPairVectors = 4;
constexpr int64_t kPairStride = 16 * kPairVectors;

// x [d][4][8][2] from rows [32][dp]: x_d counts as 0.
inline void amx_pairs(const float *rows, int d, int64_t dp, float *columns, float *pairs) {
  amx_columns(rows, dp, columns);
  Int16 low, high;
  for (int l = 0; l < 16; ++l) {
    low[l] = l / 2 + 16 * (l % 2);
    high[l] = 8 + l / 2 + 16 * (l % 2);
  }
  for (int j = 0; j < d; ++j) {
    for (int t = 0; t < 2; ++t) {
      const Vec16 even = load(columns + j * 32 + t * 16);
      const Vec16 odd = j + 1 < d ? load(columns + (j + 1) * 32 + t * 16) : Vec16{};
      float *to = pairs + j * kPairStride + t * 32;
      store(to, (Vec16)_mm512_permutex2var_ps((__m512)even, (__m512i)low, (__m512)odd));
      store(to + 16, (Vec16)_mm512_permutex2var_ps((__m512)even, (__m512i)high, (__m512)odd));
    }
  }
}

// emit(r, value[4]) for rows r, r + 1 of n rows from the cursor on, r even: value = base * mono in the layout
// of amx_pairs. A pair may lie across the end of a run; past the last row of all comes a 0.
template <class Emit>
POWERATTN_INLINE void walk_pairs(int d, int p, Cursor cursor, int64_t n, const float *x, const float *base,
                                 const Emit &emit) {
  constexpr int kV = kPairVectors;
  const Int16 odd = {0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1};
  Vec16 product[kMaxDegree][kV];  // product[l] = base * x_i1 ... x_il, both lanes of a token
  for (int v = 0; v < kV; ++v) product[0][v] = load(base + v * 16);
  for (int l = 0; l + 1 < p; ++l) {
    const float *xi = x + cursor.index[l] * kPairStride;
    for (int v = 0; v < kV; ++v) product[l + 1][v] = product[l][v] * twice(load(xi + v * 16));
  }
  int64_t r = 0;
  int j = cursor.index[p - 1];
  for (;;) {
    Vec16 prefix[kV], value[kV];
    for (int v = 0; v < kV; ++v) prefix[v] = product[p - 1][v];
    const float *xj = x + j * kPairStride;
    for (; j + 1 < d && r < n; j += 2, r += 2, xj += 2 * kPairStride) {
      for (int v = 0; v < kV; ++v) value[v] = prefix[v] * load(xj + v * 16);
      emit(r, value);
    }
    if (r >= n) return;
    const bool half = j < d;  // one row of the run is left
    if (half) {
      for (int v = 0; v < kV; ++v) value[v] = prefix[v] * load(xj + v * 16);
    }
    const int level = next_prefix(&cursor, d, p);
    if (level < 0) {
      if (half) emit(r, value);
      return;
    }
    for (int l = level; l + 1 < p; ++l) {
      const float *xi = x + cursor.index[l] * kPairStride;
      for (int v = 0; v < kV; ++v) product[l + 1][v] = product[l][v] * twice(load(xi + v * 16));
    }
    j = cursor.index[p - 1];
    if (half) {  // the next run begins in the odd lane; its j is at least 1
      xj = x + (j - 1) * kPairStride;
      for (int v = 0; v < kV; ++v) {
        const Vec16 next = product[p - 1][v] * load(xj + v * 16);
        value[v] = odd ? next : value[v];
      }
      emit(r, value);
      r += 2;
      ++j;
      if (r >= n) return;
    }
  }
}

// The products of one block of kRows state rows for 32 tokens: sums += image x phi.
struct QueryProducts {
  const uint16_t *image = nullptr;  // at the block
  const uint16_t *phi = nullptr;    // tiles [2][kRows/32]
  float *sums = nullptr;            // tiles [tiles][2][16][16]
  int64_t blocks = 0, tiles = 0;    // of the image
  int64_t steps = 0;                // tiles of rows in this block
  int64_t k = 0, c = 0;

  POWERATTN_INLINE bool done() const { return c >= tiles; }
  POWERATTN_INLINE void step() {
    if (done()) return;
    before_tile_loads();
    if (k == 0) load_tiles(sums + c * 512, 512, 256, 64);
    const uint16_t *a = image + (c * blocks + k) * kTile16, *b = phi + k * kTile16;
    multiply_tiles(a, a + blocks * kTile16, 64, b, b + kRows * 16);
    if (++k < steps) return;
    store_tiles(sums + c * 512, 512, 256, 64);
    k = 0;
    c += 2;
  }
};

inline int64_t amx_query_scratch(const Call<float> &call) {
  return (32 * call.dp + call.d * kPairStride + kPairStride + kRows + 32 * call.ep) * 4 + 2 * kRows * 32 * 2 +
         64 * 8;
}

// As query, for 32 tokens x [32][dp], of which the first `count` are; tiles are begun. out [ep/32][32][32],
// dot [32].
inline void amx_query(const Call<float> &call, const float *x, int64_t count, double common,
                      const float *factor, const uint16_t *image, const float *z, float *out, float *dot,
                      Bump bump) {
  const int64_t blocks = image_blocks(call), tiles = call.ep / 16;
  float *columns = bump.take<float>(32 * call.dp);
  float *pairs = bump.take<float>(call.d * kPairStride);
  float *base = bump.take<float>(kPairStride);
  float *z_rows = bump.take<float>(kRows);
  float *sums = bump.take<float>(32 * call.ep);
  uint16_t *phi[2] = {bump.take<uint16_t>(kRows * 32), bump.take<uint16_t>(kRows * 32)};
  amx_pairs(x, call.d, call.dp, columns, pairs);
  for (int64_t t = 0; t < 32; ++t) {
    base[2 * t] = base[2 * t + 1] =
        t < count ? static_cast<float>(common) * (factor != nullptr ? factor[t] : 1.0f) : 0.0f;
  }
  for (int64_t i = 0; i < 32 * call.ep; i += 16) store(sums + i, Vec16{});
  Vec16 totals[kPairVectors] = {};
  QueryProducts products;
  products.sums = sums;
  products.blocks = blocks;
  const int64_t per_emit = (tiles + 3) / 4;  // steps per 8 row pairs: a block's products end with its walk
  for (int64_t row = 0; row < call.D; row += kRows) {
    const int64_t n = lesser(kRows, call.D - row), steps = (n + 31) / 32;
    const Cursor cursor = cursor_at(call.d, call.p, row);
    uint16_t *to = phi[row / kRows % 2];
    const auto emit = [&](int64_t r, const Vec16(&value)[kPairVectors]) {
      _mm512_storeu_si512(to + r * 16, to_bfloat(value[0], value[1]));
      _mm512_storeu_si512(to + kRows * 16 + r * 16, to_bfloat(value[2], value[3]));
      if (r % 16 == 0) {
        for (int64_t i = 0; i < per_emit; ++i) products.step();
      }
    };
    if (z != nullptr) {
      for (int64_t r = 0; r < kRows; ++r) z_rows[r] = r < n ? z[row + r] : 0.0f;
      walk_pairs(call.d, call.p, cursor, n, pairs, base, [&](int64_t r, const Vec16(&value)[kPairVectors]) {
        const Vec16 zr = pair(z_rows + r);
        for (int v = 0; v < kPairVectors; ++v) totals[v] += value[v] * zr;
        emit(r, value);
      });
    } else {
      walk_pairs(call.d, call.p, cursor, n, pairs, base, emit);
    }
    for (int64_t r = round_up(n, 2); r < steps * 32; r += 2) {
      for (int h = 0; h < 2; ++h) _mm512_storeu_si512(to + h * kRows * 16 + r * 16, (__m512i)Vec16{});
    }
    while (!products.done()) products.step();
    products.image = image + row / 32 * kTile16;
    products.phi = to;
    products.tiles = tiles;
    products.steps = steps;
    products.c = 0;
  }
  while (!products.done()) products.step();
  for (int64_t c = 0; c < tiles; ++c) {
    for (int64_t g = 0; g < 2; ++g) {
      Vec16 v[16];
      for (int i = 0; i < 16; ++i) v[i] = load(sums + ((c * 2 + g) * 16 + i) * 16);
      transpose16(v);
      float *to = out + c / 2 * 1024 + c % 2 * 16 + g * 16 * 32;
      for (int i = 0; i < 16; ++i) store(to + i * 32, load(to + i * 32) + v[i]);
    }
  }
  if (z == nullptr) return;
  for (int v = 0; v < kPairVectors; ++v) {
    for (int t = 0; t < 8; ++t) dot[v * 8 + t] += totals[v][2 * t] + totals[v][2 * t + 1];
  }
}

// ---- The update ----------------------------------------------------------------------------------------

constexpr int64_t kSlab = 512;  // tokens per pass: phi of 32 rows is 32 kB

// Rows of one run inside a block of 32: value_r = m_r base x_i1 ... x_ip.
struct Segment {
  int32_t index[kMaxDegree];  // of the first row
  int32_t first, count;
  float weight, first_weight;  // m_r of the rows, and of the first
};

// The runs of n rows from the cursor on, which moves past them; returns how many.
inline int64_t segments_of(int d, int p, Cursor *cursor, int64_t n, Segment *out) {
  int64_t count = 0;
  for (int64_t r = 0; r < n; ++count) {
    Segment &s = out[count];
    const int j = cursor->index[p - 1];
    for (int i = 0; i < p; ++i) s.index[i] = cursor->index[i];
    int run = 0;
    const double weight = p > 1 ? prefix_weight(*cursor, p, &run) : 1.0;
    s.weight = static_cast<float>(weight);
    s.first_weight = static_cast<float>(p > 1 && j == cursor->index[p - 2] ? weight / (run + 1) : weight);
    s.first = static_cast<int32_t>(r);
    s.count = static_cast<int32_t>(lesser<int64_t>(n - r, d - j));
    r += s.count;
    cursor->index[p - 1] = j + s.count;
    if (cursor->index[p - 1] == d && next_prefix(cursor, d, p) < 0) return count + 1;
  }
  return count;
}

// The products of 32 state rows, and what becomes of their sums.
struct UpdateProducts {
  const uint16_t *phi = nullptr;     // tiles [2][kSlab/32]
  const uint16_t *values = nullptr;  // tiles [steps][tiles]
  float *sums = nullptr;             // [32][32]
  int64_t tiles = 0, steps = 0;
  float *out = nullptr;       // the rows in the first strip of the state
  const float *in = nullptr;  // null: nothing before
  float beta = 0;
  int64_t strip = 0;          // between strips
  int64_t rows = 0;           // that are written
  uint16_t *image = nullptr;  // of the rows' first tile; null: none
  int64_t image_stride = 0;   // between its tiles of columns
  int64_t k = 0, c = 0;

  POWERATTN_INLINE bool done() const { return c >= tiles; }
  POWERATTN_INLINE void step() {
    if (done()) return;
    before_tile_loads();
    if (k == 0) zero_tiles();
    const uint16_t *a = phi + k * kTile16, *b = values + (k * tiles + c) * kTile16;
    multiply_tiles(a, a + kSlab / 32 * kTile16, 64, b, b + kTile16);
    if (++k < steps) return;
    store_tiles(sums, 512, 16, 128);
    finish();
    k = 0;
    c += 2;
  }
  // out = beta in + sums for the 32 columns at c, and their image.
  POWERATTN_NOINLINE void finish() const {
    const int64_t at = c / 2 * strip;
    for (int64_t h = 0; h < 2; ++h) {
      Vec16 pairs[16];
      for (int64_t i = 0; i < 16; ++i) {
        Vec16 x[2];
        for (int64_t m = 0; m < 2; ++m) {
          const int64_t r = 2 * i + m, to = at + r * 32 + h * 16;
          x[m] = Vec16{};
          if (r >= rows) continue;
          x[m] = load(sums + r * 32 + h * 16);
          if (in != nullptr) x[m] += beta * load(in + to);
          store(out + to, x[m]);
        }
        pairs[i] = (Vec16)to_bfloat_pairs(x[0], x[1]);
      }
      if (image != nullptr) store_image(pairs, image + (c + h) * image_stride);
    }
  }
};

inline int64_t amx_update_scratch() { return 2 * kSlab * 32 * 2 + (32 * 16 + 32 * 32) * 4 + 256; }

// As update with u = 1, and the image of the new rows where out.image is not null; values is the image of the
// chunk's values, tiles [tokens/32][ep/16].
inline void amx_update(const Call<float> &call, const float *x_cols, const uint16_t *values, const float *base,
                       double factor, double decay, const State<float> &in, const State<float> &out,
                       int64_t tokens, int64_t row, int64_t rows, void *scratch) {
  Bump bump{static_cast<char *>(scratch)};
  const int64_t tiles = call.ep / 16;
  uint16_t *phi[2] = {bump.take<uint16_t>(kSlab * 32), bump.take<uint16_t>(kSlab * 32)};
  float *z = bump.take<float>(32 * 16);
  const bool carried = in.s != nullptr && decay != 0;  // a reset forgets even Inf and NaN
  const float beta = static_cast<float>(decay);
  UpdateProducts products;
  products.sums = bump.take<float>(32 * 32);
  products.strip = 32 * call.Dp;
  products.image_stride = image_blocks(call) * kTile16;
  int buffer = 0;
  amx_begin();
  for (int64_t t0 = 0; t0 < tokens; t0 += kSlab) {
    const int64_t steps = (lesser(kSlab, tokens - t0) + 31) / 32;
    const bool last = t0 + kSlab >= tokens;
    Cursor cursor = cursor_at(call.d, call.p, row);
    for (int64_t r0 = 0; r0 < rows; r0 += 32) {
      const int64_t n = lesser<int64_t>(32, rows - r0);
      Segment segments[32];
      const int64_t runs = segments_of(call.d, call.p, &cursor, n, segments);
      uint16_t *to = phi[buffer];
      buffer = 1 - buffer;
      for (int64_t i = 0; i < 32 * 16; i += 16) store(z + i, Vec16{});
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t t = t0 + k * 32;
        const float *x = x_cols + t * call.dp;
        uint16_t *tile = to + k * kTile16;
        Vec16 b[2];
        for (int v = 0; v < 2; ++v) {
          b[v] = splat(static_cast<float>(factor));
          if (base != nullptr) b[v] *= load(base + t + v * 16);
        }
        const auto emit = [&](int64_t r, Vec16 low, Vec16 high) {
          _mm512_storeu_si512(tile + r / 16 * (kSlab / 32 * kTile16) + r % 16 * 32, to_bfloat(low, high));
          store(z + r * 16, load(z + r * 16) + (low + high));
        };
        for (int64_t i = 0; i < runs; ++i) {
          const Segment &s = segments[i];
          Vec16 prefix[2] = {b[0], b[1]};
          for (int l = 0; l + 1 < call.p; ++l) {
            for (int v = 0; v < 2; ++v) prefix[v] *= load(x + s.index[l] * 32 + v * 16);
          }
          const float *xj = x + s.index[call.p - 1] * 32;
          emit(s.first, s.first_weight * prefix[0] * load(xj), s.first_weight * prefix[1] * load(xj + 16));
          for (int v = 0; v < 2; ++v) prefix[v] *= s.weight;
          for (int64_t r = s.first + 1; r < s.first + s.count; ++r) {
            xj += 32;
            emit(r, prefix[0] * load(xj), prefix[1] * load(xj + 16));
          }
        }
        for (int64_t r = n; r < 32; ++r) emit(r, Vec16{}, Vec16{});
        for (int64_t c = 0; c < tiles; c += 2) products.step();
      }
      if (out.z != nullptr) {
        for (int64_t r = 0; r < n; r += 16) {
          const Vec16 sums = sum_rows(z + r * 16);
          for (int64_t i = r; i < lesser(n, r + 16); ++i) {
            const int64_t at = row + r0 + i;
            out.z[at] = (t0 > 0 ? out.z[at] : carried ? beta * in.z[at] : 0.0f) + sums[i - r];
          }
        }
      }
      while (!products.done()) products.step();
      const int64_t at = (row + r0) * 32;
      products.phi = to;
      products.values = values + t0 / 32 * tiles * kTile16;
      products.tiles = tiles;
      products.steps = steps;
      products.out = out.s + at;
      products.in = t0 > 0 ? out.s + at : carried ? in.s + at : nullptr;
      products.beta = t0 > 0 ? 1.0f : beta;
      products.rows = n;
      products.image = last && out.image != nullptr ? out.image + (row + r0) / 32 * kTile16 : nullptr;
      products.k = products.c = 0;
    }
  }
  while (!products.done()) products.step();
  amx_end();
  if (row + rows < call.D) return;
  for (int64_t c = 0; c < call.ep; c += 32) {
    for (int64_t i = call.D * 32; i < call.Dp * 32; ++i) out.s[c * call.Dp + i] = 0;
  }
}
