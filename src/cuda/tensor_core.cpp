// SPDX-License-Identifier: Apache-2.0
#include "tensor_core.h"

#include "kernels/cuda/tiles.h"
#include "text.h"

namespace powerattn::cuda {

Tiling choose_form(const Problem &p, const Pins &pins, int64_t chunk, bool can_chunk, CostOf cost, int sms) {
  const Cost attention = cost(p, 0, sms);
  bool chunks = p.use_state || pins.form == POWERATTN_FORM_CHUNKED;
  if (!chunks && can_chunk && pins.form != POWERATTN_FORM_ATTENTION && p.max_seq_len > chunk) {
    const Cost c = cost(p, chunk, sms);
    chunks = c.forward + c.backward < attention.forward + attention.backward;
  }
  const Cost chosen = chunks ? cost(p, chunk, sms) : attention;
  Tiling t;
  t.form = chunks ? Form::kChunked : Form::kAttention;
  t.chunk = chunks ? chunk : std::max<int64_t>(p.seq_len, 1);
  t.forward_s = chosen.forward;
  t.backward_s = chosen.backward;
  return t;
}

void describe_costs(const Problem &p, CostOf cost, std::string *text) {
  if (p.max_seq_len == 0 || p.degree > 2) return;
  const DeviceProperties *const device = device_of(p);
  const int sms = device != nullptr ? device->sm_count : kReferenceSms;
  const auto add = [&](const Cost &c) { append(text, " %.3g", (c.forward + c.backward) * 1e3); };
  text->append("  predicted forward + backward, ms: attention form");
  add(cost(p, 0, sms));
  for (const int64_t chunk : {256, 512, 1024, 2048}) {
    text->append(", chunk " + std::to_string(chunk));
    add(cost(p, chunk, sms));
  }
  text->append("\n");
}

States carve_states(const Problem &p, const Tiling &t, bool z, Carver *c) {
  States s;
  if (!chunked(t)) return s;
  const int d = static_cast<int>(p.head_dim);
  const int64_t slots = chunk_bound(p, t.chunk) * p.heads_kv;
  s.tiles = c->take<uint16_t>(slots * slot_elements(p.degree, d, d));
  if (z) s.z = c->take<uint16_t>(slots * 2 * d * d);
  if (with_units(p)) s.units = c->take<Units>(slots);
  return s;
}

Sums carve_sums(const Problem &p, const Tiling &t, bool z, Carver *c) {
  Sums s;
  if (!chunked(t)) return s;
  const int d = static_cast<int>(p.head_dim);
  const int64_t slots = chunk_bound(p, t.chunk) * p.heads_kv, ends = p.sequences * p.heads_kv;
  if (z) s.z_local = c->take<float>(slots * d * d);
  if (p.use_state) s.end_local = c->take<float>(ends * slot_elements(p.degree, d, d));
  if (with_units(p)) {
    s.ranges = c->take<Range>(slots);
    if (p.use_state) s.peaks = c->take<Bounds>(ends * sm80::kPeaks);
  }
  return s;
}

float *carve_products(const Problem &p, const Tiling &t, Carver *c) {
  if (!chunked(t)) return nullptr;
  const int64_t slots = chunk_bound(p, t.chunk) * p.heads_kv;
  return c->take<float>(slots * sm80::product_parts(p.degree, static_cast<int>(p.head_dim)));
}

TensorCoreCall::TensorCoreCall(const powerattn_plan &plan, void *s) : CallBase(plan, s) {
  shape80.packed = p.packed;
  shape80.degree = p.degree;
  shape80.heads_q = static_cast<int32_t>(p.heads_q);
  shape80.heads_kv = static_cast<int32_t>(p.heads_kv);
  shape80.head_dim = static_cast<int32_t>(p.head_dim);
  shape80.seq_len = p.seq_len;
  shape80.dtype = p.dtype;
}

const Range *TensorCoreCall::ranges(const Sums &sums, const powerattn_tensor &x, const powerattn_tensor &u,
                                    bool reverse, const float *r, const float *delta) {
  if (!with_units(p)) return nullptr;
  sm80::RangeArgs a;
  a.shape = shape80;
  a.reverse = reverse;
  a.x = x;
  a.u = u;
  a.g = g;
  a.r = r;
  a.delta = delta;
  if (reverse) a.scale = weight_scale();
  a.out = sums.ranges;
  run([&] { return sm80::ranges(a, stream); });
  return sums.ranges;
}

void TensorCoreCall::scan(const Sums &sums, const States &s, const powerattn_state &initial,
                          const powerattn_state &final, bool reverse, const sm80::ProductArgs &products) {
  sm80::ScanArgs a;
  a.shape = shape80;
  a.reverse = reverse;
  a.g = g;
  a.tiles = s.tiles;
  a.z_local = s.z != nullptr ? sums.z_local : nullptr;
  a.z_tiles = s.z;
  a.initial = initial;
  a.final = final;
  a.end_local = sums.end_of(final);
  a.ranges = sums.ranges;
  a.units = s.units;
  a.peaks = sums.peaks;
  a.products = products;
  run([&] { return sm80::scan(a, stream); });
}

sm80::DeltaArgs TensorCoreCall::delta_args(const powerattn_backward_args &args, const powerattn_tensor &q,
                                           const powerattn_tensor &k, float *delta) const {
  sm80::DeltaArgs d;
  d.shape = shape80;
  d.q = q;
  d.k = k;
  d.v = args.v;
  d.d_y = args.d_y;
  d.row_norm = args.row_norm;
  d.log_g = args.log_g;
  d.scale = weight_scale();
  d.eps = static_cast<float>(p.eps);
  d.delta = delta;
  return d;
}

sm80::ProductArgs TensorCoreCall::products(const powerattn_backward_args &args, const States &s, bool after,
                                           float *out) const {
  sm80::ProductArgs a;
  if (args.d_log_g.data == nullptr || s.tiles == nullptr) return a;
  a.after = after;
  a.tiles = s.tiles;
  a.z_tiles = s.z;
  a.units = s.units;
  a.initial = args.initial_state;
  a.out = out;
  return a;
}

}  // namespace powerattn::cuda
