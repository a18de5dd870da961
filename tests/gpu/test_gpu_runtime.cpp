// SPDX-License-Identifier: Apache-2.0
// What a CUDA device adds to the contract: graphs, streams, pointers of the wrong kind, tensors past 2^31
// elements, states that move between the CPU and the device.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "device_problem.h"
#include "skip.h"

using namespace powerattn_test;

namespace {

struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void expect(bool ok, const std::string &what) {
  if (!ok) throw Mismatch(what);
}

struct Stream {
  cudaStream_t stream = nullptr;
  Stream() { device_must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~Stream() { cudaStreamDestroy(stream); }
  void wait() const { device_must(cudaStreamSynchronize(stream), "kernels"); }
};

bool same(const std::vector<char> &a, const std::vector<char> &b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

const int64_t kLengths[] = {1, 777, 2048};

powerattn_desc usual(int32_t dtype, int64_t t) {
  powerattn_desc d = DeviceProblem::description(dtype, 2, t, 4, 2, 64, 64, 2);
  return d;
}

// One capture of forward + backward, replayed on other inputs than it was captured with, equals the plain
// calls.
void graph_forward_backward() {
  for (int32_t dtype : {POWERATTN_BFLOAT16, POWERATTN_FLOAT16, POWERATTN_FLOAT32}) {
    for (int32_t form : {POWERATTN_FORM_ATTENTION, POWERATTN_FORM_CHUNKED}) {
      for (int64_t t : kLengths) {
        powerattn_desc d = usual(dtype, t);
        d.form = form;
        DeviceProblem p;
        p.make(d, true, DeviceProblem::kForward | DeviceProblem::kBackward, 7);
        const Stream s;
        cudaGraph_t graph = nullptr;
        device_must(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeGlobal), "begin capture");
        const auto f = p.forward_args(s.stream, true);
        const auto b = p.backward_args(s.stream, true);
        api_must(powerattn_forward(p.plan, &f), "forward under capture");
        api_must(powerattn_backward(p.plan, &b), "backward under capture");
        device_must(cudaStreamEndCapture(s.stream, &graph), "end capture");
        cudaGraphExec_t exec = nullptr;
        device_must(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
        const Block other = random_block(size_t(p.rows_q * 64), dtype, 0, 1, 99);
        device_must(cudaMemcpy(p.q.get(), other.get(), p.q.bytes(), cudaMemcpyDeviceToDevice), "new queries");
        auto outputs = [&] {
          std::vector<char> all;
          for (const Block *x : {&p.y, &p.norm, &p.dq, &p.dk, &p.dv, &p.dlog_g}) {
            const std::vector<char> one = x->host();
            all.insert(all.end(), one.begin(), one.end());
          }
          return all;
        };
        auto poison = [&] {
          for (Block *x : {&p.y, &p.norm, &p.dq, &p.dk, &p.dv, &p.dlog_g, &p.workspace, &p.saved}) x->poison();
          device_must(cudaDeviceSynchronize(), "poison");
        };
        std::vector<char> replay[2];
        for (auto &r : replay) {
          poison();
          device_must(cudaGraphLaunch(exec, s.stream), "replay");
          s.wait();
          r = outputs();
        }
        poison();
        api_must(powerattn_forward(p.plan, &f), "forward");
        api_must(powerattn_backward(p.plan, &b), "backward");
        s.wait();
        expect(same(replay[0], replay[1]), "two replays differ");
        expect(same(replay[0], outputs()), "a replay differs from the calls");
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
      }
    }
  }
}

// A captured step moves the state on at every replay, like the call.
void graph_step() {
  for (int32_t state : {POWERATTN_FLOAT32, POWERATTN_BFLOAT16}) {
    for (int64_t tokens : {1, 5}) {
      powerattn_desc d = usual(POWERATTN_BFLOAT16, tokens);
      d.flags |= POWERATTN_USE_STATE;
      d.state_dtype = state;
      DeviceProblem a, b;
      a.make(d, true, DeviceProblem::kStep, 3);
      b.make(d, true, DeviceProblem::kStep, 3);
      const Stream s;
      cudaGraph_t graph = nullptr;
      device_must(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeGlobal), "begin capture");
      const auto captured = a.step_args(s.stream);
      api_must(powerattn_step(a.plan, &captured), "step under capture");
      device_must(cudaStreamEndCapture(s.stream, &graph), "end capture");
      cudaGraphExec_t exec = nullptr;
      device_must(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
      const auto plain = b.step_args(s.stream);
      for (int i = 0; i < 5; ++i) {
        device_must(cudaGraphLaunch(exec, s.stream), "replay");
        api_must(powerattn_step(b.plan, &plain), "step");
      }
      s.wait();
      expect(same(a.y.host(), b.y.host()) && same(a.state_s.host(), b.state_s.host()) &&
                 same(a.state_z.host(), b.state_z.host()),
             "five replays of a step differ from five calls");
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
    }
  }
}

// Two host threads, two streams, one plan, two workspaces: the same bits as one after the other.
void two_streams() {
  powerattn_desc d = usual(POWERATTN_BFLOAT16, 3001);
  DeviceProblem p[2];
  std::vector<char> alone[2];
  for (int i = 0; i < 2; ++i) {
    p[i].make(d, true, DeviceProblem::kForward | DeviceProblem::kBackward, 11 + uint64_t(i));
    const Stream s;
    const auto f = p[i].forward_args(s.stream, true);
    const auto b = p[i].backward_args(s.stream, true);
    api_must(powerattn_forward(p[0].plan, &f), "forward");
    api_must(powerattn_backward(p[0].plan, &b), "backward");
    s.wait();
    alone[i] = p[i].dk.host();
    for (Block *x : {&p[i].y, &p[i].norm, &p[i].dq, &p[i].dk, &p[i].dv, &p[i].workspace}) x->poison();
  }
  device_must(cudaDeviceSynchronize(), "poison");
  std::string failure[2];
  std::thread threads[2];
  const Stream streams[2];
  for (int i = 0; i < 2; ++i) {
    threads[i] = std::thread([&, i] {
      const auto f = p[i].forward_args(streams[i].stream, true);
      const auto b = p[i].backward_args(streams[i].stream, true);
      for (int round = 0; round < 10; ++round) {
        if (powerattn_forward(p[0].plan, &f) != POWERATTN_OK ||
            powerattn_backward(p[0].plan, &b) != POWERATTN_OK)
          failure[i] = powerattn_last_error();
      }
      if (cudaStreamSynchronize(streams[i].stream) != cudaSuccess) failure[i] = "kernels failed";
    });
  }
  for (auto &t : threads) t.join();
  for (int i = 0; i < 2; ++i) {
    expect(failure[i].empty(), failure[i]);
    expect(same(alone[i], p[i].dk.host()), "a stream beside another gives other bits");
  }
}

// Host memory, pinned memory, no device, a workspace that is too small: a status and a message that names it,
// outputs untouched, and the next good call works.
void refused_arguments() {
  powerattn_desc d = usual(POWERATTN_BFLOAT16, 100);
  DeviceProblem p;
  p.make(d, true, DeviceProblem::kForward | DeviceProblem::kBackward, 5);
  const Stream s;
  std::vector<char> host(p.q.bytes());
  void *pinned = nullptr;
  device_must(cudaMallocHost(&pinned, p.q.bytes()), "cudaMallocHost");
  const std::vector<char> before = p.y.host();
  auto refuse = [&](const char *name, powerattn_status status,
                    const std::function<void(powerattn_forward_args *)> &spoil) {
    powerattn_forward_args a = p.forward_args(s.stream);
    spoil(&a);
    const powerattn_status got = powerattn_forward(p.plan, &a);
    expect(got == status,
           std::string(name) + ": status " + std::to_string(got) + ", " + powerattn_last_error());
    expect(std::strstr(powerattn_last_error(), name) != nullptr,
           std::string("the message does not name ") + name + ": " + powerattn_last_error());
    s.wait();
    expect(same(before, p.y.host()), std::string(name) + ": outputs were touched");
  };
  refuse("q", POWERATTN_ERROR_INVALID_ARGUMENT, [&](powerattn_forward_args *a) { a->q.data = host.data(); });
  refuse("k", POWERATTN_ERROR_INVALID_ARGUMENT, [&](powerattn_forward_args *a) { a->k.data = pinned; });
  refuse("y", POWERATTN_ERROR_INVALID_ARGUMENT, [&](powerattn_forward_args *a) { a->y.data = host.data(); });
  refuse("log_g", POWERATTN_ERROR_INVALID_ARGUMENT,
         [&](powerattn_forward_args *a) { a->log_g.data = host.data(); });
  refuse("workspace", POWERATTN_ERROR_WORKSPACE_TOO_SMALL,
         [&](powerattn_forward_args *a) { a->workspace_bytes = p.info.workspace_forward - 1; });
  refuse("workspace", POWERATTN_ERROR_INVALID_ARGUMENT,
         [&](powerattn_forward_args *a) { a->workspace = static_cast<char *>(a->workspace) + 16; });
  cudaFreeHost(pinned);

  powerattn_plan *none = nullptr;
  d.device_index = 1000;
  expect(powerattn_plan_create(&d, &none) == POWERATTN_ERROR_NO_DEVICE && none == nullptr &&
             std::strstr(powerattn_last_error(), "1000") != nullptr,
         "a device that does not exist");
  d.device_index = 0;
  d.dtype = POWERATTN_FLOAT64;
  expect(powerattn_plan_create(&d, &none) != POWERATTN_OK && none == nullptr, "float64 on CUDA is refused");

  const auto good = p.forward_args(s.stream);
  api_must(powerattn_forward(p.plan, &good), "a good call afterwards");
  s.wait();
  expect(!same(before, p.y.host()), "the good call wrote nothing");
}

// The same numbers in one plan whose tensors pass 2^31 elements and in a plan of its last sequence alone.
void past_2_31_elements(bool backward) {
  size_t free = 0, total = 0;
  device_must(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const int64_t heads = 16, d = 64, t = 4100, b = 2147483648LL / (heads * d * t) + 2;  // q, k, v: 4.3 GB each
  powerattn_desc big = DeviceProblem::description(POWERATTN_BFLOAT16, b, t, heads, heads, d, d, 2);
  const size_t needed = size_t(b * t * heads * d) * (backward ? 44 : 12);
  if (free < needed) throw Mismatch("only " + std::to_string(free >> 30) + " GiB of device memory are free");
  DeviceProblem all, last;
  const int parts = DeviceProblem::kForward | (backward ? DeviceProblem::kBackward : 0);
  all.make(big, true, parts, 21);
  expect(all.rows_q * d > 2147483648LL, "the case is too small");
  big.batch = 1;
  big.form = all.info.form;
  big.chunk_size = all.info.form == POWERATTN_FORM_CHUNKED ? all.info.chunk_size : 0;
  last.make(big, true, parts, 22);
  auto tail = [&](const Block &from, const Block &to) {
    device_must(cudaMemcpy(to.get(), static_cast<char *>(from.get()) + (from.bytes() - to.bytes()), to.bytes(),
                           cudaMemcpyDeviceToDevice),
                "last sequence");
  };
  tail(all.q, last.q);
  tail(all.k, last.k);
  tail(all.v, last.v);
  tail(all.log_g, last.log_g);
  if (backward) tail(all.dy, last.dy);
  const Stream s;
  for (DeviceProblem *p : {&all, &last}) {
    const auto f = p->forward_args(s.stream);
    api_must(powerattn_forward(p->plan, &f), "forward");
    if (backward) {
      const auto g = p->backward_args(s.stream);
      api_must(powerattn_backward(p->plan, &g), "backward");
    }
  }
  s.wait();
  auto check = [&](const char *name, const Block &from, const Block &to) {
    const Block end(to.bytes());
    tail(from, end);
    expect(same(end.host(), to.host()), std::string(name) + " of the last sequence differs");
  };
  check("y", all.y, last.y);
  check("row_norm", all.norm, last.norm);
  if (backward) {
    check("d_q", all.dq, last.dq);
    check("d_k", all.dk, last.dk);
    check("d_v", all.dv, last.dv);
    check("d_log_g", all.dlog_g, last.dlog_g);
  }
}

// A state made on the device, packed, unpacked into a CPU plan: the CPU's own state of the same tokens is
// within rounding, and what the device packs from the CPU's block is the same block.
void states_between_devices() {
  powerattn_desc gpu = DeviceProblem::description(POWERATTN_FLOAT32, 2, 300, 2, 2, 32, 48, 2);
  gpu.flags |= POWERATTN_USE_STATE;
  DeviceProblem p;
  p.make(gpu, true, DeviceProblem::kForward, 31);
  const size_t states = size_t(4 * p.info.state_rows), elements = states * 48;
  const Block s(elements * 4), z(states * 4), s2(elements * 4), z2(states * 4);
  const powerattn_state device_state = {
      s.get(),          z.get(), 2 * p.info.state_rows * 48, p.info.state_rows * 48, 2 * p.info.state_rows,
      p.info.state_rows};
  const Stream stream;
  auto f = p.forward_args(stream.stream);
  f.final_state = device_state;
  api_must(powerattn_forward(p.plan, &f), "forward on the device");

  uint64_t bytes = 0;
  api_must(powerattn_state_pack_size(p.plan, 0, 2, &bytes), "pack_size");
  std::vector<char> packed(bytes), again(bytes);
  powerattn_pack_args a = {};
  a.struct_size = sizeof a;
  a.state = device_state;
  a.count = 2;
  a.packed = packed.data();
  a.packed_bytes = bytes;
  a.stream = stream.stream;
  api_must(powerattn_state_pack(p.plan, &a), "pack");

  powerattn_desc cpu = gpu;
  cpu.device_type = POWERATTN_CPU;
  powerattn_plan *host_plan = nullptr;
  api_must(powerattn_plan_create(&cpu, &host_plan), "CPU plan");
  powerattn_plan_info info = {};
  info.struct_size = sizeof info;
  api_must(powerattn_plan_query(host_plan, &info), "plan_query");
  std::vector<float> hs(elements), hz(states), rs(elements), rz(states);
  powerattn_state host_state = device_state;
  host_state.s = hs.data();
  host_state.z = hz.data();
  powerattn_pack_args h = a;
  h.state = host_state;
  h.stream = nullptr;
  api_must(powerattn_state_unpack(host_plan, &h), "unpack on the CPU");

  const std::vector<char> q = p.q.host(), k = p.k.host(), v = p.v.host(), g = p.log_g.host();
  std::vector<char> y(p.y.bytes()), norm(p.norm.bytes()), workspace_memory(info.workspace_forward + 256);
  powerattn_forward_args r = p.forward_args(nullptr);
  r.q.data = const_cast<char *>(q.data());
  r.k.data = const_cast<char *>(k.data());
  r.v.data = const_cast<char *>(v.data());
  r.log_g.data = const_cast<char *>(g.data());
  r.y.data = y.data();
  r.row_norm.data = norm.data();
  r.final_state = host_state;
  r.final_state.s = rs.data();
  r.final_state.z = rz.data();
  r.workspace =
      reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(workspace_memory.data()) + 255) / 256 * 256);
  r.workspace_bytes = info.workspace_forward;
  api_must(powerattn_forward(host_plan, &r), "forward on the CPU");
  auto close = [&](const std::vector<float> &x, const std::vector<float> &reference, const char *name) {
    double error = 0, size = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      error += std::pow(double(x[i]) - double(reference[i]), 2);
      size += std::pow(double(reference[i]), 2);
    }
    expect(std::sqrt(error / size) < 3e-6,
           std::string(name) + " of the device is off by " + std::to_string(std::sqrt(error / size)));
  };
  close(hs, rs, "S");
  close(hz, rz, "z");

  // CPU -> device -> packed again: bit for bit.
  h.state.s = rs.data();
  h.state.z = rz.data();
  api_must(powerattn_state_pack(host_plan, &h), "pack on the CPU");
  a.state.s = s2.get();
  a.state.z = z2.get();
  api_must(powerattn_state_unpack(p.plan, &a), "unpack on the device");
  a.packed = again.data();
  api_must(powerattn_state_pack(p.plan, &a), "pack");
  expect(same(packed, again), "a state changed on its way through the device");
  powerattn_plan_destroy(host_plan);
}

// Compose and convert on the device against doubles on the host.
void compose_and_convert() {
  powerattn_desc d = DeviceProblem::description(POWERATTN_BFLOAT16, 3, 64, 2, 2, 16, 8, 2);
  d.flags |= POWERATTN_USE_STATE;
  DeviceProblem p;
  p.make(d, false, DeviceProblem::kForward, 41);
  const int64_t rows = p.info.state_rows, segments = 4, per_s = 3 * 2 * rows * 8, per_z = 3 * 2 * rows;
  const Block s = random_block(size_t(segments * per_s), POWERATTN_FLOAT32, 0, 1, 51),
              z = random_block(size_t(segments * per_z), POWERATTN_FLOAT32, 0, 1, 52),
              g = random_block(size_t(segments * 6), POWERATTN_FLOAT32, 0, 1, 53, true),
              out_s(size_t(per_s) * 4), out_z(size_t(per_z) * 4), out_g(6 * 4);
  const Stream stream;
  powerattn_compose_args a = {};
  a.struct_size = sizeof a;
  a.count = segments;
  a.segments = {s.get(), z.get(), 2 * rows * 8, rows * 8, 2 * rows, rows};
  a.s_stride_segment = per_s;
  a.z_stride_segment = per_z;
  a.log_g = g.get();
  a.log_g_stride_segment = 6;
  a.log_g_stride_n = 2;
  a.log_g_stride_h = 1;
  a.out = a.segments;
  a.out.s = out_s.get();
  a.out.z = out_z.get();
  a.out_log_g = out_g.get();
  a.stream = stream.stream;
  api_must(powerattn_state_compose(p.plan, &a), "compose");
  stream.wait();
  const std::vector<char> hs = s.host(), hg = g.host(), got = out_s.host(), got_g = out_g.host();
  auto f = [](const std::vector<char> &x, int64_t i) {
    return double(reinterpret_cast<const float *>(x.data())[i]);
  };
  for (int64_t i = 0; i < per_s; ++i) {
    double x = 0;
    for (int64_t m = 0; m < segments; ++m)
      x = std::exp(f(hg, m * 6 + i / (rows * 8))) * x + f(hs, m * per_s + i);
    expect(std::fabs(x - f(got, i)) <= 1e-5 * (1 + std::fabs(x)), "compose: element " + std::to_string(i));
  }
  for (int64_t i = 0; i < 6; ++i) {
    double x = 0;
    for (int64_t m = 0; m < segments; ++m) x += f(hg, m * 6 + i);
    expect(std::fabs(x - f(got_g, i)) < 1e-5, "compose: total gate");
  }

  const std::vector<int64_t> from = {2, 0, -1}, to = {0, 4, 1};
  Block from_d(24), to_d(24), pool_s(size_t(5 * 2 * rows * 8) * 2), pool_z(size_t(5 * 2 * rows) * 2);
  cudaMemcpy(from_d.get(), from.data(), 24, cudaMemcpyHostToDevice);
  cudaMemcpy(to_d.get(), to.data(), 24, cudaMemcpyHostToDevice);
  powerattn_convert_args c = {};
  c.struct_size = sizeof c;
  c.dst_dtype = POWERATTN_BFLOAT16;
  c.src = a.out;
  c.dst = {pool_s.get(), pool_z.get(), 2 * rows * 8, rows * 8, 2 * rows, rows};
  c.count = 3;
  c.src_slots = static_cast<const int64_t *>(from_d.get());
  c.dst_slots = static_cast<const int64_t *>(to_d.get());
  c.src_num_slots = 3;
  c.dst_num_slots = 5;
  c.stream = stream.stream;
  api_must(powerattn_state_convert(p.plan, &c), "convert");
  stream.wait();
  const std::vector<char> pool = pool_s.host();
  const auto *bits = reinterpret_cast<const uint16_t *>(pool.data());
  for (int64_t slot = 0; slot < 5; ++slot) {
    const int64_t source = slot == 0 ? 2 : slot == 4 ? 0 : -1;
    for (int64_t i = 0; i < 2 * rows * 8; ++i) {
      const uint16_t x = bits[slot * 2 * rows * 8 + i];
      uint16_t want = 0xffff;
      if (source >= 0) {
        const float y = float(f(got, source * 2 * rows * 8 + i));
        uint32_t u;
        std::memcpy(&u, &y, 4);
        want = uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
      }
      expect(x == want, "convert: slot " + std::to_string(slot));
    }
  }
}

}  // namespace

int main(int argc, char **argv) {
  if (no_device()) return kSkipped;
  const struct {
    const char *name;
    std::function<void()> run;
  } tests[] = {{"graph_forward_backward", graph_forward_backward},
               {"graph_step", graph_step},
               {"two_streams", two_streams},
               {"refused_arguments", refused_arguments},
               {"states_between_devices", states_between_devices},
               {"compose_and_convert", compose_and_convert},
               {"past_2_31_elements_forward", [] { past_2_31_elements(false); }},
               {"past_2_31_elements_backward", [] { past_2_31_elements(true); }}};
  int passed = 0, failed = 0;
  for (const auto &t : tests) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strstr(t.name, argv[i]) != nullptr;
    if (!wanted) continue;
    std::string failure;
    try {
      t.run();
    } catch (const std::exception &error) {
      failure = error.what();
    }
    failure.empty() ? ++passed : ++failed;
    std::printf("%s %s %s\n", failure.empty() ? "pass" : "FAIL", t.name, failure.c_str());
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
