// SPDX-License-Identifier: Apache-2.0
// A small problem with correct arguments for every call; a test changes one thing.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "power_attention.h"

namespace fixture {

struct PlanDelete {
  void operator()(powerattn_plan *p) const { powerattn_plan_destroy(p); }
};
using Plan = std::unique_ptr<powerattn_plan, PlanDelete>;

inline powerattn_desc description() {
  powerattn_desc d = {};
  d.struct_size = sizeof(d);
  d.dtype = POWERATTN_FLOAT32;
  d.degree = 2;
  d.flags = POWERATTN_USE_STATE;
  d.batch = 2;
  d.seq_len = 5;
  d.heads_q = 4;
  d.heads_kv = 2;
  d.head_dim = 8;
  d.value_dim = 6;
  d.num_threads = 1;
  return d;
}

inline powerattn_desc packed_description() {
  powerattn_desc d = description();
  d.batch = 1;
  d.seq_len = 10;
  d.sequences = 3;
  d.max_seq_len = 6;
  return d;
}

inline Plan make(const powerattn_desc &d) {
  powerattn_plan *plan = nullptr;
  const powerattn_status status = powerattn_plan_create(&d, &plan);
  INFO(powerattn_last_error());
  REQUIRE(status == POWERATTN_OK);
  return Plan(plan);
}

inline powerattn_plan_info query(const powerattn_plan *plan) {
  powerattn_plan_info info = {};
  info.struct_size = sizeof(info);
  REQUIRE(powerattn_plan_query(plan, &info) == POWERATTN_OK);
  return info;
}

// Zeroed host memory at 256-byte alignment that remembers whether anyone wrote to it.
class Buffer {
 public:
  explicit Buffer(size_t bytes = 0, unsigned char fill = 0)
      : bytes_(bytes), data_(static_cast<unsigned char *>(std::aligned_alloc(256, (bytes + 511) / 256 * 256))) {
    std::memset(data_.get(), fill, bytes_);
    before_.assign(data_.get(), data_.get() + bytes_);
  }
  void *data() const { return data_.get(); }
  template <class T>
  T *as() const {
    return static_cast<T *>(data());
  }
  size_t bytes() const { return bytes_; }
  bool untouched() const { return std::memcmp(before_.data(), data_.get(), bytes_) == 0; }

 private:
  struct Free {
    void operator()(unsigned char *p) const { std::free(p); }
  };
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> data_;
  std::vector<unsigned char> before_;
};

// Every argument struct, filled in, over memory of its own. Outputs are poisoned so that a write shows.
struct Calls {
  powerattn_desc desc;
  Plan plan;
  powerattn_plan_info info;
  std::vector<std::unique_ptr<Buffer>> buffers, outputs;

  powerattn_forward_args forward = {};
  powerattn_backward_args backward = {};
  powerattn_step_args step = {};
  powerattn_summary_args summary = {};
  powerattn_summary_reverse_args reverse = {};
  powerattn_compose_args compose = {};
  powerattn_convert_args convert = {};
  powerattn_pack_args pack = {}, unpack = {};

  explicit Calls(const powerattn_desc &d) : desc(d), plan(make(d)), info(query(plan.get())) {
    const int64_t hq = d.heads_q, hkv = d.heads_kv, dim = d.head_dim, e = d.value_dim;
    const auto input = [&](int64_t h, int64_t n) { return tensor(h, n, false); };
    const auto output = [&](int64_t h, int64_t n) { return tensor(h, n, true); };

    forward.struct_size = sizeof(forward);
    forward.q = input(hq, dim);
    forward.k = input(hkv, dim);
    forward.v = input(hkv, e);
    forward.log_g = input(hkv, 1);
    forward.y = output(hq, e);
    forward.row_norm = output(hq, 1);
    forward.initial_state = state(info.sequences, false);
    forward.final_state = state(info.sequences, true);
    if (d.sequences > 0) {
      forward.cu_seqlens = integers({0, 3, 3, 9});
    }
    forward.rope_offset = integers({0, 0, 0});
    forward.saved = block(info.saved_bytes);
    forward.saved_bytes = info.saved_bytes;
    forward.workspace = block(info.workspace_forward);
    forward.workspace_bytes = info.workspace_forward;

    backward.struct_size = sizeof(backward);
    backward.q = forward.q;
    backward.k = forward.k;
    backward.v = forward.v;
    backward.log_g = forward.log_g;
    backward.y = input(hq, e);
    backward.row_norm = input(hq, 1);
    backward.d_y = input(hq, e);
    backward.d_q = output(hq, dim);
    backward.d_k = output(hkv, dim);
    backward.d_v = output(hkv, e);
    backward.d_log_g = output(hkv, 1);
    backward.initial_state = forward.initial_state;
    backward.d_final_state = state(info.sequences, false);
    backward.d_initial_state = state(info.sequences, true);
    backward.cu_seqlens = forward.cu_seqlens;
    backward.rope_offset = forward.rope_offset;
    backward.workspace = block(info.workspace_backward);
    backward.workspace_bytes = info.workspace_backward;

    step.struct_size = sizeof(step);
    step.q = forward.q;
    step.k = forward.k;
    step.v = forward.v;
    step.log_g = forward.log_g;
    step.y = forward.y;
    step.num_slots = 3;
    step.state = state(step.num_slots, true);
    step.slots = integers({2, 0});
    step.lengths = integers({5, 4});
    step.rope_offset = forward.rope_offset;
    step.workspace = block(info.workspace_step);
    step.workspace_bytes = info.workspace_step;

    summary.struct_size = sizeof(summary);
    summary.k = forward.k;
    summary.v = forward.v;
    summary.log_g = forward.log_g;
    summary.state = forward.final_state;
    summary.total_log_g = raw(static_cast<size_t>(info.sequences * hkv) * 4, true);
    summary.cu_seqlens = forward.cu_seqlens;
    summary.rope_offset = forward.rope_offset;
    summary.workspace = block(info.workspace_summary);
    summary.workspace_bytes = info.workspace_summary;

    reverse.struct_size = sizeof(reverse);
    reverse.q = forward.q;
    reverse.log_g = forward.log_g;
    reverse.y = backward.y;
    reverse.row_norm = backward.row_norm;
    reverse.d_y = backward.d_y;
    reverse.d_state = backward.d_initial_state;
    reverse.total_log_g = summary.total_log_g;
    reverse.cu_seqlens = forward.cu_seqlens;
    reverse.rope_offset = forward.rope_offset;
    reverse.workspace = summary.workspace;
    reverse.workspace_bytes = summary.workspace_bytes;

    compose.struct_size = sizeof(compose);
    compose.count = 2;
    compose.segments = state(2 * info.sequences, false);
    compose.s_stride_segment = info.sequences * compose.segments.s_stride_n;
    compose.z_stride_segment = info.sequences * compose.segments.z_stride_n;
    compose.log_g = raw(static_cast<size_t>(2 * info.sequences * hkv) * 4, false);
    compose.log_g_stride_segment = info.sequences * hkv;
    compose.log_g_stride_n = hkv;
    compose.log_g_stride_h = 1;
    compose.out = forward.final_state;
    compose.out_log_g = summary.total_log_g;

    convert.struct_size = sizeof(convert);
    convert.src = forward.initial_state;
    convert.dst = step.state;
    convert.count = 2;
    convert.src_slots = integers({1, 1});
    convert.dst_slots = integers({2, 0});
    convert.src_num_slots = info.sequences;
    convert.dst_num_slots = 3;

    pack.struct_size = sizeof(pack);
    pack.state = forward.initial_state;
    pack.count = info.sequences;
    REQUIRE(powerattn_state_pack_size(plan.get(), 0, pack.count, &pack.packed_bytes) == POWERATTN_OK);
    pack.packed = raw(pack.packed_bytes, true);
    unpack = pack;
    unpack.packed = raw(pack.packed_bytes, false);
    unpack.state = forward.final_state;
    powerattn_pack_args written = pack;
    written.packed = unpack.packed;
    REQUIRE(powerattn_state_pack(plan.get(), &written) == POWERATTN_OK);
  }

  bool untouched() const {
    for (const auto &b : outputs) {
      if (!b->untouched()) return false;
    }
    return true;
  }

  void *raw(size_t bytes, bool output) {
    auto &list = output ? outputs : buffers;
    list.push_back(std::make_unique<Buffer>(bytes, output ? 0xA5 : 0));
    return list.back()->data();
  }
  void *block(uint64_t bytes) { return raw(bytes + 1, true); }  // never NULL

  const int64_t *integers(const std::vector<int64_t> &values) {
    auto *data = static_cast<int64_t *>(raw(values.size() * 8, false));
    std::memcpy(data, values.data(), values.size() * 8);
    return data;
  }

  powerattn_tensor tensor(int64_t heads, int64_t inner, bool output) {
    powerattn_tensor t = {};
    t.data = raw(static_cast<size_t>(desc.batch * desc.seq_len * heads * inner) * 4, output);
    t.stride_h = inner;
    t.stride_t = heads * inner;
    t.stride_b = desc.seq_len * heads * inner;
    return t;
  }

  powerattn_state state(int64_t count, bool output) {
    const int64_t rows = info.state_rows, e = desc.value_dim, h = desc.heads_kv;
    powerattn_state s = {};
    s.s = raw(static_cast<size_t>(count * h * rows * e) * 4, output);
    s.z = raw(static_cast<size_t>(count * h * rows) * 4, output);
    s.s_stride_h = rows * e;
    s.s_stride_n = h * rows * e;
    s.z_stride_h = rows;
    s.z_stride_n = h * rows;
    return s;
  }
};

inline std::string address(const void *p) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", p);
  return text;
}

template <class T>
T *shifted(T *p, int64_t bytes) {
  return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes));
}

}  // namespace fixture
