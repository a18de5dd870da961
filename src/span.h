// SPDX-License-Identifier: Apache-2.0
// The bytes that a strided argument touches, and exact tests of overlap. Interleaved slices of one buffer
// (d_q, d_k, d_v inside a packed d_qkv) do not overlap although their address ranges do.
#pragma once

#include <cstdint>

namespace powerattn {

// Byte addresses base + sum_k index_k * stride_k + r with 0 <= index_k < extent_k and 0 <= r < run.
struct Span {
  const char *name = "";
  bool output = false;
  const void *data = nullptr;  // base as the caller gave it
  uint64_t base = 0;
  int64_t run = 0;  // contiguous bytes
  int64_t extent[3] = {1, 1, 1};
  int64_t stride[3] = {0, 0, 0};  // bytes

  bool empty() const { return run == 0 || extent[0] == 0 || extent[1] == 0 || extent[2] == 0; }
};

// False when the farthest byte is more than INT64_MAX away or outside the address space.
bool addressable(const Span &span);

// The lowest and the highest address of an addressable span that is not empty.
void reach(const Span &span, uint64_t *first, uint64_t *last);

enum class Overlap { kNo, kYes, kUnknown };  // unknown: strides too entangled to be told apart cheaply

// Does one address belong to two different indices? Spans are addressable and not empty.
Overlap overlaps_itself(const Span &span);
Overlap overlap(const Span &a, const Span &b);

}  // namespace powerattn
