// SPDX-License-Identifier: Apache-2.0
// wgmma. Each of the four warps computes its 16 rows when its turn comes: early (when the product is issued),
// or as late as the wait for its group allows, reading shared memory only then, so that a stage that is
// overwritten too soon shows. In between the accumulator registers hold NaN.
#include "matrix.h"

namespace emulation {
namespace {

// The 64-bit descriptor of an operand in shared memory.
struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  int swizzle;                      // 1: 128 bytes, 2: 64, 3: 32, 0: none
  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4),
        leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4),
        swizzle(int(bits >> 62)) {
    if (bits >> 49 & 7) fail("wgmma descriptor: base offset %u is not emulated", unsigned(bits >> 49 & 7));
    if (swizzle != 1) fail("wgmma descriptor: only the 128-byte swizzle is emulated, not mode %d", swizzle);
    if (start < kSharedBase) fail("wgmma descriptor: start address 0x%x", start);
  }
  // Address of element (x, k) of a 16-bit operand; x is the row of A or the column of B, k < 16.
  //   K-major (k contiguous): 8 values of x make an atom of 8 x 128 bytes, atoms `stride` apart
  //   x-major (transposed): 64 values of x are contiguous, the next 64 `leading` further; 8 values of k make an
  //   atom of 8 x 128 bytes, atoms `stride` apart
  // The swizzle works on the address: bits 4-6 are XORed with bits 7-9.
  uint32_t address(int x, int k, bool transposed) const {
    const uint32_t u = uint32_t(x), v = uint32_t(k);
    const uint32_t linear = transposed ? start + u / 64 * leading + u % 64 * 2 + v / 8 * stride + v % 8 * 128
                                       : start + u / 8 * stride + u % 8 * 128 + v * 2;
    return linear ^ (linear >> 3 & 0x70);
  }
};

// The 16-byte pieces of an operand, the smallest that the swizzle moves: f(address, first x, first k).
template <class F>
void walk_operand(uint64_t bits, int first, int count, bool transposed, F f) {
  const Descriptor d(bits);
  const int outer = transposed ? 16 : count, inner = transposed ? count : 16;
  for (int o = 0; o < outer; ++o) {
    for (int i = 0; i < inner; i += 8) {
      const uint32_t at = transposed ? d.address(first + i, o, true) : d.address(first + o, i, false);
      if (at % 16) fail("wgmma descriptor: start address 0x%x is not a multiple of 16", d.start);
      f(at, transposed ? i : o, transposed ? o : i);
    }
  }
}

// to(x, k, value) of every element.
template <class F>
void read_operand(const Warp &warp, uint64_t bits, Element element, int first, int count, bool transposed,
                  F to) {
  const Thread &reader = *warp.block->threads[size_t(warp.index * kLanes)];
  walk_operand(bits, first, count, transposed, [&](uint32_t at, int x, int k) {
    uint16_t e[8];
    std::memcpy(e, shared_pointer(*warp.block, at, 16, "wgmma"), 16);
    check_proxy(*warp.block, reader, at, 16, "wgmma");
    for (int n = 0; n < 8; ++n) to(x + (transposed ? n : 0), k + (transposed ? 0 : n), value(element, e[n]));
  });
}

// For races.cpp: the operands are read at some time between the issue and the wait.
template <class F>
void walk_operands(const Warp &warp, const Product &p, F f) {
  if (!machine.races) return;
  const auto piece = [&](uint32_t at, int, int) {
    shared_pointer(*warp.block, at, 16, "wgmma");
    f(at);
  };
  if (!p.registers) walk_operand(p.a_descriptor, warp.index % 4 * 16, 16, p.shape.transposed_a, piece);
  walk_operand(p.b_descriptor, 0, p.shape.columns, p.shape.transposed_b, piece);
}

void execute(Warp &warp, Product &p) {
  const int columns = p.shape.columns;
  float a[16][16], b[16 * 256];
  if (p.registers) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int r = 0; r < 4; ++r) {
        a[a_row(lane, r)][a_column(lane, r)] = value(p.shape.element, uint16_t(p.a[lane][r]));
        a[a_row(lane, r)][a_column(lane, r) + 1] = value(p.shape.element, uint16_t(p.a[lane][r] >> 16));
      }
    }
  } else {  // rows of this warp
    read_operand(warp, p.a_descriptor, p.shape.element, warp.index % 4 * 16, 16, p.shape.transposed_a,
                 [&](int m, int k, float x) { a[m][k] = x; });
  }
  read_operand(warp, p.b_descriptor, p.shape.element, 0, columns, p.shape.transposed_b,
               [&](int n, int k, float x) { b[k * columns + n] = x; });
  Accumulator &acc = warp.accumulators[size_t(p.accumulator)];
  if (!p.shape.accumulate) std::fill(acc.values.begin(), acc.values.end(), 0.f);
  product<16>(a, b, acc.values.data(), columns);
  p.done = true;
}

// Register r of a lane: row lane / 4 (+ 8), columns 8 (r / 4) + 2 (lane % 4), + 1.
int row_of(int lane, int r) { return lane / 4 + 8 * (r >> 1 & 1); }
int column_of(int lane, int r) { return r / 4 * 8 + 2 * (lane % 4) + (r & 1); }

struct Request {
  const WarpgroupProduct *shape;
  float *c;
  const uint32_t *a;
  uint64_t a_descriptor, b_descriptor;
};

int accumulator_of(Warp &warp, void *const *lanes, int registers, bool keep) {
  const auto c_of = [&](int lane) { return static_cast<Request *>(lanes[lane])->c; };
  size_t n = 0, free = warp.accumulators.size();
  for (; n < warp.accumulators.size(); ++n) {
    const Accumulator &x = warp.accumulators[n];
    if (x.in_flight == 0)
      free = n;
    else if (x.registers[0] == c_of(0))
      break;
    else if (c_of(0) < x.registers[0] + x.count && x.registers[0] < c_of(0) + registers)
      fail("wgmma: the accumulator overlaps one that a product in flight writes");
  }
  if (n < warp.accumulators.size()) {
    if (warp.accumulators[n].count != registers)
      fail("wgmma: the accumulator's shape changes while it is in flight");
    return int(n);
  }
  n = free;
  if (n == warp.accumulators.size()) warp.accumulators.emplace_back();
  Accumulator &acc = warp.accumulators[n];
  acc.count = registers;
  acc.values.assign(size_t(registers) * kLanes, 0.f);
  const int columns = registers * 2;
  for (int lane = 0; lane < kLanes; ++lane) {
    acc.registers[lane] = c_of(lane);
    for (int r = 0; r < registers; ++r) {
      if (keep) acc.values[size_t(row_of(lane, r) * columns + column_of(lane, r))] = c_of(lane)[r];
      c_of(lane)[r] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  return int(n);
}

void issue(void *const *lanes) {
  Warp &warp = *self->warp;
  const Request &first = *static_cast<Request *>(lanes[0]);
  Product p;
  p.shape = *first.shape;
  p.registers = first.a != nullptr;
  if (p.registers && !warp.fenced) fail("wgmma with A in registers without wgmma.fence since the last commit");
  p.a_descriptor = first.a_descriptor;
  p.b_descriptor = first.b_descriptor;
  p.accumulator = accumulator_of(warp, lanes, p.shape.columns / 2, p.shape.accumulate);
  for (int lane = 0; lane < kLanes; ++lane) {
    const Request &x = *static_cast<Request *>(lanes[lane]);
    if (x.b_descriptor != p.b_descriptor || x.a_descriptor != p.a_descriptor)
      fail("wgmma: descriptors differ between lanes");
    if (p.registers) std::memcpy(p.a[lane], x.a, sizeof(p.a[lane]));
  }
  walk_operands(warp, p, [&](uint32_t at) { check_race(*warp.block, *self, at, 16, false, "wgmma"); });
  ++warp.accumulators[size_t(p.accumulator)].in_flight;
  ++warp.issued;
  if (machine.timing == Timing::kEarly) execute(warp, p);
  if (warp.products.empty()) warp.products.emplace_back();
  warp.products.back().push_back(p);
}

void finish(Warp &warp, std::vector<Product> &group) {
  for (Product &p : group) {
    if (!p.done) execute(warp, p);
    walk_operands(warp, p, [&](uint32_t at) {
      note_access(*warp.block, uint32_t(self->index), now(*self), at, 16, false);
    });
    Accumulator &acc = warp.accumulators[size_t(p.accumulator)];
    if (--acc.in_flight > 0) continue;
    const int columns = acc.count * 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int r = 0; r < acc.count; ++r)
        acc.registers[lane][r] = acc.values[size_t(row_of(lane, r) * columns + column_of(lane, r))];
    }
  }
  group.clear();
}

}  // namespace

void warpgroup_multiply(const WarpgroupProduct &product, float *c, const uint32_t *a, uint64_t a_descriptor,
                        uint64_t b_descriptor) {
  Request r{&product, c, a, a_descriptor, b_descriptor};
  meet_all(a != nullptr ? "wgmma (A in registers)" : "wgmma (A in shared memory)", &r, issue);
}

void warpgroup_fence() {
  meet_all("wgmma.fence", nullptr, [](void *const *) { self->warp->fenced = true; });
}
void warpgroup_commit() {
  meet_all("wgmma.commit_group", nullptr, [](void *const *) {
    self->warp->fenced = false;
    if (self->warp->products.empty()) self->warp->products.emplace_back();
    self->warp->products.emplace_back();
  });
}
void warpgroup_wait(int pending) {
  meet_all("wgmma.wait_group", &pending, [](void *const *lanes) {
    const size_t left = size_t(*static_cast<int *>(lanes[0])) + 1;  // and the open group
    auto &groups = self->warp->products;
    while (groups.size() > left) {
      finish(*self->warp, groups.front());
      groups.erase(groups.begin());
    }
  });
}

void set_registers(int count, bool increase) {
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg %d", count);
  struct Request {
    int count;
  } r{count};
  meet_all(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", &r,
           [](void *const *lanes) { self->warp->registers = static_cast<Request *>(lanes[0])->count; });
}

}  // namespace emulation
