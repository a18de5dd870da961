// SPDX-License-Identifier: Apache-2.0
// The case files of tests/cases on a CUDA device, against the same float64 oracles as the CPU:
//   test_gpu_cases FILE... [--only TEXT] [--shard I/N] [--no-guard] [--draws N]
// --draws: each case with N sets of random inputs, the first being the one of every run, judged together.
// One line per case: the largest ratio of an error to its tolerance, the output it belongs to, the
// implementation.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_memory.h"
#include "expect.h"
#include "skip.h"

using namespace powerattn_test;

namespace {

// "forward cuda.sm90, backward ..." out of the plan's description.
std::string implementation_of(const Case &c) {
  try {
    const Plan plan(c.desc(POWERATTN_CUDA));
    const std::string text = plan.text();
    const size_t at = text.find("runs ");
    return at == std::string::npos ? "" : text.substr(at + 10, text.find('\n', at) - at - 10);
  } catch (const std::exception &) {
    return "no plan";
  }
}

bool second_run_is_identical(const Case &c, uint64_t seed) {
  CudaMemory memory;
  Inputs in = make_inputs(c, seed);
  if (c.op == CaseOp::kSummaryReverse)
    return true;  // needs a forward's outputs; covered by the forward and backward
  const Plan plan(c.desc(POWERATTN_CUDA));
  const Outputs a = run(memory, c, in, plan), b = run(memory, c, in, plan);
  for (Vector Outputs::*field : {&Outputs::y, &Outputs::norm, &Outputs::s, &Outputs::z, &Outputs::dq,
                                 &Outputs::dk, &Outputs::dv, &Outputs::dlog_g, &Outputs::ds0, &Outputs::dz0}) {
    if ((a.*field).size() != (b.*field).size() ||
        std::memcmp((a.*field).data(), (b.*field).data(), (a.*field).size() * sizeof(double)) != 0)
      return false;
  }
  return true;
}

}  // namespace

int main(int argc, char **argv) {
  if (no_device()) return kSkipped;
  std::vector<std::string> files;
  std::string only;
  int shard = 0, shards = 1, draws = 1;
  size_t guard = 4096;  // bytes around every buffer that must stay as they are
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--only") && i + 1 < argc) {
      only = argv[++i];
    } else if (!std::strcmp(argv[i], "--shard") && i + 1 < argc) {
      if (std::sscanf(argv[++i], "%d/%d", &shard, &shards) != 2) return 2;
    } else if (!std::strcmp(argv[i], "--draws") && i + 1 < argc) {
      draws = std::atoi(argv[++i]);
    } else if (!std::strcmp(argv[i], "--no-guard")) {
      guard = 0;
    } else {
      files.push_back(argv[i]);
    }
  }
  int failed = 0, passed = 0, number = 0;
  for (const std::string &file : files) {
    for (const Case &c : load_cases(file)) {
      if (!only.empty() && c.line.find(only) == std::string::npos) continue;
      if (c.dtype == POWERATTN_FLOAT64) continue;  // the CPU's
      if (number++ % shards != shard) continue;
      const uint64_t seed = seed_of(c.line);
      Report report;
      std::string problems;
      {
        CudaMemory memory(guard);
        problems = check_case(memory, c, seed, &report, draws);
        if (memory.damaged()) problems += "bytes outside the buffers were written; ";
        try {
          if (problems.empty() && !second_run_is_identical(c, seed))
            problems = "a second run gave other bits; ";
        } catch (const std::exception &error) {
          problems += error.what();
        }
      }
      problems.empty() ? ++passed : ++failed;
      std::printf("%s %8.3f %-8s %-60s [%s]\n", problems.empty() ? "pass" : "FAIL", report.worst_ratio,
                  report.worst_name.c_str(), c.line.c_str(), implementation_of(c).c_str());
      if (!problems.empty()) std::printf("     %s\n", problems.c_str());
      std::fflush(stdout);
      if (cudaDeviceSynchronize() != cudaSuccess) {
        std::printf("the device is lost: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 1;
      }
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
