// SPDX-License-Identifier: Apache-2.0
// Lanes of work that advance independently. A lane is a sequence of phases, a phase a set of independent units;
// a phase opens when the one before has ended. Nobody waits at a barrier: threads stay with their home lane,
// where their data is in the caches, and help others while it has nothing to give.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#include "threads.h"

namespace powerattn {
namespace cpu {

// Lives in the workspace.
struct Lane {
  // Units of the open phase that nobody has taken: front in the high half, back in the low half. Both ends are
  // taken from, so that threads of one lane keep to their part of the state. Who takes a unit takes it from the
  // phase that is open then: equal numbers of different phases do no harm.
  alignas(64) std::atomic<uint64_t> open;
  alignas(64) std::atomic<int64_t> unfinished;
};

// Stages: int64_t advance(int64_t lane) begins the lane's next phase that has units and returns how many, 0
// after the last one; run(int64_t lane, int64_t unit, int worker).
template <class Stages>
class Pipeline {
 public:
  Pipeline(Lane *lanes, int64_t count, Stages *stages) : lanes_(lanes), count_(count), stages_(stages) {
    running_.store(count, std::memory_order_relaxed);
    for (int64_t i = 0; i < count; ++i) {
      new (&lanes[i]) Lane;
      lanes[i].open.store(0, std::memory_order_relaxed);
    }
    for (int64_t i = 0; i < count; ++i) advance(i);
  }

  // Returns when all lanes have ended; any number of workers.
  void work(int worker) {
    const int64_t home = worker % count_;
    const bool from_back = worker / count_ % 2 != 0;
    int idle = 0;
    while (running_.load(std::memory_order_acquire) > 0) {
      if (work_once(home, from_back, worker)) {
        idle = 0;
      } else if (++idle < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 1000;

  bool work_once(int64_t home, bool from_back, int worker) {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t lane = home + i < count_ ? home + i : home + i - count_;
      int64_t unit;
      if (!take(&lanes_[lane], from_back, &unit)) continue;
      stages_->run(lane, unit, worker);
      if (lanes_[lane].unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) advance(lane);
      return true;
    }
    return false;
  }

  static bool take(Lane *lane, bool from_back, int64_t *unit) {
    uint64_t seen = lane->open.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t front = seen >> 32, back = seen & 0xffffffffu;
      if (front >= back) return false;
      const uint64_t rest = from_back ? seen - 1 : seen + (uint64_t{1} << 32);
      if (lane->open.compare_exchange_weak(seen, rest, std::memory_order_acq_rel, std::memory_order_acquire)) {
        *unit = static_cast<int64_t>(from_back ? back - 1 : front);
        return true;
      }
    }
  }

  // By the thread that finished the last unit: no other has one of this lane.
  void advance(int64_t lane) {
    const int64_t units = stages_->advance(lane);
    if (units == 0) {
      running_.fetch_sub(1, std::memory_order_acq_rel);
      return;
    }
    lanes_[lane].unfinished.store(units, std::memory_order_relaxed);
    lanes_[lane].open.store(static_cast<uint64_t>(units), std::memory_order_release);
  }

  Lane *lanes_;
  int64_t count_;
  Stages *stages_;
  std::atomic<int64_t> running_{0};
};

}  // namespace cpu
}  // namespace powerattn
