// SPDX-License-Identifier: Apache-2.0
// Sizes and order of the canonical state, and the header of a packed one. Plain arithmetic on integers.
#pragma once

#include <cstdint>

#include "problem.h"

namespace powerattn {

constexpr int64_t kRowsOverflow = INT64_MAX;
constexpr uint64_t kBytesOverflow = UINT64_MAX;

// D = C(head_dim + degree - 1, degree); kRowsOverflow where it does not fit in int64_t.
int64_t state_rows(int64_t head_dim, int32_t degree);

// Bytes of S and z: count * rows * (value_dim + 1) * element; kBytesOverflow where it does not fit.
uint64_t state_bytes(int64_t rows, int64_t value_dim, Dtype dtype, int64_t count);

// Indices of row `row` < D in the canonical order, and its weight sqrt(degree! / prod(multiplicity!)).
void state_monomial(int64_t head_dim, int32_t degree, int64_t row, int32_t *indices, double *weight);

constexpr uint64_t kPackedHeaderBytes = 64;
constexpr uint32_t kPackedVersion = 1;

// What the 64-byte header of a packed state says. All numbers little-endian:
//   0 "PWRATTN\0"   8 u32 version   12 u32 dtype   16 u32 degree   20 u32 zero   24 i64 head_dim
//   32 i64 value_dim   40 i64 heads_kv   48 i64 count   56 u64 payload bytes
struct PackedHeader {
  uint32_t version = kPackedVersion;
  Dtype dtype = Dtype::kFloat32;
  int32_t degree = 0;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  int64_t heads_kv = 0;
  int64_t count = 0;
  uint64_t payload_bytes = 0;
};

// Header plus payload; kBytesOverflow where it does not fit.
uint64_t packed_bytes(const Problem &p, Dtype dtype, int64_t count);
PackedHeader packed_header(const Problem &p, Dtype dtype, int64_t count);
void write_packed_header(const PackedHeader &header, void *packed);
// Refuses a block that is not a packed state of `p` with `count` states, naming the difference.
powerattn_status read_packed_header(const Problem &p, int64_t count, const void *packed, uint64_t bytes,
                                    PackedHeader *header);

}  // namespace powerattn
