// SPDX-License-Identifier: Apache-2.0
// What "cuda.sm80" and "cuda.sm90" share: states of the same layout, the kernels of kernels/cuda/sm80 that both
// launch around their own, the text of their predictions.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <string>

#include "call.h"
#include "kernels/cuda/sm80/args.h"

namespace powerattn::cuda {

struct Cost {
  double forward = 0, backward = 0;  // seconds
};

// Of a form on a device with so many multiprocessors; chunk = 0: attention form.
using CostOf = Cost (*)(const Problem &p, int64_t chunk, int sms);

// The form that the problem or a pin asks for, else the cheaper one, where chunks can run at all.
Tiling choose_form(const Problem &p, const Pins &pins, int64_t chunk, bool can_chunk, CostOf cost, int sms);
// The costs of both forms, as describe() prints them.
void describe_costs(const Problem &p, CostOf cost, std::string *text);

inline bool chunked(const Tiling &t) { return t.form == Form::kChunked; }
inline int64_t chunk_of(const Problem &p, const Tiling &t) {
  return chunked(t) ? t.chunk : std::max<int64_t>(p.seq_len, 1);
}
// float16 states are counted in powers of two (kernels/cuda/sm80/units.h).
inline bool with_units(const Problem &p) { return p.dtype == Dtype::kFloat16; }

// The states before every chunk, which a backward needs again (what `saved` holds), or their gradients after
// it. All null in the attention form.
struct States {
  uint16_t *tiles = nullptr;
  uint16_t *z = nullptr;   // null without `z`
  Units *units = nullptr;  // float16
};
States carve_states(const Problem &p, const Tiling &t, bool z, Carver *c);

// What the sums of chunks are scanned from, beside the tiles themselves.
struct Sums {
  float *z_local = nullptr;
  float *end_local = nullptr;  // the last sum of each sequence, with states
  Range *ranges = nullptr;     // float16
  Bounds *peaks = nullptr;     // the same, with states

  // Where the last sums go for a state that leaves the call; null: it does not.
  float *end_of(const powerattn_state &out) const { return out.s != nullptr ? end_local : nullptr; }
};
Sums carve_sums(const Problem &p, const Tiling &t, bool z, Carver *c);
float *carve_products(const Problem &p, const Tiling &t, Carver *c);

struct TensorCoreCall : CallBase {
  sm80::Shape shape80;  // its table: set with `table`
  const float *g = nullptr;

  TensorCoreCall(const powerattn_plan &plan, void *s);
  float weight_scale() const { return static_cast<float>(std::pow(p.scale, p.degree)); }
  void set_table(const ChunkTable &made) { table = shape80.table = made; }

  // What the weighed sums of u need in float16; null in bfloat16. r, delta: of queries, reverse.
  const Range *ranges(const Sums &sums, const powerattn_tensor &x, const powerattn_tensor &u, bool reverse,
                      const float *r, const float *delta);
  // Sums of chunks into the states before them; reverse: after them.
  void scan(const Sums &sums, const States &s, const powerattn_state &initial, const powerattn_state &final,
            bool reverse, const sm80::ProductArgs &products = {});
  // The arguments of delta() but for the gates' sums and the weights in dZ.
  sm80::DeltaArgs delta_args(const powerattn_backward_args &args, const powerattn_tensor &q,
                             const powerattn_tensor &k, float *delta) const;
  // What the gradient of the gates takes from the states `s`, out of the scan of their gradients; nothing in
  // the attention form. `after`: no state enters or leaves, the states after the chunks.
  sm80::ProductArgs products(const powerattn_backward_args &args, const States &s, bool after,
                             float *out) const;
};

}  // namespace powerattn::cuda
