// SPDX-License-Identifier: Apache-2.0
// What emulated device code calls: the thread it runs as, and one function per instruction that threads execute
// together or that the device completes later. Plain C++; the headers beside this folder give them the names of
// CUDA and PTX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulation {

// A violated rule of the device: reports it with thread, block, kernel and where in the source, and ends the
// kernel; the launch then fails as on a device. Does not return.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// ---- Threads together -------------------------------------------------------------------------------------

void block_barrier();                     // __syncthreads
void named_barrier(int id, int threads);  // bar.sync id, threads
void warp_barrier(uint32_t mask);         // __syncwarp
uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane);
void cluster_barrier();
void store_remote(uint32_t to, int rank, float x, uint32_t barrier);  // st.async; at once
void *cluster_map(const void *shared, int rank);  // the same place in another block of the cluster

// ---- Shared memory: addresses as the device has them, checked ---------------------------------------------

unsigned char *dynamic_shared();
uint32_t shared_address(const void *p);
void shared_store(uint32_t address, const void *from, uint32_t bytes);  // bytes: also the alignment
void shared_load(void *to, uint32_t address, uint32_t bytes);

// ---- Copies that complete later ---------------------------------------------------------------------------

void copy16(uint32_t dst, const void *src, bool valid);  // cp.async
void copy_commit();
void copy_wait(int pending);
void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t barrier);
void tensor_load(uint32_t dst, const void *map, const int32_t (&at)[4], uint32_t barrier);
void tensor_store(const void *map, uint32_t src, const int32_t (&at)[4]);  // likewise a group
void bulk_store(void *dst, uint32_t src, uint32_t bytes);                  // and commits it as a group
void bulk_add(float *dst, uint32_t src, uint32_t bytes);                   // the same
void bulk_store_wait(int pending);
void wait_for_kernel_before();
bool has_waited();
void proxy_fence();

// ---- mbarrier ---------------------------------------------------------------------------------------------

void barrier_init(uint32_t barrier, int arrivals);
void barrier_wait(uint32_t barrier, uint32_t parity);
void barrier_arrive(uint32_t barrier, int count, uint32_t expected_bytes);
void barrier_expect(uint32_t barrier, uint32_t bytes);  // mbarrier.expect_tx: no arrival
void barrier_arrive_copies(uint32_t barrier);           // cp.async.mbarrier.arrive.noinc

// ---- Matrices ---------------------------------------------------------------------------------------------

enum class Element { kBfloat16, kFloat16, kTf32 };
void load_matrices(uint32_t *r, int count, bool transposed, uint32_t address);         // ldmatrix
void store_matrices(uint32_t address, const uint32_t *r, int count, bool transposed);  // stmatrix
// mma.sync, c[16, 8] += a[16, K] b[K, 8]; K = 16, or 8 of TF32.
void multiply(Element element, float *c, const uint32_t *a, uint32_t b0, uint32_t b1);

// wgmma.mma_async: c[64, columns] (+)= A[64, 16] B[16, columns]. a: registers, or null and `a_descriptor`
// counts.
struct WarpgroupProduct {
  Element element;
  int columns;
  bool accumulate, transposed_a, transposed_b;
};
void warpgroup_multiply(const WarpgroupProduct &product, float *c, const uint32_t *a, uint64_t a_descriptor,
                        uint64_t b_descriptor);
void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(int pending);
void set_registers(int count, bool increase);  // setmaxnreg

// ---- Launches ---------------------------------------------------------------------------------------------

struct Launch {
  dim3 grid, block;
  size_t shared = 0;
  int cluster = 1;  // blocks of a cluster, along x
  const void *kernel = nullptr;
  std::function<void()> thread;  // what each thread runs
};

}  // namespace emulation
