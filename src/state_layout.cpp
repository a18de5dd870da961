// SPDX-License-Identifier: Apache-2.0
#include "state_layout.h"

#include <cinttypes>
#include <cmath>
#include <cstring>

#include "status.h"

namespace powerattn {
namespace {

// C(n + k - 1, k): monomials of degree k in n variables. false where it does not fit in int64_t.
// Built as C(n, 1), C(n + 1, 2), ...; each step is exact, its product needs up to 128 bits.
bool multiset(int64_t n, int32_t k, int64_t *count) {
  unsigned __int128 c = 1;
  for (int32_t m = 1; m <= k; ++m) {
    c = c * static_cast<uint64_t>(n + m - 1) / static_cast<unsigned>(m);
    if (c > static_cast<unsigned __int128>(INT64_MAX)) return false;
  }
  *count = static_cast<int64_t>(c);
  return true;
}

bool multiply(uint64_t a, uint64_t b, uint64_t *product) { return !__builtin_mul_overflow(a, b, product); }

void put(unsigned char *at, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) at[i] = static_cast<unsigned char>(value >> (8 * i));
}

uint64_t get(const unsigned char *at, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(at[i]) << (8 * i);
  return value;
}

constexpr char kMagic[8] = {'P', 'W', 'R', 'A', 'T', 'T', 'N', '\0'};

}  // namespace

int64_t state_rows(int64_t head_dim, int32_t degree) {
  int64_t rows = 0;
  return multiset(head_dim, degree, &rows) && rows < INT64_MAX ? rows : kRowsOverflow;
}

uint64_t state_bytes(int64_t rows, int64_t value_dim, Dtype dtype, int64_t count) {
  uint64_t bytes = static_cast<uint64_t>(count);
  if (rows == kRowsOverflow) return count == 0 ? 0 : kBytesOverflow;
  if (!multiply(bytes, static_cast<uint64_t>(rows), &bytes)) return kBytesOverflow;
  if (!multiply(bytes, static_cast<uint64_t>(value_dim) + 1, &bytes)) return kBytesOverflow;
  if (!multiply(bytes, static_cast<uint64_t>(size_of(dtype)), &bytes)) return kBytesOverflow;
  return bytes;
}

// Unranking in lexicographic order: with i_{m-1} <= i_m, the rows that share the first m indices number
// C(head_dim - i_m + rest - 1, rest), rest = degree - m - 1; skip whole groups until the row falls in one.
void state_monomial(int64_t head_dim, int32_t degree, int64_t row, int32_t *indices, double *weight) {
  int64_t index = 0;
  double permutations = 1;  // degree! / prod(multiplicity!), exact: at most 8!
  int32_t run = 0;
  for (int32_t m = 0; m < degree; ++m) {
    const int32_t rest = degree - m - 1;
    const int64_t previous = index;
    for (;; ++index) {
      int64_t group = 0;
      multiset(head_dim - index, rest, &group);
      if (row < group) break;
      row -= group;
    }
    run = m > 0 && index == previous ? run + 1 : 1;
    permutations = permutations * (m + 1) / run;
    indices[m] = static_cast<int32_t>(index);
  }
  *weight = std::sqrt(permutations);
}

uint64_t packed_bytes(const Problem &p, Dtype dtype, int64_t count) {
  uint64_t blocks = 0;
  if (!multiply(static_cast<uint64_t>(count), static_cast<uint64_t>(p.heads_kv), &blocks) ||
      blocks > static_cast<uint64_t>(INT64_MAX)) {
    return kBytesOverflow;
  }
  const uint64_t payload = state_bytes(p.state_rows, p.value_dim, dtype, static_cast<int64_t>(blocks));
  return payload > kBytesOverflow - kPackedHeaderBytes ? kBytesOverflow : payload + kPackedHeaderBytes;
}

PackedHeader packed_header(const Problem &p, Dtype dtype, int64_t count) {
  PackedHeader h;
  h.dtype = dtype;
  h.degree = p.degree;
  h.head_dim = p.head_dim;
  h.value_dim = p.value_dim;
  h.heads_kv = p.heads_kv;
  h.count = count;
  h.payload_bytes = packed_bytes(p, dtype, count) - kPackedHeaderBytes;
  return h;
}

void write_packed_header(const PackedHeader &h, void *packed) {
  auto *at = static_cast<unsigned char *>(packed);
  std::memcpy(at, kMagic, 8);
  put(at + 8, h.version, 4);
  put(at + 12, static_cast<uint32_t>(h.dtype), 4);
  put(at + 16, static_cast<uint32_t>(h.degree), 4);
  put(at + 20, 0, 4);
  put(at + 24, static_cast<uint64_t>(h.head_dim), 8);
  put(at + 32, static_cast<uint64_t>(h.value_dim), 8);
  put(at + 40, static_cast<uint64_t>(h.heads_kv), 8);
  put(at + 48, static_cast<uint64_t>(h.count), 8);
  put(at + 56, h.payload_bytes, 8);
}

powerattn_status read_packed_header(const Problem &p, int64_t count, const void *packed, uint64_t bytes,
                                    PackedHeader *h) {
  const auto *at = static_cast<const unsigned char *>(packed);
  if (bytes < kPackedHeaderBytes) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                "packed_bytes is %" PRIu64 "; a packed state has at least its header of %" PRIu64, bytes,
                kPackedHeaderBytes);
  }
  if (std::memcmp(at, kMagic, 8) != 0) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "packed is not a packed state: its magic is not \"PWRATTN\"");
  }
  h->version = static_cast<uint32_t>(get(at + 8, 4));
  if (h->version != kPackedVersion) {
    return fail(POWERATTN_ERROR_VERSION,
                "packed has format version %" PRIu32 "; this library reads version %" PRIu32, h->version,
                kPackedVersion);
  }
  const uint64_t dtype = get(at + 12, 4);
  h->degree = static_cast<int32_t>(get(at + 16, 4));
  h->head_dim = static_cast<int64_t>(get(at + 24, 8));
  h->value_dim = static_cast<int64_t>(get(at + 32, 8));
  h->heads_kv = static_cast<int64_t>(get(at + 40, 8));
  h->count = static_cast<int64_t>(get(at + 48, 8));
  h->payload_bytes = get(at + 56, 8);

  if (dtype != POWERATTN_FLOAT32 && dtype != POWERATTN_BFLOAT16 && dtype != POWERATTN_FLOAT64) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                "packed has dtype %" PRIu64 "; allowed are FLOAT32, BFLOAT16 and FLOAT64", dtype);
  }
  h->dtype = static_cast<Dtype>(dtype);
  if (get(at + 20, 4) != 0) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                "packed has a damaged header: its reserved bytes are not zero");
  }
  const struct {
    const char *name;
    int64_t packed, plan;
  } fields[] = {
      {"degree", h->degree, p.degree},
      {"head_dim", h->head_dim, p.head_dim},
      {"value_dim", h->value_dim, p.value_dim},
      {"heads_kv", h->heads_kv, p.heads_kv},
      {"count", h->count, count},
  };
  for (const auto &f : fields) {
    if (f.packed != f.plan) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "packed has %s %" PRId64 "; this call needs %" PRId64,
                  f.name, f.packed, f.plan);
    }
  }
  const uint64_t needed = packed_bytes(p, h->dtype, count);
  if (needed == kBytesOverflow || h->payload_bytes != needed - kPackedHeaderBytes) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                "packed has a damaged header: it says %" PRIu64 " bytes of payload, its shape needs %" PRIu64,
                h->payload_bytes, needed - kPackedHeaderBytes);
  }
  if (bytes < needed) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "packed_bytes is %" PRIu64 "; this packed state has %" PRIu64,
                bytes, needed);
  }
  return POWERATTN_OK;
}

}  // namespace powerattn
