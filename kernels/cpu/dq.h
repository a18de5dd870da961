// SPDX-License-Identifier: Apache-2.0
// The gradient of one tile of queries. Included by isa.h only.

constexpr int64_t kGradRows = 240 / kMr * kMr;  // state rows per pass: their gradients for one strip stay in L1

template <class T>
int64_t state_grad_scratch(const Call<T> &call, int64_t strips) {
  if (call.D == 0) return 0;
  return (kGradRows * kNr<T> + strips * contract_scratch<T>(call.d, call.p) + 64) *
         static_cast<int64_t>(sizeof(T));
}

// dx_t += J(x_t)^T (S~ b_t + z~ u_t),  J the Jacobian of the monomials: for each token strip
//   T = S~ B^T  [state rows][kNr],  contracted with the tokens degree by degree.
// b_cols [strips][ep][kNr], x_cols and dx [strips][dp][kNr], u [strips * kNr] or null (no z).
template <class T>
void state_grad(const Call<T> &call, const State<T> &state, const T *b_cols, const T *u, const T *x_cols,
                int64_t strips, T *dx, Bump bump) {
  constexpr int kN = kNr<T>;
  const int64_t levels = contract_scratch<T>(call.d, call.p);
  T *t = bump.take<T>(kGradRows * kN);
  T *up = bump.take<T>(strips * levels);
  for (int64_t i = 0; i < strips * levels; ++i) up[i] = 0;
  for (int64_t row = 0; row < call.D; row += kGradRows) {
    const int64_t n = lesser(kGradRows, call.D - row);
    const Cursor cursor = cursor_at(call.d, call.p, row);
    const int64_t prefix = call.p > 1 ? prefix_rank(call.d, call.p, cursor) * kN : 0;
    for (int64_t strip = 0; strip < strips; ++strip) {
      for (int64_t r = 0; r < n; r += kMr) {
        TileStart<T> start;
        const T *a = state.s + (row + r) * kN, *b = b_cols + strip * call.ep * kN;
        if (u != nullptr) {
          start.z = state.z + row + r;
          start.u = u + strip * kN;
          tile<T, Start::kOuter, false>(call.e, a, kN, kN, call.Dp * kN, b, t + r * kN, kN, start);
        } else {
          tile<T, Start::kZero, false>(call.e, a, kN, kN, call.Dp * kN, b, t + r * kN, kN, start);
        }
      }
      contract_level<T>(call.d, call.p, cursor, n, t, x_cols + strip * call.dp * kN, dx + strip * call.dp * kN,
                        up + strip * levels + prefix);
    }
  }
  for (int64_t strip = 0; strip < strips; ++strip) {
    contract_rest<T>(call.d, call.p, x_cols + strip * call.dp * kN, dx + strip * call.dp * kN,
                     up + strip * levels);
  }
}

template <class T>
int64_t dq_scratch(const Call<T> &call) {
  const int groups = static_cast<int>((call.tile + kMr - 1) / kMr);
  const int64_t rows = round_up(groups * kMr, kNr<T>);
  const int64_t elements =
      2 * rows * call.dp + 2 * groups * kMr * kColumns + 2 * rows + 2 * kColumns + call.dp + 64 * 16;
  return elements * static_cast<int64_t>(sizeof(T)) + state_grad_scratch(call, rows / kNr<T>);
}

// dq_i = exp(g_i) scale^p r_i J(q_i)^T (S~ dy_i - z~ delta_i) + scale sum_{j <= i} dS_ij k_j, rotated back,
// dS_ij = p s^(p-1) exp(g_i - g_j) r_i (dy_i . v_j - delta_i).
// a_i = q_i . dq_i / p is 0 up to eps when normalised; it is computed all the same, because its rounding
// errors are those of b_j and cancel in the gate gradient's sums.
template <class T>
void dq(const Call<T> &call, const Packed<T> &q, const OutputGrad<T> &grad, const Packed<T> &k,
        const Packed<T> &v, const Gates<T> &gates, const State<T> &state, Span span, int64_t tokens,
        double position, const Rows &d_q, void *scratch) {
  constexpr int kN = kNr<T>;
  const int groups = static_cast<int>((span.count + kMr - 1) / kMr);
  const int64_t rows = round_up(groups * kMr, kN), first = span.first, strips = (span.count + kN - 1) / kN;
  Bump bump{static_cast<char *>(scratch)};
  T *out = bump.take<T>(rows * call.dp);         // the chunk's part [dp/kNr][rows][kNr]
  T *from_state = bump.take<T>(rows * call.dp);  // the state's part, transposed [strips][dp][kNr]
  T *s = bump.take<T>(groups * kMr * kColumns), *ds = bump.take<T>(groups * kMr * kColumns);
  BlockGate<T> gate;
  gate.gated = call.gated;
  gate.row = bump.take<T>(rows);
  gate.row_low = bump.take<T>(rows);
  gate.column = bump.take<T>(kColumns);
  gate.column_low = bump.take<T>(kColumns);
  T *line = bump.take<T>(call.dp);

  for (int64_t i = 0; i < rows * call.dp; ++i) out[i] = from_state[i] = 0;
  if (state.s != nullptr) {
    state_grad(call, state, grad.dy.cols + first * call.ep, call.normalize ? grad.minus_delta + first : nullptr,
               q.cols + first * call.dp, strips, from_state, bump);
  }

  const T *x = q.rows + first * call.dp, *dy = grad.dy.rows + first * call.ep;
  int64_t from[kMaxGroups], to[kMaxGroups];
  for (int64_t j = 0; j <= first; j += kColumns) {
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
    multiply_block<T>(call.e, dy, call.ep, groups, v.cols + j * call.ep, kN * call.ep, from, to, columns, ds);
    for (int g = 0; g < groups; ++g) {
      for (int64_t i = g * kMr; i < (g + 1) * kMr; ++i) {
        const int64_t row = i < span.count ? i : span.count - 1;
        const int64_t high = i < span.count ? (diagonal ? i + 1 : columns) : 0;
        gradient_row<T, false>(s + i * kColumns, ds + i * kColumns, row, from[g], to[g], 0, high, call, gate,
                               grad.r + first, grad.minus_delta + first);
      }
      to[g] = diagonal ? lesser<int64_t>((g + 1) * kMr, columns) : columns;
    }
    multiply_out<T>(ds, groups, from, to, k.strips + j * kN, kN * call.cp, call.dp, out, rows);
    if (!diagonal && j + kColumns > first) j = first - kColumns;
  }

  const bool rotate = call.rope_style != POWERATTN_ROPE_NONE;
  Rotation rotation;
  if (rotate) rotation_begin(call, position + static_cast<double>(span.chunk + first), &rotation);
  const T scale = static_cast<T>(call.scale);
  for (int64_t i = 0; i < span.count; ++i) {
    const T decay =
        (call.gated ? gates.from_start[first + i] : T(1)) * grad.r[first + i] * static_cast<T>(call.scale_p);
    const T *state_part = from_state + i / kN * kN * call.dp + i % kN;
    double dot = 0;
    for (int c = 0; c < call.d; ++c) {
      line[c] = scale * out[c / kN * kN * rows + i * kN + c % kN] + decay * state_part[c * kN];
      dot += static_cast<double>(line[c]) * x[i * call.dp + c];
    }
    if (grad.a != nullptr) grad.a[first + i] = dot / call.p;
    if (rotate) {
      rotation_next(call, &rotation);
      rotate_row<T, true>(call, rotation, line);
    }
    store_row<T>(call.dtype, d_q, span.chunk + first + i, call.d, line);
  }
}
