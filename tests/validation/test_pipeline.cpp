// SPDX-License-Identifier: Apache-2.0
// Lanes: every unit of every phase once, phases of a lane in order, with any number of threads.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/pipeline.h"

using powerattn::cpu::Lane;
using powerattn::cpu::Pipeline;

namespace {

// Lane i has phases of phases[i][0], phases[i][1], ... units. `values` is not atomic: what a phase wrote has to
// be seen by the next one, whoever runs it, and a thread sanitizer would say where it is not.
struct Stages {
  std::vector<std::vector<int64_t>> phases;
  std::vector<std::vector<std::vector<int>>> values;  // [lane][phase][unit]: times it has run
  std::vector<size_t> open;                           // of each lane: phases begun
  std::atomic<int> wrong{0};

  explicit Stages(std::vector<std::vector<int64_t>> units) : phases(std::move(units)), open(phases.size()) {
    for (const auto &lane : phases) {
      values.emplace_back();
      for (const int64_t count : lane) values.back().emplace_back(static_cast<size_t>(count), 0);
    }
  }
  int64_t advance(int64_t lane) {
    const size_t l = static_cast<size_t>(lane);
    if (open[l] > 0) {
      for (const int times : values[l][open[l] - 1]) wrong += times != 1;  // the phase before has ended
    }
    return open[l] < phases[l].size() ? phases[l][open[l]++] : 0;
  }
  void run(int64_t lane, int64_t unit, int) {
    const size_t l = static_cast<size_t>(lane), phase = open[l] - 1;
    if (phase > 0) {
      for (const int times : values[l][phase - 1]) wrong += times != 1;
    }
    ++values[l][phase][static_cast<size_t>(unit)];
  }
};

void check(const std::vector<std::vector<int64_t>> &phases, int threads) {
  CAPTURE(threads);
  Stages stages(phases);
  const auto lanes = std::make_unique<Lane[]>(phases.size());
  Pipeline<Stages> pipeline(lanes.get(), static_cast<int64_t>(phases.size()), &stages);
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) workers.emplace_back([&pipeline, i] { pipeline.work(i); });
  pipeline.work(0);
  for (std::thread &worker : workers) worker.join();
  CHECK(stages.wrong == 0);
  for (size_t l = 0; l < phases.size(); ++l) {
    CHECK(stages.open[l] == phases[l].size());
    for (const auto &phase : stages.values[l]) {
      for (const int times : phase) CHECK(times == 1);
    }
  }
}

}  // namespace

TEST_CASE("lanes: one thread does all the work, however many lanes") {
  check({{3, 1, 2}}, 1);
  check({{1}, {2, 2}, {5}, {1, 1, 1, 1}}, 1);
}

TEST_CASE("lanes: every unit once and phases in order, with any number of threads") {
  for (const int threads : {2, 3, 8}) {
    std::vector<std::vector<int64_t>> even(3), uneven;
    for (auto &lane : even) lane.assign(200, 4);
    for (int64_t l = 0; l < 5; ++l) {
      uneven.emplace_back();
      for (int64_t i = 0; i < 60 * l + 1; ++i) uneven.back().push_back(1 + (7 * i + l) % 9);
    }
    check(even, threads);
    check(uneven, threads);
  }
}

TEST_CASE("lanes: one without phases ends at once") { check({{}, {2}, {}}, 3); }
