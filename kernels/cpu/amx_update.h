// SPDX-License-Identifier: Apache-2.0
// The update of a state on AMX tiles, bfloat16 products and float32 sums. Included by isa.h only.
//
//   S~ += phi^T V:  A = 16 state rows x 32 tokens of phi, B = V (the image of values);  z~ with V = 1
//
// A slab of tokens passes over the rows of a unit, 16 rows at a time, sums of 64 columns in four tiles. phi of
// one tile is made while the products of the tile before run.

constexpr int64_t kSlab = 512;  // tokens; shorter ones, whose values stay in L1, move the sums more often

// How 16 state rows are made: value_r = prefix x_j, prefix = weight base x_i1 ... x_i(p-1). Rows of one run
// whose weights m_r are equal share a prefix.
struct RowPlan {
  struct Prefix {
    int32_t index[kMaxDegree];
    float weight;
  };
  int64_t count = 0;    // of prefixes
  int32_t prefix[16];   // of each row: where its vectors are
  int32_t column[16];   // and where x_j is
  Prefix prefixes[17];  // rows past the last have a prefix of zeros
};

// The plan of n rows from the cursor on, which moves past them.
inline void plan_rows(int d, int p, Cursor *cursor, int64_t n, RowPlan *out) {
  out->count = 0;
  for (int64_t r = 0; r < n;) {
    const int j = cursor->index[p - 1];
    int run = 0;
    const double weight = p > 1 ? prefix_weight(*cursor, p, &run) : 1.0;
    const bool repeated = p > 1 && j == cursor->index[p - 2];  // a row of its own: its weight is smaller
    RowPlan::Prefix &to = out->prefixes[out->count];
    for (int l = 0; l + 1 < p; ++l) to.index[l] = cursor->index[l];
    to.weight = static_cast<float>(repeated ? weight / (run + 1) : weight);
    const int64_t count = repeated ? 1 : lesser<int64_t>(n - r, d - j);
    for (int64_t i = 0; i < count; ++i, ++r) {
      out->prefix[r] = static_cast<int32_t>(out->count * 32);
      out->column[r] = static_cast<int32_t>((j + i) * 32);
    }
    ++out->count;
    cursor->index[p - 1] = static_cast<int>(j + count);
    if (cursor->index[p - 1] == d) next_prefix(cursor, d, p);
  }
  if (n == 16) return;
  for (int64_t r = n; r < 16; ++r) {
    out->prefix[r] = static_cast<int32_t>(out->count * 32);
    out->column[r] = 0;
  }
  out->prefixes[out->count++] = {};
}

POWERATTN_INLINE Vec16 low_floats(Int16 pairs) { return (Vec16)(pairs << 16); }
POWERATTN_INLINE Vec16 high_floats(Int16 pairs) { return (Vec16)(pairs & static_cast<int32_t>(0xffff0000u)); }

// The prefixes of 32 tokens: [count][2][16].
POWERATTN_INLINE void make_prefixes(const RowPlan &plan, int p, const uint16_t *x, Vec16 base0, Vec16 base1,
                                    float *out) {
  for (int64_t i = 0; i < plan.count; ++i, out += 32) {
    Vec16 prefix0 = base0 * plan.prefixes[i].weight, prefix1 = base1 * plan.prefixes[i].weight;
    for (int l = 0; l + 1 < p; ++l) {
      const Int16 xi = load_pairs(x + plan.prefixes[i].index[l] * 32);
      prefix0 *= low_floats(xi);
      prefix1 *= high_floats(xi);
    }
    store(out, prefix0);
    store(out + 16, prefix1);
  }
}

// Where the sums of 16 rows begin and end.
struct UpdateRows {
  float *s;         // the rows in the first strip of the state
  const float *in;  // s = beta in + sums; null: nothing before
  float *z;
  const float *in_z;
  float beta;
  int64_t rows;  // that are written
  bool direct;   // the tiles begin with s and end in s
};

// Product `c` of 32 tokens: tile c += phi, which product 0 loads, x values.
template <int kTiles>
POWERATTN_INLINE void update_product(int64_t c, const uint16_t *phi, const uint16_t *values) {
  before_tile_loads();
  if (c == 0) {
    _tile_loadd(4, phi, 64);
    _tile_loadd(5, values, 64);
    _tile_dpbf16ps(0, 4, 5);
  } else if (c == 1) {
    _tile_loadd(6, values + kTile16, 64);
    _tile_dpbf16ps(1, 4, 6);
  } else if (kTiles == 4 && c == 2) {
    _tile_loadd(7, values + 2 * kTile16, 64);
    _tile_dpbf16ps(2, 4, 7);
  } else if (kTiles == 4) {
    _tile_loadd(5, values + 3 * kTile16, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
}

// The sums of 16 rows and kTiles * 16 columns: strips of 32, `strip` apart.
template <int kTiles>
POWERATTN_INLINE void store_sums(float *at, int64_t strip) {
  if constexpr (kTiles == 4) {
    store_tiles(at, strip, 16, 128);
  } else {
    _tile_stored(0, at, 128);
    _tile_stored(1, at + 16, 128);
  }
}
template <int kTiles>
POWERATTN_INLINE void begin_sums(const UpdateRows &u, int64_t strip) {
  if (!u.direct) {
    zero_tiles();
  } else if constexpr (kTiles == 4) {
    load_tiles(u.s, strip, 16, 128);
  } else {
    _tile_loadd(0, u.s, 128);
    _tile_loadd(1, u.s + 16, 128);
  }
}
template <int kTiles>
POWERATTN_INLINE void end_sums(const UpdateRows &u, int64_t strip, float *sums) {
  if (u.direct) {
    store_sums<kTiles>(u.s, strip);
  } else {
    store_sums<kTiles>(sums, 512);
    for (int64_t c = 0; c < kTiles / 2; ++c) {
      float *to = u.s + c * strip;
      const float *from = sums + c * 512, *in = u.in != nullptr ? u.in + c * strip : nullptr;
      for (int64_t i = 0; i < u.rows * 32; i += 16) {
        store(to + i, in != nullptr ? load(from + i) + u.beta * load(in + i) : load(from + i));
      }
    }
  }
}

inline int64_t amx_update_scratch() { return kPhiTiles * kTile16 * 2 + (17 * 32 + 1024) * 4; }

// kTiles * 16 columns of one slab of tokens for all rows of the unit.
template <int kTiles, bool kZ>
POWERATTN_NOINLINE void update_slab(const Call<float> &call, const uint16_t *columns, const uint16_t *values,
                                    const float *base, double factor, int64_t steps, int64_t row, int64_t rows,
                                    UpdateRows u, bool accumulate, uint16_t *phi, float *prefixes,
                                    float *sums) {
  const int64_t value_stride = call.ep / 16 * kTile16, strip = 32 * call.Dp;
  Cursor cursor = cursor_at(call.d, call.p, row);
  const Vec16 common = splat(static_cast<float>(factor));
  const uint16_t *ready = nullptr, *ready_values = nullptr;  // whose products are due
  int64_t made = 0;
  UpdateRows due = u;
  RowPlan plan;
  bool first = false, last = false;
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    u.rows = lesser<int64_t>(16, rows - r0);
    u.direct = accumulate && u.rows == 16;
    plan_rows(call.d, call.p, &cursor, u.rows, &plan);
    Vec16 totals[16] = {};  // of z, by lanes
    for (int64_t k = 0; k < steps; ++k) {
      const uint16_t *x = columns + k * 32 * call.dp;
      make_prefixes(plan, call.p, x, base != nullptr ? common * load(base + k * 32) : common,
                    base != nullptr ? common * load(base + k * 32 + 16) : common, prefixes);
      uint16_t *tile = phi + made++ % kPhiTiles * kTile16;
      if (first) begin_sums<kTiles>(due, strip);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
        for (int r = c * 4; r < c * 4 + 4; ++r) {
          const float *prefix = prefixes + plan.prefix[r];
          const Int16 xj = load_pairs(x + plan.column[r]);
          const __m512i row = to_bfloat(load(prefix) * low_floats(xj), load(prefix + 16) * high_floats(xj));
          _mm512_storeu_si512(tile + r * 32, row);
        }
        // A product between every four rows, as in the query.
        if (ready != nullptr) update_product<kTiles>(c, ready, ready_values);
      }
      if (last) end_sums<kTiles>(due, strip, sums);
      if (kZ) {
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) totals[r] = add_bfloats(totals[r], tile + r * 32);
      }
      ready = tile;
      ready_values = values + k * value_stride;
      first = k == 0;
      last = k == steps - 1;
      due = u;
    }
    if (kZ) {
      transpose16(totals);
      Vec16 z = totals[0];
      for (int i = 1; i < 16; ++i) z += totals[i];
      for (int64_t r = 0; r < u.rows; ++r) u.z[r] = (u.in_z != nullptr ? u.beta * u.in_z[r] : 0.0f) + z[r];
      u.z += 16;
      if (u.in_z != nullptr) u.in_z += 16;
    }
    u.s += 16 * 32;
    if (u.in != nullptr) u.in += 16 * 32;
  }
  if (first) begin_sums<kTiles>(due, strip);
  for (int c = 0; c < 4; ++c) update_product<kTiles>(c, ready, ready_values);
  end_sums<kTiles>(due, strip, sums);
}

// As update with u = 1, and the image of the new rows where out.image is not null. x.columns and b.values are
// the images of the chunk's keys and values.
inline void amx_update(const Call<float> &call, const Packed<float> &x, const Packed<float> &b,
                       const float *base, double factor, double decay, const State<float> &in,
                       const State<float> &out, int64_t tokens, int64_t row, int64_t rows, void *scratch) {
  Bump bump{static_cast<char *>(scratch)};
  uint16_t *phi = bump.take<uint16_t>(kPhiTiles * kTile16);
  float *prefixes = bump.take<float>(17 * 32);
  float *sums = bump.take<float>(1024);
  const bool carried = in.s != nullptr && decay != 0;  // a reset forgets even Inf and NaN
  const int64_t strip = 32 * call.Dp;
  amx_begin();
  for (int64_t t0 = 0; t0 < tokens; t0 += kSlab) {
    const int64_t steps = (lesser(kSlab, tokens - t0) + 31) / 32;
    for (int64_t c = 0; c < call.ep; c += 64) {
      const bool with_z = c == 0 && out.z != nullptr;
      const bool accumulate = t0 > 0;
      UpdateRows u = {};
      u.s = out.s + c / 32 * strip + row * 32;
      u.z = with_z ? out.z + row : nullptr;
      u.beta = accumulate ? 1.0f : static_cast<float>(decay);
      if (accumulate) {
        u.in = u.s;
        u.in_z = u.z;
      } else if (carried) {
        u.in = in.s + c / 32 * strip + row * 32;
        u.in_z = with_z ? in.z + row : nullptr;
      }
      const uint16_t *columns = x.columns + t0 * call.dp, *values = b.values + t0 * call.ep + c / 16 * kTile16;
      const float *from = base != nullptr ? base + t0 : nullptr;
      const auto slab = c + 64 <= call.ep ? (with_z ? &update_slab<4, true> : &update_slab<4, false>)
                                          : (with_z ? &update_slab<2, true> : &update_slab<2, false>);
      slab(call, columns, values, from, factor, steps, row, rows, u, accumulate, phi, prefixes, sums);
    }
  }
  amx_end();
  if (out.image != nullptr) amx_image(call, out, row, rows, out.image);
  if (row + rows < call.D) return;
  for (int64_t c = 0; c < call.ep; c += 32) {
    for (int64_t i = call.D * 32; i < call.Dp * 32; ++i) out.s[c * call.Dp + i] = 0;
  }
}
