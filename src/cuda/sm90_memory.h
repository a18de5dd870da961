// SPDX-License-Identifier: Apache-2.0
// Where the memory of a call of "cuda.sm90" lies.
#pragma once

#include "sm90_plan.h"

namespace powerattn::cuda::sm90 {

constexpr int kTickets = 4;  // counters per launch
constexpr int kTicketLaunches = 6;

// Z is needed for the row sums, which row_norm reports even when outputs are not normalised.
inline bool with_z(const Problem &p) { return p.degree == 2; }
// 4-byte numbers from `tickets` on that are zero on entry: the tickets, then in float16 four numbers for each
// chunk and key head (what LimitsArgs writes).
int64_t counters_of(const Problem &p, const Tiling &t);
// The same of Gradients::turns.
int64_t turns_of(const Problem &p, const Tiling &t);

struct Common {
  void *tables = nullptr;
  int32_t *tickets = nullptr;
  double *gate = nullptr;  // sums inside a chunk
  float *g = nullptr, *weight = nullptr;
  Sums sums;
  Rotated rotated;
};
struct Gradients {
  float *r = nullptr, *delta = nullptr, *q_dot = nullptr, *k_dot = nullptr, *products = nullptr;
  float *k_state_dot = nullptr;  // with states
  float *weight = nullptr, *z_weight = nullptr;
  float *d_q = nullptr, *d_k = nullptr;  // of the rotated q and k
  float *sums = nullptr;                 // of dq, in one pass with dk and dv
  int32_t *turns = nullptr;
  States states;  // dS and dZ
};

// The same walk gives the sizes (a Carver of null) and the pointers of a call.
Common carve_common(const Problem &p, const Tiling &t, Carver *c);
Gradients carve_gradients(const Problem &p, const Tiling &t, Carver *c);
Sizes sizes(const Problem &p, const Tiling &t);

}  // namespace powerattn::cuda::sm90
