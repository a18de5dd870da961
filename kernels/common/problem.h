// SPDX-License-Identifier: Apache-2.0
// The validated, fully resolved problem and the tiling chosen for it: plain data, shared by everything
// below the API. Nothing here decides or computes.
#pragma once

#include <cstdint>

#include "power_attention.h"

namespace powerattn {

enum class Dtype : int32_t {
  kFloat32 = POWERATTN_FLOAT32,
  kFloat16 = POWERATTN_FLOAT16,
  kBfloat16 = POWERATTN_BFLOAT16,
  kFloat64 = POWERATTN_FLOAT64,
};

constexpr int64_t size_of(Dtype t) { return t == Dtype::kFloat64 ? 8 : t == Dtype::kFloat32 ? 4 : 2; }

struct Rope {
  int32_t style = POWERATTN_ROPE_NONE;
  int64_t dim = 0;  // even, leading dimensions that are rotated
  double base = 10000.0;
};

// One description after validation: every default resolved, every field legal.
struct Problem {
  int32_t device_type = POWERATTN_CPU;
  int32_t device_index = 0;
  Dtype dtype = Dtype::kFloat32;
  Dtype state_dtype = Dtype::kFloat32;
  Dtype stat_dtype = Dtype::kFloat32;  // log_g, row_norm, total_log_g: float64 with float64, else float32
  int32_t degree = 2;
  bool normalize = true;
  bool use_state = false;
  bool allow_tf32 = false;
  bool packed = false;      // cu_seqlens
  int64_t batch = 0;        // batch stride extent; 1 when packed
  int64_t sequences = 0;    // number of states
  int64_t seq_len = 0;      // tokens per batch entry (packed: all tokens, padding included)
  int64_t max_seq_len = 0;  // an upper bound on one sequence's tokens, always resolved (<= seq_len)
  int64_t heads_q = 1;
  int64_t heads_kv = 1;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  int64_t state_rows = 0;    // D; INT64_MAX on overflow
  uint64_t state_bytes = 0;  // of all sequences and kv heads; UINT64_MAX on overflow
  uint64_t state_limit = 0;  // bytes states may take
  double scale = 1.0;
  double eps = 0.0;
  Rope rope;
  int threads = 1;  // CPU

  int64_t group() const { return heads_q / heads_kv; }
};

enum class Form : int32_t {
  kAttention = POWERATTN_FORM_ATTENTION,
  kChunked = POWERATTN_FORM_CHUNKED,
};

// What the planner fixed. The attention form is one chunk per sequence.
struct Tiling {
  Form form = Form::kAttention;
  int64_t chunk = 0;     // tokens per chunk
  double forward_s = 0;  // predicted seconds
  double backward_s = 0;
};

// Bytes of workspace per operation; see powerattn_plan_info.
struct Sizes {
  uint64_t forward = 0;
  uint64_t backward = 0;
  uint64_t backward_saved = 0;
  uint64_t step = 0;
  uint64_t summary = 0;
  uint64_t saved = 0;
};

}  // namespace powerattn
