// SPDX-License-Identifier: Apache-2.0
// The emulated device itself: small kernels that keep the rules give the right numbers, and each of those that
// break one is caught.
#include <cooperative_groups.h>
#include <cuda.h>
#include <doctest/doctest.h>

#include <cstdlib>
#include <vector>

#include "kernels/cuda/ptx/sm90.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "machine.h"

using namespace powerattn::cuda::ptx;

namespace {

constexpr int kShared = 8192;

// True when the kernel ran to its end; every order and timing in turn, with the check for races.
bool runs(int threads, std::function<void()> kernel, int cluster = 1) {
  setenv("EMULATION_RACES", "1", 1);
  bool all = true;
  for (const char *order : {"forward", "reverse", "random"}) {
    for (const char *timing : {"late", "early", "random"}) {
      setenv("EMULATION_ORDER", order, 1);
      setenv("EMULATION_TIMING", timing, 1);
      emulation::Launch l;
      l.block = dim3(unsigned(threads));
      l.grid = dim3(unsigned(cluster));
      l.cluster = cluster;
      l.shared = kShared;
      l.thread = kernel;
      all = emulation::run(l) && all;
    }
  }
  return all;
}

template <class T>
struct Memory {
  T *p = nullptr;
  explicit Memory(size_t n) {
    REQUIRE(cudaMalloc(&p, n * sizeof(T)) == cudaSuccess);
    REQUIRE(cudaMemset(p, 0, n * sizeof(T)) == cudaSuccess);
  }
  ~Memory() { cudaFree(p); }
  T &operator[](size_t i) { return p[i]; }
};

uint16_t bf16(float x) { return __float2bfloat16_rn(x).bits; }

// One warp loads a row with a bulk copy, another reads it; `wait`, `release`: the steps that a mistake leaves
// out.
void hand_over(const float *from, float *to, bool wait, bool syncwarp) {
  const uint32_t data = shared_address(dynamic_shared<char>()), full = data + 4096, empty = full + 8;
  const int lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 1);
  }
  __syncthreads();
  for (int n = 0; n < 3; ++n) {
    if (threadIdx.x == 0) {
      if (n > 0) barrier_wait(empty, unsigned(n - 1) & 1);
      barrier_expect(full, 128);
      bulk_load(data, from + 32 * n, 128, full);
    } else if (threadIdx.x >= 32) {
      if (wait) barrier_wait(full, unsigned(n) & 1);
      to[32 * n + lane] = load_f1(data + 4 * unsigned(lane));
      if (syncwarp) __syncwarp();
      if (lane == 0) barrier_arrive(empty);
    }
  }
}

TEST_CASE("a bulk copy is handed over through mbarriers") {
  Memory<float> from(96), to(96);
  for (size_t i = 0; i < 96; ++i) from[i] = float(i);
  const auto kernel = [&](bool wait, bool syncwarp) {
    return runs(64, [&, wait, syncwarp] { hand_over(from.p, to.p, wait, syncwarp); });
  };
  CHECK(kernel(true, true));
  for (size_t i = 0; i < 96; ++i) CHECK(to[i] == float(i));
  CHECK_FALSE(kernel(false, true));  // reads without a wait
  CHECK_FALSE(kernel(true, false));  // one lane lets go for the others without asking them
}

// Boxes of 4 rows x 64 columns of a tensor [batch 2][token 5][head 3][128]; strides in bytes.
CUresult encode_boxes(CUtensorMap *map, void *address, cuuint64_t token, cuuint64_t head, cuuint64_t batch) {
  const cuuint64_t extents[4] = {128, 5, 3, 2}, strides[3] = {token, head, batch};
  const cuuint32_t box[4] = {64, 4, 1, 1}, steps[4] = {1, 1, 1, 1};
  return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, address, extents, strides, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// One of them, from token `token` on.
void load_box(const CUtensorMap *map, uint16_t *to, int column, int token, int head, int batch, bool wait) {
  const uint32_t data = shared_address(dynamic_shared<char>()), full = data + 4096;
  if (threadIdx.x == 0) barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect_only(full, 512);
    tensor_load(data, map, column, token, head, batch, full);
    barrier_arrive(full);
  }
  if (wait || threadIdx.x == 0) barrier_wait(full, 0);
  for (uint32_t at = 8 * threadIdx.x; at < 512; at += 8 * 32) {  // undoes the swizzle: row at / 128
    const uint32_t from = data + at, place = from ^ ((from >> 7 & 7) << 4);
    float2 two;
    two = load_f2(place);
    std::memcpy(to + at / 2, &two, 8);
  }
}

// The same box back, from numbers 1, 2, .. in the order of its rows.
void store_box(const CUtensorMap *map, int column, int token, int head, int batch, bool fence, bool wait) {
  const uint32_t data = shared_address(dynamic_shared<char>());
  const uint32_t at = data + 16 * threadIdx.x, first = 8 * threadIdx.x + 1;  // of 16 bytes: row threadIdx.x / 8
  const auto two = [&](uint32_t n) { return (first + n) | (first + n + 1) << 16; };
  store_u4(at ^ ((at >> 7 & 7) << 4), make_uint4(two(0), two(2), two(4), two(6)));
  if (fence) fence_async_proxy();
  __syncwarp();
  if (threadIdx.x == 0) {
    tensor_store(map, data, column, token, head, batch);
    if (wait) bulk_store_wait_read<0>();
  }
}

TEST_CASE("a tensor copy writes a swizzled box, and nothing outside of the tensor") {
  Memory<uint16_t> to(2 * 5 * 3 * 128);
  CUtensorMap map;
  REQUIRE(encode_boxes(&map, to.p, 768, 256, 3840) == CUDA_SUCCESS);
  const auto kernel = [&](int token, bool fence, bool wait) {
    return runs(32, [&, token, fence, wait] { store_box(&map, 64, token, 1, 1, fence, wait); });
  };
  for (size_t i = 0; i < 2 * 5 * 3 * 128; ++i) to[i] = 0;
  CHECK(kernel(2, true, true));  // tokens 2, 3, 4; token 5 is none
  for (size_t row = 0; row < 10; ++row)
    for (size_t head = 0; head < 3; ++head)
      for (size_t i = 0; i < 128; ++i) {
        const bool inside = row >= 7 && head == 1 && i >= 64;
        CHECK(to[(row * 3 + head) * 128 + i] == (inside ? (row - 7) * 64 + i - 64 + 1 : 0));
      }
  CHECK_FALSE(kernel(2, false, true));  // ordinary stores without a fence
  CHECK_FALSE(kernel(2, true, false));  // returns while the copy reads
}

TEST_CASE("a tensor copy takes a swizzled box, with zeros outside of the tensor") {
  Memory<uint16_t> from(2 * 5 * 3 * 128), to(4 * 64);
  for (size_t i = 0; i < 2 * 5 * 3 * 128; ++i) from[i] = uint16_t(i + 1);
  CUtensorMap map;
  const auto encode = [&](void *address, cuuint64_t token, cuuint64_t head, cuuint64_t batch) {
    return encode_boxes(&map, address, token, head, batch);
  };
  CHECK(encode(from.p + 1, 768, 256, 3840) == CUDA_ERROR_INVALID_VALUE);
  CHECK(encode(from.p, 768, 250, 3840) == CUDA_ERROR_INVALID_VALUE);
  CHECK(encode(from.p, 768, 256, 0) == CUDA_ERROR_INVALID_VALUE);
  REQUIRE(encode(from.p, 768, 256, 3840) == CUDA_SUCCESS);
  const auto kernel = [&](int column, int token, int head, int batch, bool wait) {
    return runs(
        32, [&, column, token, head, batch, wait] { load_box(&map, to.p, column, token, head, batch, wait); });
  };
  CHECK(kernel(64, 2, 1, 1, true));
  for (size_t row = 0; row < 4; ++row)
    for (size_t i = 0; i < 64; ++i)
      CHECK(to[row * 64 + i] == (row < 3 ? 1 + ((5 + 2 + row) * 3 + 1) * 128 + 64 + i : 0));
  CHECK(kernel(0, -2, 2, 0, true));
  CHECK((to[64] == 0 && to[128] == 1 + 2 * 128 && to[0] == 0));
  CHECK_FALSE(kernel(0, 0, 0, 0, false));  // most lanes read without a wait
  map.opaque[0] = 0;
  CHECK_FALSE(kernel(0, 0, 0, 0, true));  // not a map
}

TEST_CASE("cp.async lands at its wait, and others see it behind a barrier") {
  Memory<float> from(256), to(64);
  for (size_t i = 0; i < 256; ++i) from[i] = float(i);
  const auto kernel = [&](bool wait, bool barrier) {
    return runs(64, [&, wait, barrier] {
      const uint32_t data = shared_address(dynamic_shared<char>());
      copy16(data + 16 * threadIdx.x, from.p + 4 * threadIdx.x);
      copy_commit();
      if (wait) copy_wait<0>();
      if (barrier) __syncthreads();
      to[threadIdx.x] = load_f1(data + 16 * (63 - threadIdx.x));
      copy_wait<0>();
    });
  };
  CHECK(kernel(true, true));
  for (size_t i = 0; i < 64; ++i) CHECK(to[i] == float(4 * (63 - i)));
  CHECK_FALSE(kernel(true, false));
  CHECK_FALSE(kernel(false, true));
}

// c[64, 64] = a[64, 16] b[16, 64] with b in shared memory, 64 columns of 128 bytes a row, swizzled.
struct Mistakes {
  bool no_fence = false, no_proxy_fence = false, no_wait = false, early_release = false;
};
void multiply(float *c, Mistakes m) {
  unsigned char *shared = dynamic_shared<unsigned char>();
  const uint32_t b = shared_address(shared);
  const int t = int(threadIdx.x), lane = t % 32, row = t / 32 * 16 + lane / 4;
  for (int i = t; i < 16 * 64; i += 128) {  // b[k][n] = n + 64 (k == 1)
    const int k = i / 64, n = i % 64;
    store_h1(b + uint32_t(k * 128 + (((n / 8) ^ (k & 7)) << 4) + n % 8 * 2),
             bf16(float(n + (k == 1 ? 64 : 0))));
  }
  if (!m.no_proxy_fence) fence_async_proxy();
  __syncthreads();
  // a[m][k] = 1 at k = m % 2, else 0: registers 0 and 1 hold k = 2 (lane % 4), + 1.
  uint32_t a[4] = {0, 0, 0, 0};
  if (lane % 4 == 0) a[0] = a[1] = row % 2 ? uint32_t(bf16(1.f)) << 16 : bf16(1.f);
  float acc[32];
  const uint64_t descriptor = uint64_t(b >> 4) | uint64_t(64) << 32 | uint64_t(1) << 62;
  if (!m.no_fence) wgmma_fence();
  wgmma<__nv_bfloat16, false, true>(acc, a, descriptor);
  wgmma_commit();
  if (m.early_release) {
    __syncthreads();
    store_h1(b + 2 * threadIdx.x, 0);
  }
  if (!m.no_wait) wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) c[(row + 8 * (i >> 1 & 1)) * 64 + i / 4 * 8 + 2 * (lane % 4) + (i & 1)] = acc[i];
  wgmma_wait<0>();
}

TEST_CASE("wgmma: descriptor, fragments, fences, and when its results are there") {
  Memory<float> c(64 * 64);
  const auto kernel = [&](Mistakes m) { return runs(128, [&, m] { multiply(c.p, m); }); };
  CHECK(kernel({}));
  for (size_t m = 0; m < 64; ++m)
    for (size_t n = 0; n < 64; ++n) CHECK(c[m * 64 + n] == float(n + (m % 2 ? 64 : 0)));
  CHECK_FALSE(kernel({true, false, false, false}));
  CHECK_FALSE(kernel({false, true, false, false}));
  CHECK_FALSE(kernel({false, false, false, true}));  // shared memory is overwritten before the wait
  CHECK(kernel({false, false, true, false}));        // no rule of its own,
  CHECK(std::isnan(c[0]));                           // but nothing is there
}

// Two blocks of a cluster swap a number. `met`: each has its barrier before the other sends; `bytes`: that it
// waits for.
void swap_numbers(float *to, bool met, uint32_t bytes) {
  const uint32_t data = shared_address(dynamic_shared<char>()), bar = data + 64;
  if (threadIdx.x == 0) barrier_init(bar, 1);
  if (met) cooperative_groups::this_cluster().sync();
  if (threadIdx.x == 0) {
    barrier_expect(bar, bytes);
    store_remote(data, 1 - int(blockIdx.x), float(blockIdx.x + 1), bar);
  }
  __syncthreads();
  barrier_wait(bar, 0);
  if (threadIdx.x == 0) to[blockIdx.x] = load_f1(data);
}

TEST_CASE("stores into another block of the cluster") {
  Memory<float> to(2);
  const auto kernel = [&](bool met, uint32_t bytes) {
    return runs(
        32, [&, met, bytes] { swap_numbers(to.p, met, bytes); }, 2);
  };
  CHECK(kernel(true, 4));
  CHECK(to[0] == 2.f);
  CHECK(to[1] == 1.f);
  CHECK_FALSE(kernel(false, 4));
  CHECK_FALSE(kernel(true, 8));
  CHECK_FALSE(runs(
      32, [&] { store_remote(shared_address(dynamic_shared<char>()), 2, 1.f, 0); }, 2));  // no such block
}

TEST_CASE("rules of barriers and addresses") {
  const auto address = [] { return shared_address(dynamic_shared<char>()); };
  CHECK_FALSE(runs(32, [&] {  // one arrival too many
    if (threadIdx.x == 0) barrier_init(address(), 2);
    __syncthreads();
    if (threadIdx.x < 2) barrier_arrive_n(address(), 2 + int(threadIdx.x));
  }));
  CHECK_FALSE(runs(64, [&] {  // the phase after next: a waiting thread would not see its own
    if (threadIdx.x == 0) barrier_init(address(), 1);
    __syncthreads();
    if (threadIdx.x >= 32) barrier_wait(address(), 0);
    named_barrier<1, 64>();
    if (threadIdx.x >= 32) barrier_wait(address(), 1);
    if (threadIdx.x == 0) {
      barrier_arrive(address());
      barrier_arrive(address());
    }
  }));
  CHECK_FALSE(runs(64, [] {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      named_barrier<1, 64>();
  }));  // deadlock
  CHECK_FALSE(runs(32, [] {
    if (threadIdx.x < 16)
      __syncwarp();
    else
      __shfl_sync(~0u, 1, 0);
  }));                                                           // diverging lanes
  CHECK_FALSE(runs(32, [&] { load_f1(address() + kShared); }));  // out of bounds
  CHECK_FALSE(runs(32, [&] { load_u4(address() + 4); }));        // misaligned
  CHECK_FALSE(runs(384, [] { registers_inc<240>(); }));          // more registers than the block has
  CHECK(runs(32, [] {
    if (threadIdx.x < 8) return;
    __syncwarp();
  }));  // lanes that have returned do not count
}

}  // namespace
