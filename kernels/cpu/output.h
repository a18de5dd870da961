// SPDX-License-Identifier: Apache-2.0
// The output of one row tile: the state's part and the chunk's. Included by isa.h only.

template <class T>
int64_t query_scratch(const Call<T> &call, int groups) {
  return (round_up(groups * (call.dp + 1) * kGroup<T>, 64) + round_up(groups * kMr * kRows + kGroup<T>, 64)) *
         static_cast<int64_t>(sizeof(T));
}

// out_m += base_m mono(x_m)^T S~,  dot_m += base_m mono(x_m) . z~   for the rows x [groups * kMr][dp].
// out [ep/kNr][out_rows][kNr], dot [groups][kGroup]; base [groups][kGroup]; z may be null.
template <class T>
void query(const Call<T> &call, const T *x, int groups, const T *base, const T *s, const T *z, T *out,
           int64_t out_rows, T *dot, Bump bump) {
  constexpr int kN = kNr<T>;
  T *lanes = bump.take<T>(groups * call.dp * kGroup<T>);  // x by group, transposed: [groups][dp][kGroup]
  T *panel = bump.take<T>(groups * kMr * kRows + kGroup<T>);
  for (int g = 0; g < groups; ++g) {
    T *to = lanes + g * call.dp * kGroup<T>;
    for (int i = 0; i < call.d; ++i) {
      for (int m = 0; m < kGroup<T>; ++m)
        to[i * kGroup<T> + m] = m < kMr ? x[(g * kMr + m) * call.dp + i] : T(0);
    }
  }
  for (int64_t row = 0; row < call.D; row += kRows) {
    const int64_t n = lesser(kRows, call.D - row);
    const Cursor cursor = cursor_at(call.d, call.p, row);
    for (int g = 0; g < groups; ++g) {
      phi_panel<T>(call.d, call.p, cursor, n, lanes + g * call.dp * kGroup<T>, base + g * kGroup<T>,
                   panel + g * kMr * kRows, z != nullptr ? z + row : nullptr, dot + g * kGroup<T>);
    }
    for (int64_t c = 0; c < call.ep; c += kN) {
      for (int g = 0; g < groups; ++g) {
        tile<T, Start::kAdd, true>(n, panel + g * kMr * kRows, 0, n, 0, s + c * call.Dp + row * kN,
                                   out + c * out_rows + g * kMr * kN, kN, TileStart<T>{});
      }
    }
  }
}

// base [groups][kGroup] = common * one factor per row (null: 1); rows past count get 0.
template <class T>
inline void group_base(double common, const T *factor, int64_t count, int groups, T *base) {
  for (int g = 0; g < groups; ++g) {
    for (int m = 0; m < kGroup<T>; ++m) {
      const int64_t row = g * kMr + m;
      base[g * kGroup<T> + m] =
          m < kMr && row < count ? (factor != nullptr ? factor[row] : T(1)) * static_cast<T>(common) : T(0);
    }
  }
}

template <class T>
int64_t output_scratch(const Call<T> &call) {
  const int groups = static_cast<int>((call.tile + kMr - 1) / kMr);
  const int64_t rows = round_up(groups * kMr, kNr<T>);
  const int64_t elements = rows * call.dp + rows * call.ep + groups * kMr * kColumns + 6 * rows + 4 * kColumns +
                           2 * groups * kGroup<T> + kNr<T> * (call.dp + call.ep) + 64 * 16;
  const int64_t need = elements * static_cast<int64_t>(sizeof(T)) + query_scratch(call, groups);
#if defined(POWERATTN_AMX)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (call.low) return amx_output_scratch(call);
  }
#endif
  return need;
}

// y_i = N_i / l_i,  N_i = exp(g_i) scale^p mono(q_i)^T S~ + sum_{j <= i} exp(g_i - g_j) (scale q_i . k_j)^p
// v_j, l_i the same with z and 1, plus eps.
template <class T>
void output(const Call<T> &call, const Rows &q, double position, const Packed<T> &k, const Packed<T> &v,
            const Gates<T> &gates, const State<T> &state, Span span, const Rows &y, const Rows &row_norm,
            void *scratch) {
#if defined(POWERATTN_AMX)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (call.low) {
      amx_output(call, q, position, k, v, gates, state, span, y, row_norm, scratch);
      return;
    }
  }
#endif
  constexpr int kN = kNr<T>;
  const int groups = static_cast<int>((span.count + kMr - 1) / kMr);
  const int64_t rows = round_up(groups * kMr, kN), first = span.first;
  Bump bump{static_cast<char *>(scratch)};
  T *x = bump.take<T>(rows * call.dp);    // q [rows][dp]
  T *out = bump.take<T>(rows * call.ep);  // N [ep/kNr][rows][kNr]
  T *s = bump.take<T>(groups * kMr * kColumns);
  T *norm = bump.take<T>(rows);
  T *dot = bump.take<T>(groups * kGroup<T>);
  T *base = bump.take<T>(groups * kGroup<T>);
  BlockGate<T> gate;
  gate.gated = call.gated;
  gate.row = bump.take<T>(rows);
  gate.row_low = bump.take<T>(rows);
  gate.column = bump.take<T>(kColumns);
  gate.column_low = bump.take<T>(kColumns);
  T *line = bump.take<T>(kN * (call.dp + call.ep));

  Packed<T> q_rows{x - first * call.dp, nullptr, nullptr};
  pack<T>(call, q, call.rope_style != POWERATTN_ROPE_NONE, position, call.d, span, q_rows, line);
  for (int64_t i = round_up(span.count, kN) * call.dp; i < rows * call.dp; ++i) x[i] = 0;
  for (int64_t i = 0; i < rows * call.ep; ++i) out[i] = 0;
  for (int64_t i = 0; i < rows; ++i) norm[i] = 0;

  if (state.s != nullptr) {
    const T *factor = call.gated ? gates.from_start + first : nullptr;
    const T *z = row_norm.data != nullptr || call.normalize ? state.z : nullptr;
    group_base(call.scale_p, factor, span.count, groups, base);
    for (int i = 0; i < groups * kGroup<T>; ++i) dot[i] = 0;
    query(call, x, groups, base, state.s, z, out, rows, dot, bump);
    for (int64_t i = 0; i < span.count; ++i) norm[i] = dot[i / kMr * kGroup<T> + i % kMr];
  }

  int64_t from[kMaxGroups], to[kMaxGroups];
  for (int64_t j = 0; j <= first; j += kColumns) {
    // Blocks before the tile, then the diagonal block.
    const bool diagonal = j == first;
    const int64_t columns = diagonal ? span.count : lesser(kColumns, first - j);
    block_columns<T>(diagonal, false, groups, columns, from, to);
    if (call.gated) {
      gate.diagonal = diagonal;
      if (diagonal) {
        split_gates(gates, first, span.count, gate.row, gate.row_low);
        split_gates(gates, first, span.count, gate.column, gate.column_low);
      } else {
        if (j == 0) factor_gates(gates, first, span.count, first, 1, gate.row);
        factor_gates(gates, j, columns, first, -1, gate.column);
      }
    }
    multiply_block<T>(call.d, x, call.dp, groups, k.cols + j * call.dp, kN * call.dp, from, to, columns, s);
    for (int g = 0; g < groups; ++g) {
      for (int64_t i = g * kMr; i < (g + 1) * kMr; ++i) {
        const int64_t row = i < span.count ? i : span.count - 1;  // rows past the tile: any gate, all masked
        const int64_t high = i < span.count ? (diagonal ? i + 1 : columns) : 0;
        norm[i] += weight_row(s + i * kColumns, row, from[g], to[g], 0, high, call, gate);
      }
      // Of the diagonal block a group multiplies the columns up to its last row only.
      to[g] = diagonal ? lesser<int64_t>((g + 1) * kMr, columns) : columns;
    }
    multiply_out<T>(s, groups, from, to, v.strips + j * kN, kN * call.cp, call.ep, out, rows);
    if (!diagonal && j + kColumns > first) j = first - kColumns;  // the next block is the diagonal one
  }

  for (int64_t i = 0; i < span.count; ++i) {
    const T l = norm[i] + static_cast<T>(call.eps);
    const T r = !call.normalize ? T(1) : l != 0 ? T(1) / l : T(0);
    for (int c = 0; c < call.ep; c += kN) {
      for (int n = 0; n < kN; ++n) line[c + n] = out[c * rows + i * kN + n] * r;
    }
    store_row<T>(call.dtype, y, span.chunk + first + i, call.e, line);
    if (row_norm.data != nullptr) {
      static_cast<T *>(row_norm.data)[(span.chunk + first + i) * row_norm.stride] = l;
    }
  }
}
