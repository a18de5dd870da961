// SPDX-License-Identifier: Apache-2.0
// The reference's operations on states: step, and the summaries of a segment in both directions.
#include "monomial.h"
#include "reference.h"
#include "reference_rows.h"

namespace powerattn::reference {

// For each row r of the state, token by token:
//   S_r <- exp(log_g) S_r + phi(k)[r] v,  z_r likewise,  y += scale^p phi(q)[r] S_r,  l += scale^p phi(q)[r]
//   z_r
// and at the end y / (l + eps). The state is rounded to its dtype once per call.
void step(const Problem &p, const powerattn_step_args &a) {
  const int64_t d = p.head_dim, e = p.value_dim, rows = p.seq_len, group = p.group();
  Workspace workspace(a.workspace);
  double *k = workspace.take(rows * d), *v = workspace.take(rows * e), *gate = workspace.take(rows);
  double *q = workspace.take(group * rows * d), *y = workspace.take(group * rows * e);
  double *norm = workspace.take(group * rows), *row = workspace.take(e);
  const double scale_p = power(p.scale, p.degree);

  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = a.slots ? a.slots[b] : b;
    Sequence s;
    s.b = b;
    s.position = a.rope_offset ? static_cast<double>(a.rope_offset[b]) : 0;
    s.length = slot < 0 ? 0 : a.lengths ? a.lengths[b] : p.seq_len;
    Sequence padding = s;
    padding.start = s.length;
    padding.length = p.seq_len - s.length;
    zero_rows(p, p.dtype, a.y, padding, p.heads_q, e);
    if (s.length == 0) continue;

    for (int64_t g = 0; g < p.heads_kv; ++g) {
      load_rows(p, p.dtype, a.k, s, g, d, k);
      load_rows(p, p.dtype, a.v, s, g, e, v);
      load_log_gates(p, a.log_g, s, g, gate);
      rotate_rows(p, s, +1, k);
      for (int64_t m = 0; m < group; ++m) {
        load_rows(p, p.dtype, a.q, s, g * group + m, d, q + m * rows * d);
        rotate_rows(p, s, +1, q + m * rows * d);
      }
      for (int64_t i = 0; i < group * rows * e; ++i) y[i] = 0;
      for (int64_t i = 0; i < group * rows; ++i) norm[i] = p.eps;

      const StateView state(p, a.state, slot, g);
      Monomial phi(d, p.degree);
      for (int64_t r = 0; r < p.state_rows; ++r, phi.next()) {
        double z;
        state.load(r, row, &z);
        for (int64_t i = 0; i < s.length; ++i) {
          const double decay = std::exp(gate[i]), w = phi.value(k + i * d);
          for (int64_t c = 0; c < e; ++c) row[c] = (decay == 0 ? 0 : decay * row[c]) + w * v[i * e + c];
          z = (decay == 0 ? 0 : decay * z) + w;
          for (int64_t m = 0; m < group; ++m) {
            const double u = scale_p * phi.value(q + (m * rows + i) * d);
            for (int64_t c = 0; c < e; ++c) y[(m * rows + i) * e + c] += u * row[c];
            norm[m * rows + i] += u * z;
          }
        }
        state.store(r, row, z);
      }

      for (int64_t m = 0; m < group; ++m) {
        for (int64_t i = 0; p.normalize && i < s.length; ++i) {
          const double l = norm[m * rows + i];
          double *yi = y + (m * rows + i) * e;
          for (int64_t c = 0; c < e; ++c) yi[c] = l == 0 ? 0 : yi[c] / l;
        }
        store_rows(p, p.dtype, a.y, s, g * group + m, e, y + m * rows * e);
      }
    }
  }
}

// S_r = sum_j exp(G_T - G_j) phi(k_j)[r] v_j,  z_r likewise,  L = G_T
void summary(const Problem &p, const powerattn_summary_args &a) {
  const int64_t d = p.head_dim, e = p.value_dim, rows = p.seq_len;
  Workspace workspace(a.workspace);
  double *k = workspace.take(rows * d), *v = workspace.take(rows * e), *gate = workspace.take(rows);
  double *decay = workspace.take(rows), *row = workspace.take(e);

  for (int64_t n = 0; n < p.sequences; ++n) {
    const Sequence s = sequence_at(p, n, a.cu_seqlens, a.rope_offset);
    for (int64_t g = 0; g < p.heads_kv; ++g) {
      load_rows(p, p.dtype, a.k, s, g, d, k);
      load_rows(p, p.dtype, a.v, s, g, e, v);
      load_log_gates(p, a.log_g, s, g, gate);
      rotate_rows(p, s, +1, k);
      double total = 0;
      for (int64_t j = s.length - 1; j >= 0; --j) {
        decay[j] = std::exp(total);
        total += gate[j];
      }
      const StateView state(p, a.state, n, g);
      Monomial phi(d, p.degree);
      for (int64_t r = 0; r < p.state_rows; ++r, phi.next()) {
        double z = 0;
        for (int64_t c = 0; c < e; ++c) row[c] = 0;
        for (int64_t j = 0; j < s.length; ++j) {
          if (decay[j] == 0) continue;
          const double w = decay[j] * phi.value(k + j * d);
          for (int64_t c = 0; c < e; ++c) row[c] += w * v[j * e + c];
          z += w;
        }
        state.store(r, row, z);
      }
      if (a.total_log_g) store_element(p.stat_dtype, a.total_log_g, n * p.heads_kv + g, total);
    }
  }
}

// dS_r = sum_i exp(G_i) scale^p phi(q_i)[r] dy_i / l_i,  dz_r = -sum_i exp(G_i) scale^p phi(q_i)[r] (dy_i .
// y_i) / l_i
void summary_reverse(const Problem &p, const powerattn_summary_reverse_args &a) {
  const int64_t d = p.head_dim, e = p.value_dim, rows = p.seq_len, group = p.group();
  Workspace workspace(a.workspace);
  double *gate = workspace.take(rows), *decay = workspace.take(rows);
  double *q = workspace.take(group * rows * d), *dn = workspace.take(group * rows * e);
  double *dl = workspace.take(group * rows), *row = workspace.take(e);
  const double scale_p = power(p.scale, p.degree);

  for (int64_t n = 0; n < p.sequences; ++n) {
    const Sequence s = sequence_at(p, n, a.cu_seqlens, a.rope_offset);
    for (int64_t g = 0; g < p.heads_kv; ++g) {
      load_log_gates(p, a.log_g, s, g, gate);
      double total = 0;
      for (int64_t i = 0; i < s.length; ++i) decay[i] = std::exp(total += gate[i]);
      for (int64_t m = 0; m < group; ++m) {
        const int64_t h = g * group + m;
        double *dnm = dn + m * rows * e;
        load_rows(p, p.dtype, a.q, s, h, d, q + m * rows * d);
        rotate_rows(p, s, +1, q + m * rows * d);
        load_rows(p, p.dtype, a.d_y, s, h, e, dnm);
        for (int64_t i = 0; i < s.length; ++i) {
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
      const StateView state(p, a.d_state, n, g);
      Monomial phi(d, p.degree);
      for (int64_t r = 0; r < p.state_rows; ++r, phi.next()) {
        double z = 0;
        for (int64_t c = 0; c < e; ++c) row[c] = 0;
        for (int64_t m = 0; m < group; ++m) {
          for (int64_t i = 0; i < s.length; ++i) {
            if (decay[i] == 0) continue;
            const double w = decay[i] * scale_p * phi.value(q + (m * rows + i) * d);
            for (int64_t c = 0; c < e; ++c) row[c] += w * dn[(m * rows + i) * e + c];
            z += w * dl[m * rows + i];
          }
        }
        state.store(r, row, z);
      }
      if (a.total_log_g) store_element(p.stat_dtype, a.total_log_g, n * p.heads_kv + g, total);
    }
  }
}

}  // namespace powerattn::reference
