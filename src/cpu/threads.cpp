// SPDX-License-Identifier: Apache-2.0
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace powerattn {
namespace {

// A worker looks for the next job this many times before it sleeps: phases of one call follow each other
// within microseconds, a wake-up costs about 50.
constexpr int kSpins = 4000;

struct Job {
  int64_t count = 0;
  ParallelFor::Body body = nullptr;
  const void *context = nullptr;
};

class Pool {
 public:
  void grow(int threads) {
    const std::lock_guard<std::mutex> lock(busy_);
    while (workers_ < threads - 1) {
      const int index = workers_ + 1;
      try {
        std::thread([this, index] { work(index); }).detach();
      } catch (const std::system_error &) {
        return;
      }
      ++workers_;
    }
  }

  // False when somebody else is using the workers.
  bool run(int threads, int64_t count, ParallelFor::Body body, const void *context) {
    const std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (!owner.owns_lock() || workers_ == 0) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = {count, body, context};
      next_.store(0, std::memory_order_relaxed);
      limit_ = threads;
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take(job_, 0);
    // Late sleepers find the job closed: nobody waits for a thread that has not begun.
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;
    if (inside_ > 0) {
      lock.unlock();
      for (int i = 0; i < kSpins && finished_.load(std::memory_order_acquire) != started_; ++i) relax();
      lock.lock();
      done_.wait(lock, [this] { return inside_ == 0; });
    }
    return true;
  }

 private:
  void take(const Job &job, int worker) {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= job.count) return;
      job.body(job.context, index, worker);
    }
  }

  void work(int worker) {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
      Job job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (!open_ || worker >= limit_) continue;
        job = job_;
        ++inside_;
        ++started_;
      }
      take(job, worker);
      const std::lock_guard<std::mutex> lock(mutex_);
      finished_.fetch_add(1, std::memory_order_release);
      if (--inside_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;  // held by the caller whose job runs, and while threads are added
  int workers_ = 0;

  std::mutex mutex_;  // guards the fields below that are not atomic
  std::condition_variable wake_, done_;
  Job job_;
  int limit_ = 0;
  bool open_ = false;
  int inside_ = 0;
  uint64_t started_ = 0;
  std::atomic<uint64_t> finished_{0};
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
};

std::atomic<Pool *> pool{nullptr};
std::mutex create;

// Threads do not survive a fork, and locks may be held by threads that are gone: the child forgets the pool
// (its plans run on the calling thread) until it makes a plan of its own.
void after_fork_in_child() {
  pool.store(nullptr, std::memory_order_relaxed);
  new (&create) std::mutex;
}

}  // namespace

void start_threads(int threads) {
  if (threads <= 1) return;
  Pool *current = nullptr;
  {
    const std::lock_guard<std::mutex> lock(create);
    current = pool.load(std::memory_order_acquire);
    if (current == nullptr) {
      static const bool registered = pthread_atfork(nullptr, nullptr, &after_fork_in_child) == 0;
      if (!registered) return;
      current = new (std::nothrow) Pool;  // never freed: detached threads use it until the process ends
      if (current == nullptr) return;
      pool.store(current, std::memory_order_release);
    }
  }
  current->grow(threads);
}

void parallel_for(int threads, int64_t count, ParallelFor::Body body, const void *context) {
  Pool *current = pool.load(std::memory_order_acquire);
  if (threads > 1 && count > 1 && current != nullptr && current->run(threads, count, body, context)) return;
  for (int64_t index = 0; index < count; ++index) body(context, index, 0);
}

}  // namespace powerattn
