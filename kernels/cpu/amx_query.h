// SPDX-License-Identifier: Apache-2.0
// The query of a state on AMX tiles, bfloat16 products and float32 sums. Included by isa.h only.
//
//   y^T = S~^T phi^T:  A = 16 columns of the state x 32 of its rows (the image), B = phi by row pairs
//
// 16 tokens pass over all rows of the state, their sums for 64 columns in four tiles from the first row to the
// last. What is written on the way is two tiles of phi, so that everything but the image stays in L1: the
// image comes from L2, 21 cycles a tile where its product takes 16. phi of one tile is made while the products
// of the tile before run.

// 16 tokens in two vectors of 8 tokens, two lanes each: (x_j, x_j+1) of a token side by side, so that the
// conversion to bfloat16 leaves row pairs where B wants them.
constexpr int kPairVectors = 2;
constexpr int64_t kPairStride = 16 * kPairVectors;
constexpr int64_t kPhiTiles = 2;
constexpr int64_t kQueryTokens = 16;

// x [d][2][8][2] from columns [d][32] of 32 tokens, those from `first` on; x_d counts as 0.
inline void amx_pairs(const float *columns, int64_t first, int d, float *pairs) {
  Int16 low, high;
  for (int l = 0; l < 16; ++l) {
    low[l] = l / 2 + 16 * (l % 2);
    high[l] = 8 + l / 2 + 16 * (l % 2);
  }
  Vec16 even = load(columns + first);
  for (int j = 0; j < d; ++j) {
    const Vec16 odd = j + 1 < d ? load(columns + (j + 1) * 32 + first) : Vec16{};
    store(pairs + j * kPairStride, (Vec16)_mm512_permutex2var_ps((__m512)even, (__m512i)low, (__m512)odd));
    store(pairs + j * kPairStride + 16,
          (Vec16)_mm512_permutex2var_ps((__m512)even, (__m512i)high, (__m512)odd));
    even = odd;
  }
}

// The rows of the state in pairs: each call of `next` gives value = base * mono for rows r, r + 1, r even, in
// the layout of amx_pairs. A pair may lie across the end of a run; past the last row come zeros. What the fast
// path uses stays in registers: no lambda, no pointer to it. The end of a run is a branch that the processor
// guesses wrong, so the next run's prefix is there before.
struct PairWalk {
  int d, p, j = 0, next_j = 0;
  const float *x, *xj;
  int64_t step = 2 * kPairStride;
  Vec16 prefix0, prefix1, next0, next1;
  Cursor cursor = {};                       // of the next run
  Vec16 product[kMaxDegree][kPairVectors];  // product[l] = base * x_i1 ... x_il, both lanes of a token

  POWERATTN_INLINE PairWalk(int d_, int p_, const float *x_, const float *base) : d(d_), p(p_), x(x_), xj(x_) {
    product[0][0] = load(base);
    product[0][1] = load(base + 16);
    multiply(0);
    prefix0 = next0;
    prefix1 = next1;
    prepare();
  }
  POWERATTN_INLINE void multiply(int level) {
    next0 = product[level][0];
    next1 = product[level][1];
    for (int l = level; l + 1 < p; ++l) {
      const float *xi = x + cursor.index[l] * kPairStride;
      product[l + 1][0] = next0 = next0 * twice(load(xi));
      product[l + 1][1] = next1 = next1 * twice(load(xi + 16));
    }
  }
  POWERATTN_INLINE void prepare() {
    const int level = next_prefix(&cursor, d, p);
    next_j = cursor.index[p - 1];
    if (level >= 0) {
      multiply(level);
    } else {  // zeros, for ever
      next0 = next1 = Vec16{};
      next_j = -0x40000000;
    }
  }
  POWERATTN_INLINE void next(Vec16 *value0, Vec16 *value1) {
    *value0 = prefix0 * load(xj);
    *value1 = prefix1 * load(xj + 16);
    j += 2;
    xj += step;
    if (__builtin_expect(j >= d, 0)) next_run(value0, value1);
  }
  POWERATTN_INLINE void next_run(Vec16 *value0, Vec16 *value1) {
    for (bool half = j > d;;
         half = false) {  // half: the odd lanes belong to the next run, whose j is at least 1
      prefix0 = next0;
      prefix1 = next1;
      j = next_j;
      if (j < 0) {
        xj = x;
        step = 0;
        return;
      }
      xj = x + j * kPairStride;
      prepare();
      if (!half) return;
      const Int16 odd = {0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1};
      *value0 = odd ? prefix0 * load(xj - kPairStride) : *value0;
      *value1 = odd ? prefix1 * load(xj - kPairStride + 16) : *value1;
      ++j;
      xj += kPairStride;
      if (j < d) return;
    }
  }
};

// Product `c` of a step: tile c += image tile c x phi, which product 0 loads.
template <int kTiles>
POWERATTN_INLINE void query_product(int64_t c, const uint16_t *image, const uint16_t *phi) {
  before_tile_loads();
  if (c == 0) {
    _tile_loadd(4, phi, 64);
    _tile_loadd(5, image, 64);
    _tile_dpbf16ps(0, 5, 4);
  } else if (c == 1) {
    _tile_loadd(6, image + kTile16, 64);
    _tile_dpbf16ps(1, 6, 4);
  } else if (kTiles == 4 && c == 2) {
    _tile_loadd(7, image + 2 * kTile16, 64);
    _tile_dpbf16ps(2, 7, 4);
  } else if (kTiles == 4) {
    _tile_loadd(5, image + 3 * kTile16, 64);
    _tile_dpbf16ps(3, 5, 4);
  }
}

inline int64_t amx_query_scratch(const Call<float> &call) {
  return (32 * call.dp + (call.d + 2) * kPairStride + 2 * 256) * 4 + kPhiTiles * kTile16 * 2 + 64 * 8;
}

// One block of kTiles * 16 columns for 16 tokens: out [kTiles/2][32][32] += ...; with z, zero-padded to a
// multiple of 32, dot [16] += ....
template <int kTiles, bool kZ>
POWERATTN_NOINLINE void query_block(const Call<float> &call, const float *pairs, const float *base,
                                    const uint16_t *image, const float *z, uint16_t *phi, float *sums,
                                    float *out, float *dot) {
  const int64_t blocks = image_blocks(call);
  PairWalk walk(call.d, call.p, pairs, base);
  Vec16 total0 = {}, total1 = {};
  zero_tiles();
  uint16_t *ready = phi;
  for (int64_t k = 0; k < blocks; ++k) {
    uint16_t *tile = phi + k % kPhiTiles * kTile16;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 1
      for (int i = 0; i < 4; ++i) {
        Vec16 value0, value1;
        walk.next(&value0, &value1);
        if (kZ) {
          const Vec16 zr = pair(z);
          total0 += value0 * zr;
          total1 += value1 * zr;
          z += 2;
        }
        _mm512_storeu_si512(tile + c * 128 + i * 32, to_bfloat(value0, value1));
      }
      // A product between every four row pairs: the part of the instruction window that a hyperthread has holds
      // no more.
      if (k > 0) query_product<kTiles>(c, image, ready);
    }
    if (k > 0) image += kTiles * kTile16;
    ready = tile;
  }
  for (int c = 0; c < kTiles; ++c) query_product<kTiles>(c, image, ready);
  for (int h = 0; h < kTiles; h += 2) {
    if (h == 0) {
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
    } else {
      _tile_stored(2, sums, 64);
      _tile_stored(3, sums + 256, 64);
    }
    for (int c = 0; c < 2; ++c) {
      Vec16 v[16];
      for (int i = 0; i < 16; ++i) v[i] = load(sums + c * 256 + i * 16);
      transpose16(v);
      float *to = out + h / 2 * 1024 + c * 16;
      for (int i = 0; i < 16; ++i) store(to + i * 32, load(to + i * 32) + v[i]);
    }
  }
  if (!kZ) return;
  for (int t = 0; t < 8; ++t) {
    dot[t] += total0[2 * t] + total0[2 * t + 1];
    dot[8 + t] += total1[2 * t] + total1[2 * t + 1];
  }
}

// As query, for 32 tokens x [32][dp], of which the first `count` are; tiles are begun. out [ep/32][32][32],
// dot [32]. z is zero from row D to the next multiple of 32.
inline void amx_query(const Call<float> &call, const float *x, int64_t count, double common,
                      const float *factor, const uint16_t *image, const float *z, float *out, float *dot,
                      Bump bump) {
  float *columns = bump.take<float>(32 * call.dp);
  float *pairs = bump.take<float>((call.d + 1) * kPairStride);
  float *sums = bump.take<float>(2 * 256);
  float *base = bump.take<float>(kPairStride);
  uint16_t *phi = bump.take<uint16_t>(kPhiTiles * kTile16);
  amx_columns(x, call.dp, columns);
  for (int64_t first = 0; first < count; first += kQueryTokens) {
    amx_pairs(columns, first, call.d, pairs);
    for (int64_t t = 0; t < kQueryTokens; ++t) {
      const int64_t i = first + t;
      base[2 * t] = base[2 * t + 1] =
          i < count ? static_cast<float>(common) * (factor != nullptr ? factor[i] : 1.0f) : 0.0f;
    }
    for (int64_t c = 0; c < call.ep; c += 64) {
      const uint16_t *from = image + image_block(call, c);
      float *to = out + c / 32 * 1024 + first * 32;
      const auto block = c + 64 <= call.ep
                             ? (c == 0 && z != nullptr ? &query_block<4, true> : &query_block<4, false>)
                             : (c == 0 && z != nullptr ? &query_block<2, true> : &query_block<2, false>);
      block(call, pairs, base, from, z, phi, sums, to, dot + first);
    }
  }
}
