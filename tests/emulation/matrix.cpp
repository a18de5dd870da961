// SPDX-License-Identifier: Apache-2.0
// The matrix instructions of one warp that complete at once: ldmatrix, stmatrix, mma.sync.
#include "matrix.h"

namespace emulation {
namespace {

// Lane l addresses row l % 8 of matrix l / 8; register i of lane l holds elements (l / 4, 2 (l % 4)) and the
// next one of matrix i, transposed: (2 (l % 4), l / 4) and the one below.
struct Matrices {
  uint32_t *r;
  const uint32_t *stored;
  uint32_t address;
  int count;
  bool transposed;
};
unsigned char *row_of(void *const *lanes, int lane, bool write, const char *what) {
  const uint32_t at = static_cast<Matrices *>(lanes[lane])->address;
  if (at % 16) fail("%s: lane %d gives the address 0x%x", what, lane, at);
  access(*self->owner, *self->owner->threads[size_t(self->warp->index * kLanes + lane)], at, 16, write, what);
  return shared_pointer(*self->owner, at, 16, what);
}
void load(void *const *lanes) {
  const Matrices &first = *static_cast<Matrices *>(lanes[0]);
  for (int i = 0; i < first.count; ++i) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(m[row], row_of(lanes, 8 * i + row, false, "ldmatrix"), 16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t low = first.transposed ? m[t][g] : m[g][t],
                     high = first.transposed ? m[t + 1][g] : m[g][t + 1];
      static_cast<Matrices *>(lanes[lane])->r[i] = low | high << 16;
    }
  }
}
void store(void *const *lanes) {
  for (int i = 0; i < static_cast<Matrices *>(lanes[0])->count; ++i) {
    for (int row = 0; row < 8; ++row) {
      unsigned char *to = row_of(lanes, 8 * i + row, true, "stmatrix");
      for (int t = 0; t < 8; ++t) {  // element (r, c) of a matrix is in lane 4 r + c / 2
        const bool trans = static_cast<Matrices *>(lanes[0])->transposed;
        const int r = trans ? t : row, c = trans ? row : t;
        const uint32_t pair = static_cast<Matrices *>(lanes[4 * r + c / 2])->stored[i];
        const auto element = static_cast<uint16_t>(pair >> 16 * (c & 1));
        std::memcpy(to + 2 * t, &element, 2);
      }
      const Thread &writer = *self->owner->threads[size_t(self->warp->index * kLanes + 8 * i + row)];
      note_write(*self->owner, writer, static_cast<Matrices *>(lanes[8 * i + row])->address, 16);
    }
  }
}

struct Operands {
  float *c;
  const uint32_t *a;
  uint32_t b[2];
};
// Columns and k of b0 and b1: k 2t, 2t+1 (+8), column g; TF32: k t (+4).
template <Element kElement>
void multiply_add(void *const *lanes) {
  constexpr bool kTf32 = kElement == Element::kTf32;
  float a[16][16], b[16 * 8], c[16 * 8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands &o = *static_cast<Operands *>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      if (kTf32) {
        a[g + 8 * (r & 1)][t + 4 * (r >> 1)] = from_bits(o.a[r] & ~0x1fffu);
      } else {
        a[a_row(lane, r)][a_column(lane, r)] = value(kElement, uint16_t(o.a[r]));
        a[a_row(lane, r)][a_column(lane, r) + 1] = value(kElement, uint16_t(o.a[r] >> 16));
      }
      c[(g + 8 * (r >> 1)) * 8 + 2 * t + (r & 1)] = o.c[r];
    }
    for (int h = 0; h < 2; ++h) {
      if (kTf32) {
        b[(t + 4 * h) * 8 + g] = from_bits(o.b[h] & ~0x1fffu);
      } else {
        b[(2 * t + 8 * h) * 8 + g] = value(kElement, uint16_t(o.b[h]));
        b[(2 * t + 8 * h + 1) * 8 + g] = value(kElement, uint16_t(o.b[h] >> 16));
      }
    }
  }
  product<kTf32 ? 8 : 16>(a, b, c, 8);
  for (int lane = 0; lane < kLanes; ++lane) {
    float *to = static_cast<Operands *>(lanes[lane])->c;
    for (int r = 0; r < 4; ++r) to[r] = c[(lane / 4 + 8 * (r >> 1)) * 8 + 2 * (lane % 4) + (r & 1)];
  }
}

}  // namespace

void load_matrices(uint32_t *r, int count, bool transposed, uint32_t address) {
  Matrices m{r, nullptr, address, count, transposed};
  meet_all(transposed ? "ldmatrix.trans" : "ldmatrix", &m, load);
}
void store_matrices(uint32_t address, const uint32_t *r, int count, bool transposed) {
  Matrices m{nullptr, r, address, count, transposed};
  meet_all(transposed ? "stmatrix.trans" : "stmatrix", &m, store);
}

void multiply(Element element, float *c, const uint32_t *a, uint32_t b0, uint32_t b1) {
  Operands o{c, a, {b0, b1}};
  switch (element) {
    case Element::kBfloat16:
      return meet_all("mma.bf16", &o, multiply_add<Element::kBfloat16>);
    case Element::kFloat16:
      return meet_all("mma.f16", &o, multiply_add<Element::kFloat16>);
    case Element::kTf32:
      return meet_all("mma.tf32", &o, multiply_add<Element::kTf32>);
  }
}

}  // namespace emulation
