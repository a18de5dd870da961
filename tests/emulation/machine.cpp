// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a launch: one cluster after the other, one thread at a time, each until it waits for
// others.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda_runtime.h"
#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

Machine machine;
Thread *self = nullptr;

namespace {

struct Failed {};  // thrown where no thread runs
void *scheduler_stack = nullptr;

const char *name_of(Order o) {
  return o == Order::kForward ? "forward" : o == Order::kReverse ? "reverse" : "random";
}
const char *name_of(Timing t) { return t == Timing::kLate ? "late" : t == Timing::kEarly ? "early" : "random"; }

void back_to_scheduler() { switch_stack(&self->stack_pointer, scheduler_stack); }

void run_thread(Thread *t) {
  self = t;
  threadIdx = t->thread;
  blockIdx = t->owner->block;
  switch_stack(&scheduler_stack, t->stack_pointer);
  self = nullptr;
}

// Lets everyone at the barrier go on; `last` is the thread that came last and did not wait.
void release(NamedBarrier &barrier, Thread *last) {
  barrier.expected = 0;
  std::vector<Thread *> threads;
  threads.swap(barrier.waiting);
  for (Thread *t : threads) wake(t);
  if (last != nullptr) threads.push_back(last);
  synchronise(threads);
}

// All lanes are there: does what they came for and lets them go on.
void finish_meeting() {
  Meeting &m = self->warp->meeting;
  if (m.perform != nullptr) m.perform(m.arguments);
  const uint32_t lanes = m.arrived;
  m.arrived = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1 && lane != self->lane())
      wake(self->owner->threads[size_t(self->warp->index * kLanes + lane)]);
  }
}

void thread_main() {
  machine.launch.thread();
  check_exit(*self);
  Block &block = *self->owner;
  self->exited = true;
  Warp &warp = *self->warp;
  warp.exited |= 1u << self->lane();
  if (warp.meeting.arrived != 0 && warp.meeting.arrived == (warp.meeting.mask & ~warp.exited)) finish_meeting();
  if (--block.alive == 0) {
    check_exit(block);
  } else if (!block.barriers[0].waiting.empty() && int(block.barriers[0].waiting.size()) == block.alive) {
    release(block.barriers[0], nullptr);  // __syncthreads is among the threads that are left
  }
  back_to_scheduler();
  std::abort();
}

// Blocks are made once and used again; the last byte of dynamic shared memory is followed by an inaccessible
// page.
Block *block_at(size_t n) {
  static std::vector<std::unique_ptr<Block>> pool;
  while (pool.size() <= n) pool.push_back(std::make_unique<Block>());
  return pool[n].get();
}
unsigned char *shared_window(size_t n, size_t bytes) {
  constexpr size_t kWindow = 256 * 1024;
  static std::vector<unsigned char *> pool;
  while (pool.size() <= n) {
    void *p = mmap(nullptr, kWindow + 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) std::abort();
    auto *base = static_cast<unsigned char *>(p);
    mprotect(base, 4096, PROT_NONE);
    mprotect(base + 4096 + kWindow, 4096, PROT_NONE);
    pool.push_back(base + 4096);
  }
  return pool[n] + kWindow - bytes;
}
Thread *thread_at(size_t n) {
  static std::vector<std::unique_ptr<Thread>> pool;
  while (pool.size() <= n) pool.push_back(std::make_unique<Thread>());
  return pool[n].get();
}

void start_block(Block &block, int rank, int64_t number) {
  const Launch &l = machine.launch;
  const unsigned index = unsigned(number);
  block.block = {index % l.grid.x, index / l.grid.x % l.grid.y, index / l.grid.x / l.grid.y};
  block.rank = rank;
  // What a block finds in shared memory is whatever was there: here NaN in every format.
  block.shared_bytes = (l.shared + 1023) / 1024 * 1024;
  block.shared = shared_window(size_t(rank), block.shared_bytes);
  std::memset(block.shared, 0xff, block.shared_bytes);
  block.shared_bytes = l.shared;
  block.writes.assign((l.shared + 15) / 16, {});
  for (NamedBarrier &b : block.barriers) b = {};
  block.mbarriers.clear();
  block.loads.clear();
  const int threads = int(l.block.x * l.block.y * l.block.z);
  block.alive = threads;
  block.threads.resize(size_t(threads));
  block.warps.assign(size_t(threads + kLanes - 1) / kLanes, {});
  for (size_t w = 0; w < block.warps.size(); ++w) {
    block.warps[w].block = &block;
    block.warps[w].index = int(w);
  }
  for (int i = 0; i < threads; ++i) {
    const size_t n = size_t(rank) * size_t(threads) + size_t(i);
    Thread *t = thread_at(n);
    const unsigned u = unsigned(i);
    t->thread = {u % l.block.x, u / l.block.x % l.block.y, u / l.block.x / l.block.y};
    t->index = i;
    t->owner = &block;
    t->warp = &block.warps[size_t(i) / kLanes];
    t->stack_pointer = new_context(n, thread_main);
    t->exited = t->ready = false;
    t->copies.assign(1, {});
    t->stores.clear();
    t->fenced = 0;
    t->waited = false;
    t->wait = {};
    block.threads[size_t(i)] = t;
    wake(t);
  }
  begin_races(block);
}

Thread *next_ready() {
  std::vector<Thread *> &list = machine.ready;
  if (machine.ready_head == list.size()) {
    list.clear();
    machine.ready_head = 0;
    return nullptr;
  }
  Thread *t;
  if (machine.order == Order::kForward) {
    t = list[machine.ready_head++];
  } else {
    if (machine.order == Order::kRandom)
      std::swap(list[machine.ready_head + machine.random() % (list.size() - machine.ready_head)], list.back());
    t = list.back();
    list.pop_back();
  }
  t->ready = false;
  return t;
}

// Every group of threads that waits for the same thing, with the place of one of them in the source.
void report_deadlock() {
  std::fprintf(stderr, "emulation: deadlock, no thread can run and nothing is under way; order %s, timing %s\n",
               name_of(machine.order), name_of(machine.timing));
  for (Block *b : machine.blocks) {
    std::vector<bool> told(b->threads.size());
    for (size_t i = 0; i < b->threads.size(); ++i) {
      Thread *t = b->threads[i];
      if (t->exited || told[i]) continue;
      std::string who;
      int count = 0;
      for (size_t j = i; j < b->threads.size(); ++j) {
        const Thread &u = *b->threads[j];
        if (u.exited || std::strcmp(u.wait.what, t->wait.what) != 0 || u.wait.x != t->wait.x ||
            u.wait.y != t->wait.y)
          continue;
        told[j] = true;
        ++count;
        const bool follows = j > 0 && told[j - 1] && !who.empty();
        if (!follows) who += (who.empty() ? "" : ",") + std::to_string(j);
        const bool last = j + 1 == b->threads.size() || b->threads[j + 1]->exited ||
                          std::strcmp(b->threads[j + 1]->wait.what, t->wait.what) != 0 ||
                          b->threads[j + 1]->wait.x != t->wait.x || b->threads[j + 1]->wait.y != t->wait.y;
        if (follows && last) who += "-" + std::to_string(j);
      }
      std::fprintf(stderr, "  block %u,%u,%u: %d threads (%s) wait in %s(0x%x, %u)", b->block.x, b->block.y,
                   b->block.z, count, who.c_str(), t->wait.what, t->wait.x, t->wait.y);
      const auto m = b->mbarriers.find(t->wait.x);
      if (m != b->mbarriers.end())
        std::fprintf(stderr, ": phase %u, %d of %d arrivals missing, %lld bytes missing", m->second.phase,
                     m->second.pending, m->second.expected, static_cast<long long>(m->second.bytes));
      std::fprintf(stderr, "\n");
      machine.tracing = true;
      run_thread(t);
      machine.tracing = false;
    }
    const int threads = int(b->threads.size());
    if (b->alive < threads) std::fprintf(stderr, "  %d threads have returned\n", threads - b->alive);
  }
  machine.failed = true;
}

void run_cluster(int64_t first, int count) {
  machine.blocks.clear();
  machine.ready.clear();
  machine.ready_head = 0;
  machine.cluster_barrier = {};
  machine.under_way = 0;
  for (int rank = 0; rank < count; ++rank) {
    machine.blocks.push_back(block_at(size_t(rank)));
    start_block(*machine.blocks.back(), rank, first + rank);
  }
  for (;;) {
    Thread *t = next_ready();
    if (t == nullptr) {
      if (complete_one()) continue;
      for (Block *b : machine.blocks) {
        if (b->alive > 0) return report_deadlock();
      }
      return;
    }
    run_thread(t);
    if (machine.failed) return;
    if (machine.timing == Timing::kRandom && machine.random() % 8 == 0) complete_one();
  }
}

Order order_of(unsigned draw) {
  const char *fixed = std::getenv("EMULATION_ORDER");
  for (Order o : {Order::kForward, Order::kReverse, Order::kRandom}) {
    if (fixed != nullptr ? std::strcmp(fixed, name_of(o)) == 0 : unsigned(o) == draw % 3) return o;
  }
  return Order::kForward;
}
Timing timing_of(unsigned draw) {
  const char *fixed = std::getenv("EMULATION_TIMING");
  for (Timing t : {Timing::kLate, Timing::kEarly, Timing::kRandom}) {
    if (fixed != nullptr ? std::strcmp(fixed, name_of(t)) == 0 : unsigned(t) == draw % 3) return t;
  }
  return Timing::kLate;
}

}  // namespace

bool run(const Launch &launch) {
  static std::mt19937 draws(1);
  machine.launch = launch;
  blockDim = launch.block;
  gridDim = launch.grid;
  machine.order = order_of(draws());
  machine.timing = timing_of(draws());
  machine.random.seed(draws());
  machine.races = std::getenv("EMULATION_RACES") != nullptr && launch.cluster == 1;
  machine.failed = false;
  const int64_t blocks = int64_t(launch.grid.x) * launch.grid.y * launch.grid.z,
                clusters = blocks / launch.cluster;
  try {
    for (int64_t i = 0; i < clusters && !machine.failed; ++i)
      run_cluster((machine.order == Order::kReverse ? clusters - 1 - i : i) * launch.cluster, launch.cluster);
  } catch (const Failed &) {
  }
  machine.launch.thread = nullptr;
  return !machine.failed;
}

void fail(const char *format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulation: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (self != nullptr)
    std::fprintf(stderr, "; block %u,%u,%u thread %d (warp %d, lane %d)", blockIdx.x, blockIdx.y, blockIdx.z,
                 self->index, self->index / kLanes, self->lane());
  std::fprintf(stderr, "; order %s, timing %s\n", name_of(machine.order), name_of(machine.timing));
  machine.failed = true;
  if (self == nullptr) throw Failed();
  std::fprintf(stderr, "%s", where().c_str());
  back_to_scheduler();
  std::abort();
}

void sleep(Wait wait) {
  self->wait = wait;
  back_to_scheduler();
  while (machine.tracing) {
    std::fprintf(stderr, "%s", where().c_str());
    back_to_scheduler();
  }
}

void wake(Thread *t) {
  if (t->ready || t->exited) return;
  t->ready = true;
  machine.ready.push_back(t);
}

void meet(const char *what, uint32_t mask, void *argument, void (*perform)(void *const *)) {
  Meeting &m = self->warp->meeting;
  const uint32_t bit = 1u << self->lane();
  if (!(mask & bit)) fail("%s: this lane is not in its own mask %08x", what, mask);
  if (m.arrived == 0) {
    m.what = what;
    m.mask = mask;
    m.perform = perform;
  } else if (std::strcmp(m.what, what) != 0 || m.mask != mask) {
    fail("lanes diverge: this one is at %s (mask %08x), others of its warp at %s (mask %08x)", what, mask,
         m.what, m.mask);
  }
  m.arguments[self->lane()] = argument;
  m.arrived |= bit;
  if (m.arrived == (mask & ~self->warp->exited)) return finish_meeting();
  sleep({what, mask, 0});
}
void meet_all(const char *what, void *argument, void (*perform)(void *const *)) {
  if (self->warp->exited) fail("%s: lanes %08x of the warp have returned", what, self->warp->exited);
  meet(what, 0xffffffffu, argument, perform);
}

void warp_barrier(uint32_t mask) {
  meet("__syncwarp", mask, nullptr, [](void *const *) {
    std::vector<Thread *> lanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (self->warp->meeting.arrived >> lane & 1)
        lanes.push_back(self->owner->threads[size_t(self->warp->index * kLanes + lane)]);
    }
    synchronise(lanes);
  });
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane) {
  struct Exchange {
    uint64_t value, result;
    int source;
  } x{value, 0, source_lane & (kLanes - 1)};
  meet("__shfl_sync", mask, &x, [](void *const *lanes) {
    const uint32_t present = self->warp->meeting.arrived;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(present >> lane & 1)) continue;
      auto *to = static_cast<Exchange *>(lanes[lane]);
      if (!(present >> to->source & 1)) fail("__shfl_sync reads lane %d, which is not there", to->source);
      to->result = static_cast<Exchange *>(lanes[to->source])->value;
    }
  });
  return x.result;
}

void block_barrier() {
  NamedBarrier &b = self->owner->barriers[0];
  b.waiting.push_back(self);
  if (int(b.waiting.size()) < self->owner->alive) return sleep({"__syncthreads", 0, 0});
  b.waiting.pop_back();
  release(b, self);
}

void named_barrier(int id, int threads) {
  if (id < 0 || id > 15 || threads <= 0 || threads % kLanes) fail("bar.sync %d, %d is not legal", id, threads);
  NamedBarrier &b = self->owner->barriers[id];
  if (b.waiting.empty()) b.expected = threads;
  if (b.expected != threads) fail("bar.sync %d with %d threads, others said %d", id, threads, b.expected);
  b.waiting.push_back(self);
  if (int(b.waiting.size()) < threads) return sleep({"bar.sync", uint32_t(id), uint32_t(threads)});
  // Whole warps take part: bar.sync is .aligned.
  std::map<Warp *, int> warps;
  for (Thread *t : b.waiting) ++warps[t->warp];
  for (const auto &w : warps) {
    if (w.second != kLanes)
      fail("bar.sync %d: %d lanes of warp %d are missing", id, kLanes - w.second, w.first->index);
  }
  b.waiting.pop_back();
  release(b, self);
}

void cluster_barrier() {
  NamedBarrier &b = machine.cluster_barrier;
  b.waiting.push_back(self);
  int alive = 0;
  for (Block *block : machine.blocks) alive += block->alive;
  if (int(b.waiting.size()) < alive) return sleep({"cluster.sync", 0, 0});
  b.waiting.pop_back();
  for (Thread *t : b.waiting) wake(t);
  b.waiting.clear();
}

void *cluster_map(const void *shared, int rank) {
  const auto offset = static_cast<const unsigned char *>(shared) - self->owner->shared;
  if (offset < 0 || size_t(offset) >= self->owner->shared_bytes) fail("mapa of what is not shared memory");
  if (rank < 0 || size_t(rank) >= machine.blocks.size()) fail("mapa: no block %d in the cluster", rank);
  if (machine.blocks[size_t(rank)]->alive == 0) fail("block %d of the cluster has returned", rank);
  return machine.blocks[size_t(rank)]->shared + offset;
}

}  // namespace emulation
