// SPDX-License-Identifier: Apache-2.0
// A forward, backward or step problem whose tensors lie contiguously in device memory, filled with random
// numbers: for the tests of the runtime and for the benchmark.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "power_attention.h"

namespace powerattn_test {

inline void device_must(cudaError_t error, const char *what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
inline void api_must(powerattn_status status, const char *what) {
  if (status != POWERATTN_OK)
    throw std::runtime_error(std::string(what) + ": " + powerattn_status_string(status) + ": " +
                             powerattn_last_error());
}

// Device bytes that free themselves; every bit set at first (NaN in every dtype).
class Block {
 public:
  Block() = default;
  explicit Block(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    device_must(cudaMalloc(&data_, bytes), "cudaMalloc");
    poison();
  }
  Block(Block &&other) noexcept { *this = static_cast<Block &&>(other); }
  Block &operator=(Block &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Block(const Block &) = delete;
  Block &operator=(const Block &) = delete;
  ~Block() { cudaFree(data_); }

  void *get() const { return data_; }
  size_t bytes() const { return bytes_; }
  void poison() {
    if (bytes_ == 0) return;
    device_must(cudaMemset(data_, 0xff, bytes_), "cudaMemset");
    device_must(cudaStreamSynchronize(nullptr),
                "cudaMemset");  // asynchronous, and not ordered with other streams
  }
  std::vector<char> host() const {
    std::vector<char> out(bytes_);
    if (bytes_)
      device_must(cudaMemcpy(out.data(), data_, bytes_, cudaMemcpyDeviceToHost), "copy from the device");
    return out;
  }

 private:
  void *data_ = nullptr;
  size_t bytes_ = 0;
};

inline size_t element_bytes(int32_t dtype) { return dtype == POWERATTN_FLOAT32 ? 4 : 2; }

// `count` numbers of a repeating random block of about a million: normal(mean, sd), or -|normal| for gates.
inline Block random_block(size_t count, int32_t dtype, double mean, double sd, uint64_t seed,
                          bool negative = false) {
  const size_t period = std::min<size_t>(count, 1000003);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(mean, sd);
  std::vector<char> host(period * element_bytes(dtype));
  for (size_t i = 0; i < period; ++i) {
    float x = float(normal(engine));
    if (negative) x = -std::fabs(x);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == POWERATTN_FLOAT32) {
      std::memcpy(&host[4 * i], &bits, 4);
    } else {
      uint16_t half;
      if (dtype == POWERATTN_BFLOAT16) {
        half = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      } else {  // float16, normal numbers only: what a unit normal gives, flushed below 2^-14
        const int32_t exponent = int32_t(bits >> 23 & 255) - 127 + 15;
        const uint32_t sign = bits >> 16 & 0x8000u;
        half = exponent <= 0    ? uint16_t(sign)
               : exponent >= 31 ? uint16_t(sign | 0x7bffu)
                                : uint16_t(sign | uint32_t(exponent) << 10 | (bits >> 13 & 0x3ffu));
      }
      std::memcpy(&host[2 * i], &half, 2);
    }
  }
  Block block(count * element_bytes(dtype));
  for (size_t at = 0; at < count; at += period) {
    const size_t n = std::min(period, count - at);
    device_must(cudaMemcpy(static_cast<char *>(block.get()) + at * element_bytes(dtype), host.data(),
                           n * element_bytes(dtype), cudaMemcpyHostToDevice),
                "copy to the device");
  }
  return block;
}

struct DeviceProblem {
  powerattn_desc desc = {};
  powerattn_plan *plan = nullptr;
  powerattn_plan_info info = {};
  bool gated = false;
  int64_t rows_q = 0, rows_kv = 0;
  Block q, k, v, log_g, y, norm, dy, dq, dk, dv, dlog_g, workspace, saved, state_s, state_z;

  DeviceProblem() = default;
  DeviceProblem(const DeviceProblem &) = delete;
  DeviceProblem &operator=(const DeviceProblem &) = delete;
  ~DeviceProblem() { powerattn_plan_destroy(plan); }

  static powerattn_desc description(int32_t dtype, int64_t b, int64_t t, int64_t heads_q, int64_t heads_kv,
                                    int64_t d, int64_t e, int degree) {
    powerattn_desc x = {};
    x.struct_size = sizeof x;
    x.device_type = POWERATTN_CUDA;
    x.dtype = dtype;
    x.degree = degree;
    x.flags = degree % 2 ? POWERATTN_UNNORMALIZED : 0;
    x.batch = b;
    x.seq_len = t;
    x.heads_q = heads_q;
    x.heads_kv = heads_kv;
    x.head_dim = d;
    x.value_dim = e;
    return x;
  }

  enum Parts { kForward = 1, kBackward = 2, kStep = 4 };
  void make(const powerattn_desc &x, bool gates, int parts, uint64_t seed = 1) {
    desc = x;
    gated = gates;
    api_must(powerattn_plan_create(&desc, &plan), "plan_create");
    info.struct_size = sizeof info;
    api_must(powerattn_plan_query(plan, &info), "plan_query");
    rows_q = x.batch * x.seq_len * x.heads_q;
    rows_kv = x.batch * x.seq_len * x.heads_kv;
    const int64_t e = x.value_dim ? x.value_dim : x.head_dim;
    const size_t size = element_bytes(x.dtype);
    q = random_block(size_t(rows_q * x.head_dim), x.dtype, 0, 1, seed);
    k = random_block(size_t(rows_kv * x.head_dim), x.dtype, 0, 1, seed + 1);
    v = random_block(size_t(rows_kv * e), x.dtype, 0.25, 1, seed + 2);
    if (gates) log_g = random_block(size_t(rows_kv), POWERATTN_FLOAT32, 0, 0.002, seed + 3, true);
    y = Block(size_t(rows_q * e) * size);
    norm = Block(size_t(rows_q) * 4);
    uint64_t bytes = 0;
    if (parts & kForward) bytes = std::max(bytes, info.workspace_forward);
    if (parts & kStep) bytes = std::max(bytes, info.workspace_step);
    if (parts & kBackward) {
      bytes = std::max(bytes, std::max(info.workspace_backward, info.workspace_backward_saved));
      dy = random_block(size_t(rows_q * e), x.dtype, 0, 1, seed + 4);
      dq = Block(size_t(rows_q * x.head_dim) * size);
      dk = Block(size_t(rows_kv * x.head_dim) * size);
      dv = Block(size_t(rows_kv * e) * size);
      if (gates) dlog_g = Block(size_t(rows_kv) * 4);
      saved = Block(size_t(info.saved_bytes));
    }
    if (parts & kStep) {
      const size_t element = x.state_dtype == POWERATTN_BFLOAT16 ? 2 : 4;
      const int32_t dtype = element == 2 ? POWERATTN_BFLOAT16 : POWERATTN_FLOAT32;
      const size_t states = size_t(x.batch * x.heads_kv * info.state_rows);
      state_s = random_block(states * size_t(e), dtype, 0, 1, seed + 5);
      state_z = random_block(states, dtype, 30, 1, seed + 6);
    }
    workspace = Block(size_t(bytes));
  }

  // [b, t, h, width] contiguous.
  powerattn_tensor tensor(const Block &block, int64_t heads, int64_t width) const {
    if (!block.get()) return powerattn_tensor{};
    return {block.get(), desc.seq_len * heads * width, heads * width, width};
  }
  int64_t value_dim() const { return desc.value_dim ? desc.value_dim : desc.head_dim; }

  powerattn_forward_args forward_args(cudaStream_t stream, bool save = false) const {
    powerattn_forward_args a = {};
    a.struct_size = sizeof a;
    a.q = tensor(q, desc.heads_q, desc.head_dim);
    a.k = tensor(k, desc.heads_kv, desc.head_dim);
    a.v = tensor(v, desc.heads_kv, value_dim());
    a.log_g = tensor(log_g, desc.heads_kv, 1);
    a.y = tensor(y, desc.heads_q, value_dim());
    a.row_norm = tensor(norm, desc.heads_q, 1);
    if (save && saved.bytes()) {
      a.saved = saved.get();
      a.saved_bytes = saved.bytes();
    }
    a.workspace = workspace.get();
    a.workspace_bytes = workspace.bytes();
    a.stream = stream;
    return a;
  }
  powerattn_backward_args backward_args(cudaStream_t stream, bool save = false) const {
    powerattn_backward_args a = {};
    a.struct_size = sizeof a;
    a.q = tensor(q, desc.heads_q, desc.head_dim);
    a.k = tensor(k, desc.heads_kv, desc.head_dim);
    a.v = tensor(v, desc.heads_kv, value_dim());
    a.log_g = tensor(log_g, desc.heads_kv, 1);
    a.y = tensor(y, desc.heads_q, value_dim());
    if (!(desc.flags & POWERATTN_UNNORMALIZED)) a.row_norm = tensor(norm, desc.heads_q, 1);
    a.d_y = tensor(dy, desc.heads_q, value_dim());
    a.d_q = tensor(dq, desc.heads_q, desc.head_dim);
    a.d_k = tensor(dk, desc.heads_kv, desc.head_dim);
    a.d_v = tensor(dv, desc.heads_kv, value_dim());
    a.d_log_g = tensor(dlog_g, desc.heads_kv, 1);
    if (save && saved.bytes()) {
      a.saved = saved.get();
      a.saved_bytes = saved.bytes();
    }
    a.workspace = workspace.get();
    a.workspace_bytes = workspace.bytes();
    a.stream = stream;
    return a;
  }
  powerattn_step_args step_args(cudaStream_t stream) const {
    powerattn_step_args a = {};
    a.struct_size = sizeof a;
    a.q = tensor(q, desc.heads_q, desc.head_dim);
    a.k = tensor(k, desc.heads_kv, desc.head_dim);
    a.v = tensor(v, desc.heads_kv, value_dim());
    a.log_g = tensor(log_g, desc.heads_kv, 1);
    a.y = tensor(y, desc.heads_q, value_dim());
    const int64_t rows = info.state_rows, e = value_dim();
    a.state = {state_s.get(), state_z.get(), desc.heads_kv * rows * e, rows * e, desc.heads_kv * rows, rows};
    a.num_slots = desc.batch;
    a.workspace = workspace.get();
    a.workspace_bytes = workspace.bytes();
    a.stream = stream;
    return a;
  }
};

}  // namespace powerattn_test
