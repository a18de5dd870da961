// SPDX-License-Identifier: Apache-2.0
#include "sm90_memory.h"

#include "kernels/cuda/sm90/kernels.h"

namespace powerattn::cuda::sm90 {
namespace {

int64_t tiles_of(const Problem &p, const Tiling &t) { return tile_bound(p, chunk_of(p, t), kOutputRows); }

}  // namespace

int64_t counters_of(const Problem &p, const Tiling &t) {
  const int64_t limits = with_units(p) ? 4 * chunk_bound(p, chunk_of(p, t)) * p.heads_kv : 0;
  return kTickets * kTicketLaunches + limits;
}
int64_t turns_of(const Problem &p, const Tiling &t) { return joint_turns(tiles_of(p, t), p.heads_q); }

Common carve_common(const Problem &p, const Tiling &t, Carver *c) {
  Common m;
  const int64_t rows = p.batch * p.heads_kv * p.seq_len;
  m.tables = c->take<char>(static_cast<int64_t>(chunk_table_bytes(p, chunk_of(p, t), kOutputRows)));
  m.tickets = c->take<int32_t>(counters_of(p, t));
  m.gate = c->take<double>(rows);
  if (chunked(t)) {
    m.g = c->take<float>(rows);
    m.weight = c->take<float>(rows);
  }
  m.sums = carve_sums(p, t, with_z(p), c);
  m.rotated = carve_rotated(p, c);
  return m;
}

Gradients carve_gradients(const Problem &p, const Tiling &t, Carver *c) {
  Gradients g;
  const int64_t rows_q = p.batch * p.heads_q * p.seq_len, rows_kv = p.batch * p.heads_kv * p.seq_len;
  g.r = c->take<float>(rows_q);
  g.delta = c->take<float>(rows_q);
  g.q_dot = c->take<float>(rows_q);
  g.k_dot = c->take<float>(rows_kv);
  if (with_rope(p)) {
    g.d_q = c->take<float>(rows_q * p.head_dim);
    g.d_k = c->take<float>(rows_kv * p.head_dim);
  }
  if (in_one_pass(p, chunked(t))) {
    g.turns = c->take<int32_t>(turns_of(p, t));
    g.sums = c->take<float>(joint_sums(tiles_of(p, t), p.heads_q, p.head_dim));
  }
  if (chunked(t)) {
    g.weight = c->take<float>(rows_q);
    g.z_weight = c->take<float>(rows_q);
    if (p.use_state) g.k_state_dot = c->take<float>(rows_kv);
  }
  g.products = carve_products(p, t, c);
  g.states = carve_states(p, t, with_z(p), c);
  return g;
}

Sizes sizes(const Problem &p, const Tiling &t) {
  return sizes_of([&](Carver *c) { carve_states(p, t, with_z(p), c); },
                  [&](Carver *c) { carve_common(p, t, c); },
                  [&](Carver *c) {
                    carve_common(p, t, c);
                    carve_gradients(p, t, c);
                  });
}

}  // namespace powerattn::cuda::sm90
