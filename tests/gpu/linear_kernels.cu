// SPDX-License-Identifier: Apache-2.0
// Times of the kernels of degree 1 alone, forward, and backward with the states saved, below the C interface:
// milliseconds, bytes that must move, GB/s of each, for several chunk sizes, with the copy rate of the same
// run. Their results are checked through the C interface (tests/cases/linear.txt).
//
//   linear_kernels [only=<part of a line's name>]
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/linear/args.h"
#include "must.h"
#include "skip.h"

namespace pa = powerattn;
namespace k1 = powerattn::cuda::linear;

namespace {

// Device memory, filled with repeats of a block of random bfloat16 or, `gates`, of small negative floats.
class Array {
 public:
  enum Fill { kNone, kRandom, kGates };
  Array(size_t bytes, Fill fill) {
    CK(cudaMalloc(&data_, std::max<size_t>(bytes, 4)));
    if (fill == kNone) return;
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    std::vector<char> block(std::min<size_t>(bytes, 2000006 / 4 * 4));
    for (size_t i = 0; i + 4 <= block.size(); i += fill == kGates ? 4 : 2) {
      const float x = fill == kGates ? -0.02f * std::fabs(normal(rng)) : normal(rng);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (fill == kRandom) bits >>= 16;
      std::memcpy(&block[i], &bits, fill == kGates ? 4 : 2);
    }
    for (size_t at = 0; at < bytes; at += block.size())
      CK(cudaMemcpy(static_cast<char *>(data_) + at, block.data(), std::min(block.size(), bytes - at),
                    cudaMemcpyHostToDevice));
  }
  Array(const Array &) = delete;
  Array &operator=(const Array &) = delete;
  ~Array() { cudaFree(data_); }
  void *get() const { return data_; }
  float *floats() const { return static_cast<float *>(data_); }

 private:
  void *data_ = nullptr;
};

// Median over 9 measurements of `work` eight times in a row.
double milliseconds(const std::function<void()> &work) {
  constexpr int kRuns = 8;
  cudaEvent_t a, b;
  CK(cudaEventCreate(&a));
  CK(cudaEventCreate(&b));
  for (int i = 0; i < kRuns; ++i) work();
  std::vector<float> times(9);
  for (float &t : times) {
    CK(cudaEventRecord(a));
    for (int i = 0; i < kRuns; ++i) work();
    CK(cudaEventRecord(b));
    CK(cudaEventSynchronize(b));
    CK(cudaEventElapsedTime(&t, a, b));
  }
  std::sort(times.begin(), times.end());
  CK(cudaEventDestroy(a));
  CK(cudaEventDestroy(b));
  return double(times[times.size() / 2]) / kRuns;
}

void print(const char *kernel, double ms, double bytes, int64_t blocks) {
  std::printf("  %-14s %8.4f ms %8.1f MB %7.0f GB/s", kernel, ms, bytes * 1e-6, bytes / ms * 1e-6);
  if (blocks > 0) std::printf("  %lld blocks", static_cast<long long>(blocks));
  std::printf("\n");
  std::fflush(stdout);
}

struct Line {
  const char *name;
  int64_t b, t, hq, hkv, d;
  bool gated;
  std::vector<int64_t> chunks;
  bool heads_first = false;  // [b, h, t, d] instead of [b, t, h, d]
};

void time_line(const Line &c) {
  const int64_t rows_q = c.b * c.t * c.hq, rows_kv = c.b * c.t * c.hkv;
  const double size_q = 2.0 * double(rows_q * c.d), size_kv = 2.0 * double(rows_kv * c.d);
  const double size_g = c.gated ? 4.0 * double(rows_kv) : 0;
  const Array q(size_t(size_q), Array::kRandom), k(size_t(size_kv), Array::kRandom),
      v(size_t(size_kv), Array::kRandom), y(size_t(size_q), Array::kNone), dy(size_t(size_q), Array::kRandom),
      dk(size_t(size_kv), Array::kNone), dv(size_t(size_kv), Array::kNone),
      dg(size_t(rows_kv) * 4, Array::kNone), q_dot(size_t(rows_q * c.d / 64) * 4, Array::kNone),
      k_dot(size_t(rows_kv * c.d / 64) * 4, Array::kNone), norm(size_t(rows_q) * 4, Array::kNone),
      g(size_t(rows_kv) * 4, Array::kGates);
  const auto tensor = [&](const Array &x, int64_t heads, int64_t d) {
    return c.heads_first ? powerattn_tensor{x.get(), c.t * heads * d, d, c.t * d}
                         : powerattn_tensor{x.get(), c.t * heads * d, heads * d, d};
  };
  for (const int64_t chunk : c.chunks) {
    const int64_t per = (c.t + chunk - 1) / chunk, slots = c.b * per * c.hkv;
    const double state = 4.0 * double(slots * c.d * c.d);
    const Array s(size_t(state), Array::kNone), ds(size_t(state), Array::kNone),
        z(size_t(slots * c.d) * 4, Array::kNone), decay(size_t(slots) * 4, Array::kNone);
    k1::Shape shape;
    shape.table.num_sequences = c.b;
    shape.table.num_chunks = c.b * per;
    shape.table.chunk = chunk;
    shape.heads_q = int32_t(c.hq);
    shape.heads_kv = int32_t(c.hkv);
    shape.head_dim = int32_t(c.d);
    shape.per_sequence = int32_t(per);
    shape.seq_len = c.t;
    if (c.gated) shape.log_g = tensor(g, c.hkv, 1);

    k1::UpdateArgs u;
    u.shape = shape;
    u.x = tensor(k, c.hkv, c.d);
    u.u = tensor(v, c.hkv, c.d);
    u.local = s.floats();
    u.z_local = z.floats();
    u.decay = decay.floats();
    k1::UpdateArgs exact = u;
    exact.exact = true;
    k1::ScanArgs a;
    a.shape = shape;
    a.decay = c.gated ? decay.floats() : nullptr;
    a.state = s.floats();
    a.z = z.floats();
    k1::OutputArgs o;
    o.shape = shape;
    o.x = tensor(q, c.hq, c.d);
    o.z = u.x;
    o.u = u.u;
    o.out = tensor(y, c.hq, c.d);
    o.state = per > 1 ? s.floats() : nullptr;
    o.z_state = per > 1 ? z.floats() : nullptr;
    o.state_scale = o.pair_scale = float(1 / std::sqrt(double(c.d)));
    k1::OutputArgs with_norm = o;
    with_norm.row_norm = tensor(norm, c.hq, 1);

    std::printf("%s chunk %lld\n", c.name, static_cast<long long>(chunk));
    const auto update = [&] { CK(k1::update(u, nullptr)); };
    const auto scan = [&] { CK(k1::scan(a, nullptr)); };
    const auto output = [&] { CK(k1::output(o, nullptr)); };
    double all = 2 * size_q + 2 * size_kv + size_g;
    if (per > 1) {
      print("update", milliseconds(update), 2 * size_kv + size_g + state, slots);
      print("update exact", milliseconds([&] { CK(k1::update(exact, nullptr)); }), 2 * size_kv + size_g + state,
            slots);
      update();
      print("scan", milliseconds(scan), 2 * state, 0);
      update();
      scan();
      all += 2 * size_kv + size_g + 4 * state;
    }
    const double bytes = 2 * size_q + 2 * size_kv + size_g + (per > 1 ? state : 0);
    print("output", milliseconds(output), bytes, c.b * per * c.hq);
    print("output, norm", milliseconds([&] { CK(k1::output(with_norm, nullptr)); }),
          bytes + 4.0 * double(rows_q), c.b * per * c.hq);
    print("forward", milliseconds([&] {
            if (per > 1) update(), scan();
            output();
          }),
          all, 0);

    k1::UpdateArgs du = u;
    du.reverse = true;
    du.x = o.x;
    du.u = tensor(dy, c.hq, c.d);
    du.scale = o.pair_scale;
    du.local = ds.floats();
    du.z_local = nullptr;
    k1::ScanArgs da = a;
    da.reverse = true;
    da.state = ds.floats();
    da.z = nullptr;
    k1::OutputArgs dq;
    dq.shape = shape;
    dq.pair_scale = dq.state_scale = o.pair_scale;
    dq.transposed = true;
    dq.x = du.u, dq.z = o.u, dq.u = o.z, dq.out = o.out, dq.state = o.state;
    k1::OutputArgs dval = dq;
    dval.reverse = true;
    dval.transposed = false;
    dval.state_scale = 1;
    dval.sum_scale = o.pair_scale;
    dval.state = per > 1 ? ds.floats() : nullptr;
    k1::OutputArgs dkey = dval;
    dkey.transposed = true;
    dval.x = o.z, dval.z = o.x, dval.u = du.u, dval.out = tensor(dv, c.hkv, c.d);
    dkey.x = o.u, dkey.z = du.u, dkey.u = o.x, dkey.out = tensor(dk, c.hkv, c.d);
    if (c.gated) {
      dq.partner = o.x, dq.dot = q_dot.floats(), dq.dot_plane = rows_q;
      dkey.partner = o.z, dkey.dot = k_dot.floats(), dkey.dot_plane = rows_kv;
    }
    k1::GateArgs w;
    w.shape = shape;
    w.q_dot = q_dot.floats(), w.q_plane = rows_q;
    w.k_dot = k_dot.floats(), w.k_plane = rows_kv;
    w.state = o.state, w.d_state = dval.state;
    w.d_log_g = tensor(dg, c.hkv, 1);
    const auto reverse_update = [&] { CK(k1::update(du, nullptr)); };
    const auto reverse_scan = [&] { CK(k1::scan(da, nullptr)); };
    const auto d_query = [&] { CK(k1::output(dq, nullptr)); };
    const auto d_value = [&] { CK(k1::output(dval, nullptr)); };
    const auto d_key = [&] { CK(k1::output(dkey, nullptr)); };
    const auto gates = [&] { CK(k1::gate_gradient(w, nullptr)); };
    const double states = per > 1 ? state : 0, dots = c.gated ? 4.0 * double(c.d / 64) : 0;
    const double dq_bytes = (c.gated ? 3 : 2) * size_q + 2 * size_kv + size_g + states + dots * double(rows_q);
    const double dv_bytes = 2 * size_q + 2 * size_kv + size_g + states;
    const double dk_bytes = dv_bytes + (c.gated ? size_kv : 0) + dots * double(rows_kv);
    const double gate_bytes = c.gated ? dots * double(rows_q + rows_kv) + 2 * states + size_g : 0;
    all = dq_bytes + dv_bytes + dk_bytes + gate_bytes;
    if (per > 1) {
      print("dS update", milliseconds(reverse_update), 2 * size_q + size_g + state, slots);
      reverse_update();
      print("dS scan", milliseconds(reverse_scan), 2 * state, 0);
      reverse_update();
      reverse_scan();
      all += 2 * size_q + size_g + 3 * state;
    }
    print("dq", milliseconds(d_query), dq_bytes, c.b * per * c.hq);
    print("dv", milliseconds(d_value), dv_bytes, slots);
    print("dk", milliseconds(d_key), dk_bytes, slots);
    if (c.gated) print("gates", milliseconds(gates), gate_bytes, slots);
    print("backward", milliseconds([&] {
            if (per > 1) reverse_update(), reverse_scan();
            d_value();
            d_query();
            d_key();
            if (c.gated) gates();
          }),
          all, 0);
  }
}

}  // namespace

int main(int argc, char **argv) {
  if (powerattn_test::no_device()) return powerattn_test::kSkipped;
  std::string only;
  for (int i = 1; i < argc; ++i)
    if (!std::strncmp(argv[i], "only=", 5)) only = argv[i] + 5;
  cudaDeviceProp device;
  CK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  {
    const size_t bytes = size_t(1) << 30;
    const Array from(bytes, Array::kRandom), to(bytes, Array::kNone);
    print("device copy", milliseconds([&] {
            CK(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, nullptr));
          }),
          2.0 * double(bytes), 0);
  }
  const std::vector<Line> lines = {
      {"d64 b1 t65536 h8 gated", 1, 65536, 8, 8, 64, true, {512, 1024, 1344, 2048}},
      {"d64 b1 t65536 h8", 1, 65536, 8, 8, 64, false, {1344}},
      {"d64 b1 t65536 h8 gated, heads first", 1, 65536, 8, 8, 64, true, {1344}, true},
      {"d64 b1 t65536 h8/2 gated", 1, 65536, 8, 2, 64, true, {1344}},
      {"d64 b16 t4096 h8 gated", 16, 4096, 8, 8, 64, true, {1344}},
      {"d64 b64 t1024 h8 gated", 64, 1024, 8, 8, 64, true, {1024}},
      {"d128 b1 t65536 h8 gated", 1, 65536, 8, 8, 128, true, {2048, 4096}},
  };
  for (const Line &line : lines)
    if (std::string(line.name).find(only) != std::string::npos) time_line(line);
  return 0;
}
