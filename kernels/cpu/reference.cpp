// SPDX-License-Identifier: Apache-2.0
#include "reference.h"

#include <limits>

#include "monomial.h"
#include "reference_rows.h"

namespace powerattn::reference {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

uint64_t saturating_product(uint64_t a, uint64_t b) {
  return a != 0 && b > UINT64_MAX / a ? UINT64_MAX : a * b;
}

uint64_t saturating_sum(uint64_t a, uint64_t b) { return b > UINT64_MAX - a ? UINT64_MAX : a + b; }

// rows * (a + b + ...) float64 values plus one row of S, in bytes.
uint64_t bytes(const Problem &p, uint64_t values_per_token, uint64_t values_per_query) {
  const uint64_t tokens = static_cast<uint64_t>(p.seq_len);
  const uint64_t group = static_cast<uint64_t>(p.group());
  uint64_t values = saturating_product(tokens, values_per_token);
  values = saturating_sum(values, saturating_product(saturating_product(tokens, group), values_per_query));
  values = saturating_sum(values, 4 * static_cast<uint64_t>(p.value_dim) + 8);
  return saturating_product(values, sizeof(double));
}

// head[i] = log_g_0 + .. + log_g_i, tail[j] = log_g_{j+1} + .. + log_g_{t-1}.
void sum_gates(const double *gate, int64_t t, double *head, double *tail) {
  double sum = 0;
  for (int64_t i = 0; i < t; ++i) head[i] = sum += gate[i];
  sum = 0;
  for (int64_t j = t - 1; j >= 0; --j) {
    tail[j] = sum;
    sum += gate[j];
  }
}

// state[r] = exp(G_T) initial[r] + sum_j exp(tail_j) phi(k_j)[r] (v_j, 1); `initial` may be the same memory.
void write_final_state(const Problem &p, int64_t t, const double *k, const double *v, const double *tail,
                       double total, const StateView &initial, const StateView &state, double *row,
                       double *initial_row) {
  const int64_t d = p.head_dim, e = p.value_dim;
  const double carry = std::exp(total);
  Monomial phi(d, p.degree);
  for (int64_t r = 0; r < p.state_rows; ++r, phi.next()) {
    double z = 0;
    for (int64_t c = 0; c < e; ++c) row[c] = 0;
    if (initial.s && carry != 0) {
      double z0;
      initial.load(r, initial_row, &z0);
      z = carry * z0;
      for (int64_t c = 0; c < e; ++c) row[c] = carry * initial_row[c];
    }
    for (int64_t j = 0; j < t; ++j) {
      if (tail[j] == kNever) continue;
      const double a = std::exp(tail[j]) * phi.value(k + j * d);
      for (int64_t c = 0; c < e; ++c) row[c] += a * v[j * e + c];
      z += a;
    }
    state.store(r, row, z);
  }
}

}  // namespace

Sizes sizes(const Problem &p) {
  const uint64_t d = static_cast<uint64_t>(p.head_dim), e = static_cast<uint64_t>(p.value_dim);
  Sizes s;
  s.forward = bytes(p, 2 * d + 2 * e + 4, 0);
  s.backward = s.backward_saved = bytes(p, 2 * d + 2 * e + 6, 2 * d + e + 1);
  s.step = bytes(p, d + e + 1, d + e + 1);
  s.summary = bytes(p, d + e + 3, d + e + 1);
  return s;
}

void forward(const Problem &p, const powerattn_forward_args &a) {
  const int64_t d = p.head_dim, e = p.value_dim, rows = p.seq_len;
  Workspace workspace(a.workspace);
  double *k = workspace.take(rows * d), *v = workspace.take(rows * e);
  double *q = workspace.take(rows * d), *y = workspace.take(rows * e);
  double *norm = workspace.take(rows), *gate = workspace.take(rows);
  double *head = workspace.take(rows), *tail = workspace.take(rows);
  double *row = workspace.take(e), *row2 = workspace.take(e);
  const double scale_p = power(p.scale, p.degree);

  for (int64_t n = 0; n < p.sequences; ++n) {
    const Sequence s = sequence_at(p, n, a.cu_seqlens, a.rope_offset);
    for (int64_t g = 0; g < p.heads_kv; ++g) {
      const StateView initial(p, a.initial_state, n, g), final_state(p, a.final_state, n, g);
      load_rows(p, p.dtype, a.k, s, g, d, k);
      load_rows(p, p.dtype, a.v, s, g, e, v);
      load_log_gates(p, a.log_g, s, g, gate);
      rotate_rows(p, s, +1, k);
      sum_gates(gate, s.length, head, tail);

      for (int64_t h = g * p.group(); h < (g + 1) * p.group(); ++h) {
        load_rows(p, p.dtype, a.q, s, h, d, q);
        rotate_rows(p, s, +1, q);
        for (int64_t i = 0; i < s.length * e; ++i) y[i] = 0;
        for (int64_t i = 0; i < s.length; ++i) norm[i] = 0;

        // (y_i, l_i) += exp(G_i) scale^p phi(q_i) (S0, z0)
        if (initial.s) {
          Monomial phi(d, p.degree);
          for (int64_t r = 0; r < p.state_rows; ++r, phi.next()) {
            double z;
            initial.load(r, row, &z);
            for (int64_t i = 0; i < s.length && head[i] != kNever; ++i) {
              const double w = std::exp(head[i]) * scale_p * phi.value(q + i * d);
              for (int64_t c = 0; c < e; ++c) y[i * e + c] += w * row[c];
              norm[i] += w * z;
            }
          }
        }

        // w_ij = exp(G_i - G_j) (scale q_i . k_j)^p,  (y_i, l_i) += w_ij (v_j, 1)
        // The exponent is summed from j = i downwards: no difference of two large sums, and a reset ends it.
        for (int64_t i = 0; i < s.length; ++i) {
          double exponent = 0;
          for (int64_t j = i; j >= 0 && exponent != kNever; exponent += gate[j--]) {
            const double w = std::exp(exponent) * power(p.scale * dot(q + i * d, k + j * d, d), p.degree);
            for (int64_t c = 0; c < e; ++c) y[i * e + c] += w * v[j * e + c];
            norm[i] += w;
          }
          norm[i] += p.eps;
          if (p.normalize) {
            for (int64_t c = 0; c < e; ++c) y[i * e + c] = norm[i] == 0 ? 0 : y[i * e + c] / norm[i];
          }
        }
        store_rows(p, p.dtype, a.y, s, h, e, y);
        if (a.row_norm.data) store_rows(p, p.stat_dtype, a.row_norm, s, h, 1, norm);
      }

      if (final_state.s) {
        const double total = s.length > 0 ? head[s.length - 1] : 0;
        write_final_state(p, s.length, k, v, tail, total, initial, final_state, row, row2);
      }
    }
  }
  const Sequence padding = padding_of(p, a.cu_seqlens);
  zero_rows(p, p.dtype, a.y, padding, p.heads_q, e);
  zero_rows(p, p.stat_dtype, a.row_norm, padding, p.heads_q, 1);
}

void backward(const Problem &p, const powerattn_backward_args &a) {
  const int64_t d = p.head_dim, e = p.value_dim, rows = p.seq_len, group = p.group();
  Workspace workspace(a.workspace);
  double *k = workspace.take(rows * d), *v = workspace.take(rows * e);
  double *dk = workspace.take(rows * d), *dv = workspace.take(rows * e);
  double *gate = workspace.take(rows), *head = workspace.take(rows), *tail = workspace.take(rows);
  double *d_gate = workspace.take(rows), *x = workspace.take(rows), *x_final = workspace.take(rows);
  double *q = workspace.take(group * rows * d), *dq = workspace.take(group * rows * d);
  double *dn = workspace.take(group * rows * e), *dl = workspace.take(group * rows);
  double *row = workspace.take(e), *d_row = workspace.take(e), *final_row = workspace.take(e);
  const double scale_p = power(p.scale, p.degree);

  for (int64_t n = 0; n < p.sequences; ++n) {
    const Sequence s = sequence_at(p, n, a.cu_seqlens, a.rope_offset);
    const int64_t t = s.length;
    for (int64_t g = 0; g < p.heads_kv; ++g) {
      const StateView initial(p, a.initial_state, n, g), d_final(p, a.d_final_state, n, g),
          d_initial(p, a.d_initial_state, n, g);
      load_rows(p, p.dtype, a.k, s, g, d, k);
      load_rows(p, p.dtype, a.v, s, g, e, v);
      load_log_gates(p, a.log_g, s, g, gate);
      rotate_rows(p, s, +1, k);
      sum_gates(gate, t, head, tail);
      for (int64_t i = 0; i < t * d; ++i) dk[i] = 0;
      for (int64_t i = 0; i < t * e; ++i) dv[i] = 0;
      for (int64_t i = 0; i < t; ++i) d_gate[i] = 0;

      // dN_i = dy_i / l_i, dl_i = -(dy_i . y_i) / l_i; unnormalised: dN_i = dy_i, dl_i = 0
      for (int64_t m = 0; m < group; ++m) {
        const int64_t h = g * group + m;
        double *qm = q + m * rows * d, *dnm = dn + m * rows * e;
        load_rows(p, p.dtype, a.q, s, h, d, qm);
        rotate_rows(p, s, +1, qm);
        load_rows(p, p.dtype, a.d_y, s, h, e, dnm);
        for (int64_t i = 0; i < t; ++i) {
          dl[m * rows + i] = 0;
          if (!p.normalize) continue;
          const double norm = load_element(p.stat_dtype, a.row_norm.data, offset_of(p, a.row_norm, s, i, h));
          const int64_t y_at = offset_of(p, a.y, s, i, h);
          double delta = 0;
          for (int64_t c = 0; c < e; ++c) {
            delta += dnm[i * e + c] * load_element(p.dtype, a.y.data, y_at + c);
            dnm[i * e + c] = norm == 0 ? 0 : dnm[i * e + c] / norm;
          }
          dl[m * rows + i] = norm == 0 ? 0 : -delta / norm;
        }
      }
      for (int64_t i = 0; i < group * rows * d; ++i) dq[i] = 0;

      // dW_ij = dN_i . v_j + dl_i,  s_ij = scale q_i . k_j,  ds_ij = exp(G_i - G_j) p s_ij^(p-1) dW_ij
      // dv_j += w_ij dN_i,  dq_i += scale ds_ij k_j,  dk_j += scale ds_ij q_i
      // x_ij = w_ij dW_ij,  d log_g_m += x_ij for j < m <= i
      for (int64_t m = 0; m < group; ++m) {
        for (int64_t i = 0; i < t; ++i) {
          const double *qi = q + (m * rows + i) * d, *dni = dn + (m * rows + i) * e;
          double *dqi = dq + (m * rows + i) * d;
          const double dli = dl[m * rows + i];
          double exponent = 0;
          int64_t first = i + 1;  // the oldest token that i sees
          for (int64_t j = i; j >= 0 && exponent != kNever; exponent += gate[j--]) {
            const double score = p.scale * dot(qi, k + j * d, d);
            const double less = std::exp(exponent) * power(score, p.degree - 1), w = less * score;
            const double dw = dot(dni, v + j * e, e) + dli;
            const double ds = p.scale * p.degree * less * dw;
            for (int64_t c = 0; c < d; ++c) {
              dqi[c] += ds * k[j * d + c];
              dk[j * d + c] += ds * qi[c];
            }
            for (int64_t c = 0; c < e; ++c) dv[j * e + c] += w * dni[c];
            x[j] = w * dw;
            first = j;
          }
          double sum = 0;
          for (int64_t j = first; j < i; ++j) d_gate[j + 1] += sum += x[j];
        }
      }

      // The states, row by row. With a_ir = exp(G_i) scale^p phi(q_i)[r] and b_jr = exp(tail_j) phi(k_j)[r]:
      //   da_ir = dN_i . S0_r + dl_i z0_r       db_jr = v_j . dS_r + dz_r
      //   dS0_r = sum_i a_ir dN_i + exp(G_T) dS_r   dv_j += b_jr dS_r
      if (initial.s || d_final.s || d_initial.s) {
        const double total = t > 0 ? head[t - 1] : 0, carry = std::exp(total);
        double from_start = 0;                           // x of the initial against the final state
        for (int64_t i = 0; i < t; ++i) x[i] = 0;        // x of the initial state against token i
        for (int64_t j = 0; j < t; ++j) x_final[j] = 0;  // x of token j against the final state
        Monomial phi(d, p.degree);
        for (int64_t r = 0; r < p.state_rows; ++r, phi.next()) {
          double z0 = 0, dz = 0, dz0 = 0;
          for (int64_t c = 0; c < e; ++c) row[c] = d_row[c] = final_row[c] = 0;
          if (initial.s) initial.load(r, row, &z0);
          if (d_final.s) d_final.load(r, final_row, &dz);
          for (int64_t m = 0; m < group; ++m) {
            for (int64_t i = 0; i < t && head[i] != kNever; ++i) {
              const double *qi = q + (m * rows + i) * d, *dni = dn + (m * rows + i) * e;
              const double dli = dl[m * rows + i], factor = std::exp(head[i]) * scale_p;
              const double w = factor * phi.value(qi);
              for (int64_t c = 0; c < e; ++c) d_row[c] += w * dni[c];
              dz0 += w * dli;
              if (!initial.s) continue;
              const double dw = dot(dni, row, e) + dli * z0;
              phi.add_gradient(qi, factor * dw, dq + (m * rows + i) * d);
              x[i] += w * dw;
            }
          }
          if (d_final.s) {
            for (int64_t j = t - 1; j >= 0 && tail[j] != kNever; --j) {
              const double factor = std::exp(tail[j]), w = factor * phi.value(k + j * d);
              const double dw = dot(v + j * e, final_row, e) + dz;
              for (int64_t c = 0; c < e; ++c) dv[j * e + c] += w * final_row[c];
              phi.add_gradient(k + j * d, factor * dw, dk + j * d);
              x_final[j] += w * dw;
            }
            if (carry != 0) {
              from_start += carry * (dot(row, final_row, e) + z0 * dz);
              for (int64_t c = 0; c < e; ++c) d_row[c] += carry * final_row[c];
              dz0 += carry * dz;
            }
          }
          if (d_initial.s) d_initial.store(r, d_row, dz0);
        }
        double after = from_start, before = 0;
        for (int64_t i = t - 1; i >= 0; --i) d_gate[i] += after += x[i];
        for (int64_t j = 0; j + 1 < t; ++j) d_gate[j + 1] += before += x_final[j];
      }

      for (int64_t m = 0; m < group; ++m) {
        rotate_rows(p, s, -1, dq + m * rows * d);
        store_rows(p, p.dtype, a.d_q, s, g * group + m, d, dq + m * rows * d);
      }
      rotate_rows(p, s, -1, dk);
      store_rows(p, p.dtype, a.d_k, s, g, d, dk);
      store_rows(p, p.dtype, a.d_v, s, g, e, dv);
      if (a.d_log_g.data) store_rows(p, p.stat_dtype, a.d_log_g, s, g, 1, d_gate);
    }
  }
  const Sequence padding = padding_of(p, a.cu_seqlens);
  zero_rows(p, p.dtype, a.d_q, padding, p.heads_q, d);
  zero_rows(p, p.dtype, a.d_k, padding, p.heads_kv, d);
  zero_rows(p, p.dtype, a.d_v, padding, p.heads_kv, e);
  zero_rows(p, p.stat_dtype, a.d_log_g, padding, p.heads_kv, 1);
}

}  // namespace powerattn::reference
