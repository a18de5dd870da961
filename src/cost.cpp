// SPDX-License-Identifier: Apache-2.0
#include "cost.h"

#include <algorithm>

namespace powerattn {
namespace {

double d(const Problem &p) { return static_cast<double>(p.head_dim); }
double e(const Problem &p) { return static_cast<double>(p.value_dim); }
double rows(const Problem &p) { return static_cast<double>(p.state_rows); }
double size(const Problem &p) { return static_cast<double>(size_of(p.dtype)); }
// Columns of a state that are multiplied: z is one more when the output is normalised.
double columns(const Problem &p) { return e(p) + (p.normalize ? 1 : 0); }
// (token, head) pairs.
double tokens_q(const Problem &p) {
  return static_cast<double>(p.batch) * static_cast<double>(p.seq_len) * static_cast<double>(p.heads_q);
}
double tokens_kv(const Problem &p) {
  return static_cast<double>(p.batch) * static_cast<double>(p.seq_len) * static_cast<double>(p.heads_kv);
}

// Mean number of keys that a query sees inside a span of n tokens: (n + 1) / 2.
double keys_seen(double n) { return (n + 1) / 2; }

double forward_io(const Problem &p) {
  return size(p) * (tokens_q(p) * (d(p) + e(p)) + tokens_kv(p) * (d(p) + e(p)));
}
// q, k, v, y, d_y read, d_q, d_k, d_v written.
double backward_io(const Problem &p) {
  return size(p) * (tokens_q(p) * (2 * d(p) + 2 * e(p)) + tokens_kv(p) * (2 * d(p) + 2 * e(p)));
}

// Packed sequences: about as many full chunks as the tokens fill, and at least one each.
double chunks(const Problem &p, int64_t chunk) {
  const int64_t longest = (p.max_seq_len + chunk - 1) / chunk, filled = p.seq_len / chunk;
  const double sequences = static_cast<double>(p.sequences), all = sequences * static_cast<double>(longest);
  return p.packed ? std::min(all, static_cast<double>(filled) + sequences) : all;
}

double state_traffic(const Problem &p, int64_t chunk, int64_t element) {
  return chunks(p, chunk) * static_cast<double>(p.heads_kv) * rows(p) * columns(p) *
         static_cast<double>(element);
}

}  // namespace

// 2 (d + e) per (query, key) pair: q.k and w.v.
Work attention_forward_work(const Problem &p) {
  Work w;
  w.flops = tokens_q(p) * keys_seen(static_cast<double>(p.max_seq_len)) * 2 * (d(p) + e(p));
  w.io_bytes = forward_io(p);
  return w;
}

// 2 (3 d + 2 e) per pair: q.k, dy.v, and the products for d_q, d_k, d_v.
Work attention_backward_work(const Problem &p) {
  Work w;
  w.flops = tokens_q(p) * keys_seen(static_cast<double>(p.max_seq_len)) * 2 * (3 * d(p) + 2 * e(p));
  w.io_bytes = backward_io(p);
  return w;
}

// Per token: query of the state 2 D (e+1), update 2 D (e+1) per key; plus the pairs inside its chunk. The
// chunk states are written and read once.
Work chunked_forward_work(const Problem &p, int64_t chunk, int64_t element) {
  Work w;
  const double span = static_cast<double>(std::min(chunk, p.max_seq_len));
  w.state_flops = 2 * rows(p) * columns(p) * (tokens_q(p) + tokens_kv(p));
  w.flops = w.state_flops + tokens_q(p) * keys_seen(span) * 2 * (d(p) + e(p));
  w.io_bytes = forward_io(p);
  w.state_bytes = 2 * state_traffic(p, chunk, element);
  return w;
}

// Per query: dphi(q) from the state and the update of dS; per key: the same twice. S is read (or recomputed,
// one update more), dS written and read.
Work chunked_backward_work(const Problem &p, int64_t chunk, int64_t element, bool recompute) {
  Work w;
  const double span = static_cast<double>(std::min(chunk, p.max_seq_len));
  w.state_flops = 2 * rows(p) * columns(p) * 2 * (tokens_q(p) + tokens_kv(p));
  if (recompute) w.state_flops += 2 * rows(p) * columns(p) * tokens_kv(p);
  w.flops = w.state_flops + tokens_q(p) * keys_seen(span) * 2 * (3 * d(p) + 2 * e(p));
  w.io_bytes = backward_io(p);
  w.state_bytes = (recompute ? 4 : 3) * state_traffic(p, chunk, element);
  return w;
}

// Every state is read and written once; the arithmetic is per token.
Work step_work(const Problem &p) {
  Work w;
  w.state_flops = 2 * rows(p) * columns(p) * (tokens_q(p) + tokens_kv(p));
  w.flops = w.state_flops;
  w.io_bytes = forward_io(p);
  w.state_bytes = 2 * static_cast<double>(p.batch) * static_cast<double>(p.heads_kv) * rows(p) * columns(p) *
                  static_cast<double>(size_of(p.state_dtype));
  return w;
}

}  // namespace powerattn
