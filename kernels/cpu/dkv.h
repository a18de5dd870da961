// SPDX-License-Identifier: Apache-2.0
// The gradients of one tile of keys and values. Included by isa.h only.

template <class T>
int64_t dkv_scratch(const Call<T> &call) {
  const int groups = static_cast<int>((call.tile + kMr - 1) / kMr);
  const int64_t rows = round_up(groups * kMr, kNr<T>);
  const int64_t elements = 2 * rows * call.dp + rows * call.ep + 2 * groups * kMr * kColumns + 3 * rows +
                           2 * kColumns + call.dp + call.ep + 2 * groups * kGroup<T> + 64 * 16;
  const int64_t grad = state_grad_scratch(call, rows / kNr<T>), value = query_scratch(call, groups);
  return elements * static_cast<int64_t>(sizeof(T)) + (grad > value ? grad : value);
}

// With w_j = exp(g_end - g_j), over the query heads of the group:
//   dv_j = w_j mono(k_j)^T dS~ + sum_{i >= j} P_ij dN_i
//   dk_j = w_j J(k_j)^T (dS~ v_j + dz~) + scale sum_{i >= j} dS_ij q_i
// and b_j = k_j . dk_j / p before rounding.
template <class T>
void dkv(const Call<T> &call, int heads, const Packed<T> *q, const OutputGrad<T> *grad, const Packed<T> &k,
         const Packed<T> &v, const Gates<T> &gates, const State<T> &d_state, Span span, int64_t tokens,
         double position, const Rows &d_k, const Rows &d_v, double *b, void *scratch) {
  constexpr int kN = kNr<T>;
  const int groups = static_cast<int>((span.count + kMr - 1) / kMr);
  const int64_t rows = round_up(groups * kMr, kN), first = span.first, strips = (span.count + kN - 1) / kN;
  Bump bump{static_cast<char *>(scratch)};
  T *dk = bump.take<T>(rows * call.dp), *dv = bump.take<T>(rows * call.ep);  // strips, as `out` of dq
  T *from_state = bump.take<T>(rows * call.dp);
  T *s = bump.take<T>(groups * kMr * kColumns), *ds = bump.take<T>(groups * kMr * kColumns);
  T *ones = bump.take<T>(rows), *base = bump.take<T>(groups * kGroup<T>),
    *dot = bump.take<T>(groups * kGroup<T>);
  BlockGate<T> gate;
  gate.gated = call.gated;
  gate.row_sign = -1;
  gate.row = bump.take<T>(rows);
  gate.row_low = bump.take<T>(rows);
  gate.column = bump.take<T>(kColumns);
  gate.column_low = bump.take<T>(kColumns);
  T *line = bump.take<T>(call.dp + call.ep);

  for (int64_t i = 0; i < rows * call.dp; ++i) dk[i] = from_state[i] = 0;
  for (int64_t i = 0; i < rows * call.ep; ++i) dv[i] = 0;
  const T *x = k.rows + first * call.dp, *value = v.rows + first * call.ep;
  if (d_state.s != nullptr) {
    group_base(1.0, call.gated ? gates.to_end + first : nullptr, span.count, groups, base);
    query<T>(call, x, groups, base, d_state.s, nullptr, dv, rows, dot, bump);
    for (int64_t i = 0; i < rows; ++i) ones[i] = 1;
    state_grad(call, d_state, v.cols + first * call.ep, d_state.z != nullptr ? ones : nullptr,
               k.cols + first * call.dp, strips, from_state, bump);
  }

  int64_t from[kMaxGroups], to[kMaxGroups];
  // The last key of the tile lies between every key of it and every query after it.
  const int64_t reference = first + span.count - 1;
  for (int64_t i0 = first; i0 < tokens; i0 = i0 == first ? first + call.tile : i0 + kColumns) {
    const bool diagonal = i0 == first;
    const int64_t columns = diagonal ? span.count : lesser(kColumns, tokens - i0);
    if (call.gated) {
      gate.diagonal = diagonal;
      if (diagonal) {
        split_gates(gates, first, span.count, gate.row, gate.row_low);
        split_gates(gates, first, span.count, gate.column, gate.column_low);
      } else {
        if (i0 == first + call.tile) factor_gates(gates, first, span.count, reference, -1, gate.row);
        factor_gates(gates, i0, columns, reference, 1, gate.column);
        for (int64_t c = columns; c < round_up(columns, kN); ++c) gate.column[c] = 0;
      }
    }
    for (int h = 0; h < heads; ++h) {
      block_columns<T>(diagonal, true, groups, columns, from, to);
      multiply_block<T>(call.d, x, call.dp, groups, q[h].cols + i0 * call.dp, kN * call.dp, from, to, columns,
                        s);
      multiply_block<T>(call.e, value, call.ep, groups, grad[h].dy.cols + i0 * call.ep, kN * call.ep, from, to,
                        columns, ds);
      for (int g = 0; g < groups; ++g) {
        for (int64_t j = g * kMr; j < (g + 1) * kMr; ++j) {
          const int64_t row = j < span.count ? j : span.count - 1;
          const int64_t high = j < span.count ? columns : 0;
          gradient_row<T, true>(s + j * kColumns, ds + j * kColumns, row, from[g], to[g], diagonal ? j : 0,
                                high, call, gate, grad[h].r + i0, grad[h].minus_delta + i0);
        }
        to[g] = columns;
      }
      multiply_out<T>(s, groups, from, to, grad[h].dy.strips + i0 * kN, kN * call.cp, call.ep, dv, rows);
      multiply_out<T>(ds, groups, from, to, q[h].strips + i0 * kN, kN * call.cp, call.dp, dk, rows);
    }
  }

  const bool rotate = call.rope_style != POWERATTN_ROPE_NONE;
  Rotation rotation;
  if (rotate) rotation_begin(call, position + static_cast<double>(span.chunk + first), &rotation);
  const T scale = static_cast<T>(call.scale);
  for (int64_t j = 0; j < span.count; ++j) {
    const T decay = call.gated ? gates.to_end[first + j] : T(1);
    const T *state_part = from_state + j / kN * kN * call.dp + j % kN;
    double dot_k = 0;
    for (int c = 0; c < call.d; ++c) {
      line[c] = scale * dk[c / kN * kN * rows + j * kN + c % kN] + decay * state_part[c * kN];
      dot_k += static_cast<double>(line[c]) * x[j * call.dp + c];
    }
    if (b != nullptr) b[first + j] = dot_k / call.p;
    if (rotate) {
      rotation_next(call, &rotation);
      rotate_row<T, true>(call, rotation, line);
    }
    store_row<T>(call.dtype, d_k, span.chunk + first + j, call.d, line);
    for (int c = 0; c < call.ep; c += kN) {
      for (int n = 0; n < kN; ++n) line[c + n] = dv[c * rows + j * kN + n];
    }
    store_row<T>(call.dtype, d_v, span.chunk + first + j, call.e, line);
  }
}
