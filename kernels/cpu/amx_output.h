// SPDX-License-Identifier: Apache-2.0
// The output of a row tile on AMX tiles: 32 rows at a time, the state's part (amx_query.h) and the chunk's.
// Included by isa.h only, in the set that has AMX.
//
//   scores   S = Q K^T:  A = 16 rows of q x 32 of their columns, B = K (the image of keys)
//   output   N += W V:   A = 16 rows of weights x 32 keys, B = V (the image of values)

inline int64_t amx_output_scratch(const Call<float> &call) {
  const int64_t elements =
      2 * 32 * call.dp + 2 * 32 * call.ep + 2 * 32 * kColumns + 32 * 16 + 8 * 32 + 4 * kColumns;
  return elements * 4 + 32 * (call.dp + kColumns) * 2 + 64 * 16 + amx_query_scratch(call);
}

// s [32][kColumns] = q k^T for keys j .. j + columns - 1, a multiple of 32. q [32][dp].
inline void amx_scores(const Call<float> &call, const uint16_t *q, const uint16_t *keys, int64_t columns,
                       float *s) {
  const int64_t steps = call.dp / 32;
  before_tile_loads();
  for (int64_t c = 0; c < columns; c += 32) {
    const uint16_t *b = keys + c / 16 * steps * kTile16;
    zero_tiles();
    for (int64_t k = 0; k < steps; ++k) {
      multiply_tiles(q + k * 32, q + 16 * call.dp + k * 32, call.dp * 2, b + k * kTile16,
                     b + (steps + k) * kTile16);
    }
    store_tiles(s + c, 16 * kColumns, 16, kColumns * 4);
  }
}

// out [ep/32][32][32] += w v for `columns` keys, a multiple of 32; w [32][kColumns].
inline void amx_weighted(const Call<float> &call, const uint16_t *w, const uint16_t *values, int64_t columns,
                         float *out) {
  const int64_t tiles = call.ep / 16;
  before_tile_loads();
  for (int64_t c = 0; c < tiles; c += 2) {
    load_tiles(out + c * 512, 512, 16, 128);
    for (int64_t k = 0; k < columns / 32; ++k) {
      const uint16_t *b = values + (k * tiles + c) * kTile16;
      multiply_tiles(w + k * 32, w + 16 * kColumns + k * 32, kColumns * 2, b, b + kTile16);
    }
    store_tiles(out + c * 512, 512, 16, 128);
  }
}

// w = (scale s)^p gate for `columns` columns of row i, zero from `high` on; their sum by lanes is added to
// total.
POWERATTN_INLINE void amx_weights(const Call<float> &call, const float *s, int64_t i, int64_t columns,
                                  int64_t high, const BlockGate<float> &gate, uint16_t *w, float *total) {
  const float scale = static_cast<float>(call.scale);
  Vec16 sum = load(total);
  for (int64_t c = 0; c < columns; c += 32) {
    Vec16 x[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t at = c + h * 16;
      x[h] = power<float>(scale * load(s + at), call.p) * gate_at(gate, i, at);
      if (at + 16 > high) x[h] = column_mask<float>(at, 0, high) ? x[h] : Vec16{};
      sum += x[h];
    }
    _mm512_storeu_si512(w + c, to_bfloat(x[0], x[1]));
  }
  store(total, sum);
}

inline void amx_output(const Call<float> &call, const Rows &q, double position, const Packed<float> &k,
                       const Packed<float> &v, const Gates<float> &gates, const State<float> &state, Span span,
                       const Rows &y, const Rows &row_norm, void *scratch) {
  Bump bump{static_cast<char *>(scratch)};
  float *x = bump.take<float>(32 * call.dp);
  uint16_t *x16 = bump.take<uint16_t>(32 * call.dp);
  float *out = bump.take<float>(32 * call.ep);  // N [ep/32][32][32]
  float *s = bump.take<float>(32 * kColumns);
  uint16_t *w = bump.take<uint16_t>(32 * kColumns);
  float *totals = bump.take<float>(32 * 16);
  float *norm = bump.take<float>(32);
  BlockGate<float> gate;
  gate.gated = call.gated;
  gate.row = bump.take<float>(32);
  gate.row_low = bump.take<float>(32);
  gate.column = bump.take<float>(kColumns);
  gate.column_low = bump.take<float>(kColumns);
  float *line = bump.take<float>(32 * (call.dp + call.ep));
  amx_begin();
  for (int64_t first = span.first; first < span.first + span.count; first += 32) {
    const int64_t count = lesser<int64_t>(32, span.first + span.count - first);
    const Span rows = {span.chunk, first, count};
    for (int64_t i = 0; i < count; ++i) prefetch_row<float>(call.dtype, y, span.chunk + first + i, call.e);
    pack<float>(call, q, call.rope_style != POWERATTN_ROPE_NONE, position, call.d, rows,
                Packed<float>{x - first * call.dp, nullptr, nullptr}, line);
    for (int64_t i = 0; i < 32 * call.dp; i += 32) {
      _mm512_storeu_si512(x16 + i, to_bfloat(load(x + i), load(x + i + 16)));
    }
    for (int64_t i = 0; i < 32 * call.ep; i += 16) store(out + i, Vec16{});
    for (int64_t i = 0; i < 32 * 16; i += 16) store(totals + i, Vec16{});

    for (int64_t j = 0; j <= first; j += kColumns) {
      // Blocks before the rows, then the diagonal block.
      const bool diagonal = j == first;
      const int64_t columns = diagonal ? 32 : lesser(kColumns, first - j);
      if (call.gated) {
        gate.diagonal = diagonal;
        if (diagonal) {
          split_gates(gates, first, count, gate.row, gate.row_low);
          split_gates(gates, first, count, gate.column, gate.column_low);
        } else {
          if (j == 0) factor_gates(gates, first, count, first, 1, gate.row);
          factor_gates(gates, j, columns, first, -1, gate.column);
        }
      }
      amx_scores(call, x16, k.keys + j * call.dp, columns, s);
      for (int64_t i = 0; i < count; ++i) {
        amx_weights(call, s + i * kColumns, i, columns, diagonal ? i + 1 : columns, gate, w + i * kColumns,
                    totals + i * 16);
      }
      for (int64_t i = count; i < 32; ++i) {
        for (int64_t c = 0; c < columns; c += 32) _mm512_storeu_si512(w + i * kColumns + c, (__m512i)Vec16{});
      }
      amx_weighted(call, w, v.values + j * call.ep, columns, out);
      if (!diagonal && j + kColumns > first) j = first - kColumns;  // the next block is the diagonal one
    }
    for (int64_t i = 0; i < 32; i += 16) store(norm + i, sum_rows(totals + i * 16));

    if (state.s != nullptr) {
      amx_query(call, x, count, call.scale_p, call.gated ? gates.from_start + first : nullptr, state.image,
                row_norm.data != nullptr || call.normalize ? image_z(call, state.image) : nullptr, out, norm,
                bump);
    }

    for (int64_t i = 0; i < count; ++i) {
      const float l = norm[i] + static_cast<float>(call.eps);
      const float r = !call.normalize ? 1.0f : l != 0 ? 1.0f / l : 0.0f;
      for (int c = 0; c < call.ep; c += 16) store(line + c, r * load(out + c / 32 * 1024 + i * 32 + c % 32));
      store_row<float>(call.dtype, y, span.chunk + first + i, call.e, line);
      if (row_norm.data != nullptr) {
        static_cast<float *>(row_norm.data)[(span.chunk + first + i) * row_norm.stride] = l;
      }
    }
  }
  amx_end();
}
