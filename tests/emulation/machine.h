// SPDX-License-Identifier: Apache-2.0
// The emulated device between its parts: threads are fibers of one host thread, a cluster of blocks (mostly one
// block) runs at a time. Nothing here is seen by emulated code (that is emulation/device.h).
#pragma once

#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "emulation/device.h"

namespace emulation {

struct Block;
struct Thread;
struct Warp;

constexpr int kLanes = 32;
constexpr uint32_t kSharedBase = 1024;  // shared address of the first byte of dynamic shared memory

// One asynchronous copy, or (barrier without bytes) an arrival that waits for the copies before it.
struct Copy {
  uint32_t dst = 0, bytes = 0, barrier = 0;
  const void *src = nullptr;    // null: zeros
  std::vector<uint32_t> clock;  // bulk loads: of the thread that issued it (races.cpp)
};
// 16 bytes of shared memory that a tensor copy fills: `bytes` of global memory, then zeros.
struct Piece {
  const void *src = nullptr;
  uint32_t bytes = 0;
};
struct BulkStore {
  void *dst;
  uint32_t src, bytes;
  bool add;                   // floats
  std::vector<Piece> pieces;  // of a tensor copy, in order of their shared addresses; dst: of none
};

// What a sleeping thread waits for: an instruction and its operands.
struct Wait {
  const char *what = nullptr;
  uint32_t x = 0, y = 0;
};

struct Thread {
  uint3 thread;
  int index = 0;  // in its block
  Block *owner = nullptr;
  Warp *warp = nullptr;
  void *stack_pointer = nullptr;
  bool exited = false;
  bool waited = false;  // for the kernel before
  Wait wait;            // while it sleeps
  bool ready = false;   // in the list of those that can run
  // cp.async: groups in order of commit; the last one is open.
  std::vector<std::vector<Copy>> copies;
  std::vector<BulkStore> stores;  // one a group
  uint64_t fenced = 0;            // clock of the last fence.proxy.async
  std::vector<uint32_t> clock;    // races.cpp

  int lane() const { return index % kLanes; }
};

// What the lanes of a warp do together: the last to arrive does it for all.
struct Meeting {
  const char *what = nullptr;
  uint32_t mask = 0, arrived = 0;
  void *arguments[kLanes];
  void (*perform)(void *const *) = nullptr;
};

// An accumulator that products in flight write: its values live here, the lanes' registers hold NaN until a
// wait.
struct Accumulator {
  float *registers[kLanes];
  int count = 0;  // registers per lane
  std::vector<float> values;
  int in_flight = 0;
};
struct Product {
  WarpgroupProduct shape;
  int accumulator = 0;
  bool registers = false;
  uint32_t a[kLanes][4];
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool done = false;
};

struct Warp {
  Block *block = nullptr;
  int index = 0;
  uint32_t exited = 0;  // lanes that have returned
  Meeting meeting;
  std::vector<Accumulator> accumulators;
  std::vector<std::vector<Product>> products;  // groups in order of commit; the last one is open
  bool fenced = false;                         // wgmma.fence since the last commit
  int64_t issued = 0;                          // products, to compare the warps of a warpgroup
  int registers = 0;                           // setmaxnreg; 0: as launched
};

struct NamedBarrier {
  int expected = 0;
  std::vector<Thread *> waiting;
};

struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  std::vector<Thread *> waiting;                // for this phase
  std::vector<Thread *> released;               // woken, but have not looked yet
  std::vector<uint32_t> clock, complete_clock;  // races.cpp
};

// Two bytes of shared memory, for races.cpp: thread + 1 and its time.
struct Word {
  uint32_t writer = 0, write_clock = 0, reader = 0, read_clock = 0;
  int readers = -1;  // in Block::readers, where several threads read
};

struct Block {
  uint3 block;
  unsigned char *shared = nullptr;  // dynamic shared memory
  size_t shared_bytes = 0;
  int rank = 0;  // in its cluster
  std::vector<Thread *> threads;
  std::vector<Warp> warps;
  int alive = 0;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;
  struct Write {  // of 16 bytes of shared memory by ordinary instructions
    uint32_t thread = 0;
    uint64_t clock = 0;
  };
  std::vector<Write> writes;
  struct Load {
    Thread *thread;
    Copy copy;
    std::vector<Piece> pieces;  // of a tensor copy, in order of their shared addresses
  };
  std::vector<Load> loads;  // bulk loads under way
  std::vector<Word> words;  // races.cpp
  std::vector<std::vector<uint32_t>> readers;
};

// The orders in which threads run, and the times at which what is asynchronous happens. Results must not depend
// on either, so that successive launches take different ones.
enum class Order { kForward, kReverse, kRandom };
enum class Timing { kLate, kEarly, kRandom };

struct Machine {
  Launch launch;
  Order order = Order::kForward;
  Timing timing = Timing::kLate;
  std::mt19937 random;
  std::vector<Block *> blocks;  // of the cluster that runs
  std::vector<Thread *> ready;
  size_t ready_head = 0;
  NamedBarrier cluster_barrier;
  uint64_t clock = 1;
  int64_t under_way = 0;  // copies that are not complete
  bool races = false;     // look for races
  bool failed = false;
  bool tracing = false;  // a woken thread only tells where it is
};
extern Machine machine;
extern Thread *self;

// Runs every block; false when a rule was violated, which was reported.
bool run(const Launch &launch);

// Puts the running thread to sleep until wake().
void sleep(Wait wait);
void wake(Thread *thread);

// Meets the lanes of `mask` that have not returned; the last one to arrive runs perform(arguments of all
// lanes).
void meet(const char *what, uint32_t mask, void *argument, void (*perform)(void *const *lanes));
// Meets all 32 lanes, which an instruction that is .aligned needs.
void meet_all(const char *what, void *argument, void (*perform)(void *const *lanes));

// Host address of `bytes` of shared memory of a block; fails outside of it.
unsigned char *shared_pointer(const Block &block, uint32_t address, uint32_t bytes, const char *what);
void note_write(Block &block, const Thread &thread, uint32_t address, uint32_t bytes);
void check_proxy(const Block &block, const Thread &reader, uint32_t address, uint32_t bytes, const char *what);

// "function at file:line, ..." of the running thread's innermost frames outside the emulator.
std::string where();

// Global memory that the device may touch.
bool is_global(const void *p, size_t bytes);

// races.cpp: an access is checked where it begins and noted where it is complete.
void begin_races(Block &block);
void check_race(Block &block, const Thread &t, uint32_t address, uint32_t bytes, bool write, const char *what);
void note_access(Block &block, uint32_t thread, uint32_t now, uint32_t address, uint32_t bytes, bool write);
void access(Block &block, const Thread &t, uint32_t address, uint32_t bytes, bool write, const char *what);
uint32_t now(const Thread &t);
void synchronise(const std::vector<Thread *> &threads);
void leave_clock(Mbarrier &b, Thread &t);
void leave_clock(Mbarrier &b, const std::vector<uint32_t> &clock);
void take_clock(const Mbarrier &b, Thread &t);

void begin_load(Block::Load load, const char *what);
void begin_store(BulkStore store, const char *what);
void arrive(Block &block, uint32_t address, int count, int64_t bytes_expected, int64_t bytes_done);
// Completes one copy that is under way somewhere; false when there is none.
bool complete_one();
void check_exit(Thread &thread);  // nothing may be under way that needs the thread or its block
void check_exit(Block &block);

}  // namespace emulation
