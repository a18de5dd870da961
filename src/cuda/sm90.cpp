// SPDX-License-Identifier: Apache-2.0
// "cuda.sm90": bfloat16 and float16 on Hopper's warpgroup products (wgmma), for compute capability 9.0: which
// kernels a call launches. sm90_plan.cpp decides what runs and how it is tiled, sm90_memory.h where its memory
// lies; kernels/cuda/sm90 computes, and the scan over chunks, the ranges of float16, delta of rows with few
// keys and the gradient of the gates come from kernels/cuda/sm80, whose states lie the same way.
#include <cuda_runtime_api.h>

#include "backend.h"
#include "kernels/cuda/chunks.h"
#include "kernels/cuda/sm80/args.h"
#include "kernels/cuda/sm90/kernels.h"
#include "sm90_memory.h"
#include "sm90_plan.h"
#include "status.h"
#include "tensor_core.h"

namespace powerattn {
namespace {

namespace k80 = cuda::sm80;
namespace k90 = cuda::sm90;

using cuda::carve_states;
using cuda::Carver;
using cuda::chunk_of;
using cuda::chunked;
using cuda::device_of;
using cuda::States;
using k90::Common;
using k90::Gradients;
using k90::in_one_pass;
using k90::with_z;

template <const k90::Features &kFeatures>
bool choose_from(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  return k90::choose(kFeatures, op, p, pins, tiling, why);
}

bool aligned16(const powerattn_tensor &t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_b % 8 == 0 && t.stride_t % 8 == 0 &&
         t.stride_h % 8 == 0;
}
k90::Tensor view(const powerattn_tensor &t) {
  k90::Tensor v;
  v.data = t.data;
  v.stride_b = t.stride_b;
  v.stride_t = t.stride_t;
  v.stride_h = t.stride_h;
  v.vector = aligned16(t);
  return v;
}

// The kernels of each head size.
cudaError_t update(const k90::UpdateArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::update128(a, sms, stream) : k90::update64(a, sms, stream);
}
cudaError_t output(const k90::OutputArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::output128(a, sms, stream) : k90::output64(a, sms, stream);
}
cudaError_t joint(const k90::JointArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::joint128(a, sms, stream) : k90::joint64(a, sms, stream);
}
cudaError_t gradient(const k90::GradientArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::gradient128(a, sms, stream) : k90::gradient64(a, sms, stream);
}

struct Call : cuda::TensorCoreCall {
  int sms = cuda::kReferenceSms;
  Common common;
  k90::Shape shape;
  const double *gate = nullptr;
  int launches = 0;

  Call(const powerattn_plan &plan, void *s) : TensorCoreCall(plan, s) {
    if (const cuda::DeviceProperties *const device = device_of(p)) sms = device->sm_count;
  }
  int32_t *tickets() { return common.tickets + k90::kTickets * launches++; }
  void set_tables(const cuda::ChunkTable &made) {
    set_table(made);
    shape.table = made;
  }
  void place(const Common &memory, const powerattn_tensor &log_g) {
    common = memory;
    set_tables(cuda::place_chunks(p, chunk_of(p, t), k90::kOutputRows, common.tables));
    shape.tokens = p.seq_len;
    shape.packed = p.packed;
    shape.half = p.dtype == Dtype::kFloat16;
    shape.heads_q = static_cast<int32_t>(p.heads_q);
    shape.heads_kv = static_cast<int32_t>(p.heads_kv);
    shape.group = static_cast<int32_t>(p.group());
    shape.degree = p.degree;
    shape.normalize = p.normalize;
    shape.head_dim = static_cast<int32_t>(p.head_dim);
    shape.scale_p = weight_scale();
    shape.eps = static_cast<float>(p.eps);
    if (log_g.data != nullptr) {
      gate = common.gate;
      g = common.g;
    }
  }

  struct Zeros {  // 4 bytes each
    void *at = nullptr;
    int64_t count = 0;
  };
  // What every kernel after reads: tables, gate sums, zeros, and `rows`, if any.
  void begin(const int64_t *cu_seqlens, const powerattn_tensor &log_g, const k90::RowsArgs *rows,
             const Zeros &turns, const Zeros &dots) {
    const Zeros zeros[] = {{common.tickets, k90::counters_of(p, t)}, turns, dots};
    const bool alone = rows != nullptr && (p.packed || rows->weight != nullptr);  // its weights need the gates
    if (!p.packed) {
      k90::BeginArgs a;
      a.p = shape;
      a.log_g = log_g;
      a.gate = common.gate;
      a.g = common.g;
      for (int i = 0; i < 3; ++i) {
        a.zeros[i] = zeros[i].at;
        a.zero_count[i] = zeros[i].count;
      }
      a.rows = alone ? nullptr : rows;
      run([&] { return k90::begin(a, stream); });
    } else {
      for (const Zeros &z : zeros)
        if (z.count > 0) zero(z);
      cuda::ChunkTable made;
      run([&] {
        return cuda::build_chunks(p, chunk_of(p, t), k90::kOutputRows, cu_seqlens, common.tables, &made,
                                  stream);
      });
      set_tables(made);
      if (gate != nullptr)
        run([&] { return cuda::chunk_gates(p, table, log_g, common.g, common.gate, stream); });
    }
    if (alone) run([&] { return k90::rows(*rows, stream); });
  }
  void zero(const Zeros &z) {
    run([&] { return cudaMemsetAsync(z.at, 0, sizeof(int32_t) * static_cast<size_t>(z.count), stream); });
  }

  // Where the gradient of q or k goes: out itself, or float32 that is rotated back.
  k90::Tensor gradient_of(const powerattn_tensor &out, float *copy, int64_t heads) const {
    k90::Tensor v = view(out);
    if (copy == nullptr) return v;
    v.data = copy;
    v.stride_b = 2 * heads * p.seq_len * p.head_dim;
    v.stride_h = 2 * p.seq_len * p.head_dim;
    v.stride_t = 2 * p.head_dim;
    v.vector = 0;
    v.floats = 1;
    return v;
  }

  // S and Z before every chunk, from keys and values.
  void states(const powerattn_tensor &k, const powerattn_tensor &v, const powerattn_state &initial,
              const powerattn_state &final, const States &s) {
    k90::UpdateArgs u;
    u.p = shape;
    u.a = view(k);
    u.b = view(v);
    u.heads_a = shape.heads_kv;
    u.exact = p.use_state;
    u.state = s.tiles;
    u.norm = with_z(p) ? common.sums.z_local : nullptr;
    u.ticket = tickets();
    if (gate != nullptr) {
      u.weight = u.norm_weight = common.weight;
      run([&] { return k90::key_weights({shape, gate, common.weight}, stream); });
    }
    u.end = common.sums.end_of(final);
    u.ranges = ranges(common.sums, k, v, false, nullptr, nullptr);
    run([&] { return update(u, sms, stream); });
    scan(common.sums, s, initial, final, false);
  }
};

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.sm90: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(args.saved);
  const Common common = k90::carve_common(p, plan.tiling, &workspace);
  const States states = carve_states(p, plan.tiling, with_z(p), args.saved != nullptr ? &saved : &workspace);
  call.place(common, args.log_g);
  call.begin(args.cu_seqlens, args.log_g, nullptr, {}, {});
  const powerattn_tensor tq = call.rotate(args.q, common.rotated.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.rotated.k, p.heads_kv, args.rope_offset);
  if (chunked(plan.tiling)) call.states(tk, args.v, args.initial_state, args.final_state, states);

  k90::OutputArgs o;
  o.p = call.shape;
  o.q = view(tq);
  o.k = view(tk);
  o.v = view(args.v);
  o.y = view(args.y);
  o.row_norm = view(args.row_norm);
  o.gate = call.gate;
  o.state = states.tiles;
  o.norm = states.z;
  o.units = states.units;
  o.first_has_state = args.initial_state.s != nullptr;
  o.ticket = call.tickets();
  call.run([&] { return output(o, call.sms, call.stream); });
  call.zero_padding(args);
  return cuda::check_launch(call.error, "cuda.sm90 forward");
}

powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.sm90: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(const_cast<void *>(args.saved));
  const Common common = k90::carve_common(p, plan.tiling, &workspace);
  const Gradients own = k90::carve_gradients(p, plan.tiling, &workspace);
  const States states = carve_states(p, plan.tiling, with_z(p), args.saved != nullptr ? &saved : &workspace);
  call.place(common, args.log_g);
  const bool in_chunks = chunked(plan.tiling), z = in_chunks && with_z(p), one_pass = in_one_pass(p, in_chunks);
  k90::RowsArgs rows;
  rows.p = call.shape;
  rows.y = view(args.y);
  rows.dy = view(args.d_y);
  if (p.normalize) rows.row_norm = view(args.row_norm);
  rows.gate = call.gate;
  rows.r = own.r;
  rows.delta = own.delta;
  rows.weight = own.weight;
  rows.norm_weight = own.z_weight;
  // The two halves of head_dim 128 each add to q . dq.
  const bool adds_dots = one_pass && p.head_dim == 128 && args.d_log_g.data != nullptr;
  call.begin(args.cu_seqlens, args.log_g, &rows, {own.turns, one_pass ? k90::turns_of(p, plan.tiling) : 0},
             {own.q_dot, adds_dots ? p.batch * p.heads_q * p.seq_len : 0});
  const powerattn_tensor tq = call.rotate(args.q, common.rotated.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.rotated.k, p.heads_kv, args.rope_offset);
  if (p.normalize) {
    k80::DeltaArgs d = call.delta_args(args, tq, tk, own.delta);
    d.g64 = call.gate;
    d.weight = own.weight;
    d.norm_weight = own.z_weight;
    call.run([&] { return k80::delta(d, call.stream); });
  }
  const bool ends = args.d_final_state.s != nullptr || args.d_final_state.z != nullptr;

  if (in_chunks && args.saved == nullptr)
    call.states(tk, args.v, args.initial_state, powerattn_state{}, states);
  const k80::ProductArgs products = call.products(args, states, !p.use_state, own.products);
  const auto end_states = [&] {  // dS and dZ after every chunk
    k90::UpdateArgs u;
    u.p = call.shape;
    u.a = view(tq);
    u.b = rows.dy;
    u.heads_a = call.shape.heads_q;
    u.weight = own.weight;
    u.norm_weight = own.z_weight;  // zeros when unnormalised: Z gets its gradient from the final state alone
    u.exact = p.use_state;
    u.state = own.states.tiles;
    u.norm = z ? common.sums.z_local : nullptr;
    u.ticket = call.tickets();
    u.reverse = 1;
    u.end = common.sums.end_of(args.d_initial_state);
    u.ranges = call.ranges(common.sums, tq, args.d_y, true, own.r, own.delta);
    call.run([&] { return update(u, call.sms, call.stream); });
    call.scan(common.sums, own.states, args.d_final_state, args.d_initial_state, true, products);
  };

  // With states that leave the call dq comes first, since it corrects delta.
  const bool corrected = p.use_state && p.normalize;
  const auto limits = [&]() -> const int32_t * {  // what float16 counts weights and their gradients in
    if (!call.shape.half) return nullptr;
    int32_t *const out = call.common.tickets + k90::kTickets * k90::kTicketLaunches;
    call.run([&] {
      return k90::limits({call.shape, view(tq), view(tk), view(args.v), rows.dy, own.r, own.delta, out},
                         call.stream);
    });
    return out;
  };
  const auto together = [&] {  // dq, dk and dv of the attention form
    k90::JointArgs j;
    j.p = call.shape;
    j.q = view(tq);
    j.k = view(tk);
    j.v = view(args.v);
    j.dy = rows.dy;
    j.dk = call.gradient_of(args.d_k, own.d_k, p.heads_kv);
    j.dv = view(args.d_v);
    j.gate = call.gate;
    j.r = own.r;
    j.delta = own.delta;
    j.dot = args.d_log_g.data != nullptr ? own.k_dot : nullptr;
    j.dq = call.gradient_of(args.d_q, own.d_q, p.heads_q);
    j.q_dot = args.d_log_g.data != nullptr ? own.q_dot : nullptr;
    j.sums = own.sums;
    j.turns = own.turns;
    j.ticket = call.tickets();
    j.limits = limits();
    call.run([&] { return joint(j, call.sms, call.stream); });
  };
  const auto one_by_one = [&] {  // dq, then dk and dv, with the states' parts
    k90::GradientArgs q;
    q.p = call.shape;
    q.x = view(tq);
    q.u = rows.dy;
    q.z = view(tk);
    q.y = view(args.v);
    q.dx = call.gradient_of(args.d_q, own.d_q, p.heads_q);
    q.gate = call.gate;
    q.r = own.r;
    q.delta = own.delta;
    q.state = states.tiles;
    q.norm = p.normalize ? states.z : nullptr;
    q.units = states.units;
    q.end_has_state = args.initial_state.s != nullptr;
    q.scale_p = call.weight_scale();
    q.dot = args.d_log_g.data != nullptr ? own.q_dot : nullptr;
    q.ticket = call.tickets();
    if (corrected) {
      q.delta_out = own.delta;
      q.weight = own.weight;
      q.norm_weight = own.z_weight;
    }
    q.limits = limits();
    if (in_chunks && !corrected) end_states();
    call.run([&] { return gradient(q, call.sms, call.stream); });
    if (in_chunks && corrected) end_states();
    k90::GradientArgs k = q;
    k.delta_out = k.norm_weight = nullptr;
    k.weight = nullptr;
    k.keys = 1;
    k.x = view(tk);
    k.u = view(args.v);
    k.z = view(tq);
    k.y = rows.dy;
    k.dx = call.gradient_of(args.d_k, own.d_k, p.heads_kv);
    k.dv = view(args.d_v);
    k.state = own.states.tiles;
    k.norm = own.states.z;
    k.units = own.states.units;
    k.end_has_state = ends;
    k.dot = args.d_log_g.data != nullptr ? own.k_dot : nullptr;
    k.state_dot = args.d_log_g.data != nullptr ? own.k_state_dot : nullptr;
    k.ticket = call.tickets();
    call.run([&] { return gradient(k, call.sms, call.stream); });
  };
  if (one_pass)
    together();
  else
    one_by_one();
  call.rotate_back(own.d_q, args.d_q, p.heads_q, args.rope_offset);
  call.rotate_back(own.d_k, args.d_k, p.heads_kv, args.rope_offset);

  if (args.d_log_g.data != nullptr) {
    k80::GateArgs w;
    w.shape = call.shape80;
    if (corrected) {  // dk read the corrected delta: what q . dq then is, not what dq's own delta left
      w.r = own.r;
      w.delta = own.delta;
      w.eps = static_cast<float>(p.eps);
    } else {
      w.q_dot = own.q_dot;
    }
    w.k_dot = own.k_dot;
    w.products = products;
    w.d_units = own.states.units;
    w.g = call.g;
    w.k_state_dot = own.k_state_dot;
    w.d_log_g = args.d_log_g;
    call.run([&] { return k80::gate_gradient(w, call.stream); });
  }
  call.zero_padding(args);
  return cuda::check_launch(call.error, "cuda.sm90 backward");
}

}  // namespace

extern const Implementation kCudaSm90, kCudaSm90Next;
const Implementation kCudaSm90 = {
    "cuda.sm90", choose_from<k90::kMeasured>, k90::sizes, k90::describe, forward, backward, nullptr, nullptr,
    nullptr};
const Implementation kCudaSm90Next = {"cuda.sm90.next", choose_from<k90::kWritten>,
                                      k90::sizes,       k90::describe,
                                      forward,          backward,
                                      nullptr,          nullptr,
                                      nullptr};

}  // namespace powerattn
