// SPDX-License-Identifier: Apache-2.0
// Every line of tests/cases against the oracles.
#include <cstdio>

#include "doctest/doctest.h"
#include "expect.h"

using namespace powerattn_test;

namespace {

void check_file(const char *name) {
  Memory memory;
  const bool print = std::getenv("POWERATTN_TEST_VERBOSE") != nullptr;
  const char *only = std::getenv("POWERATTN_TEST_CASE");
  for (const Case &c : load_cases(std::string(POWERATTN_CASES) + "/" + name)) {
    if (only && c.line.find(only) == std::string::npos) continue;
    Report report;
    const std::string problems = check_case(memory, c, seed_of(c.line), &report);
    if (print) std::printf("%5.2f %-8s %s\n", report.worst_ratio, report.worst_name.c_str(), c.line.c_str());
    INFO(c.line);
    CHECK(problems == "");
  }
}

}  // namespace

TEST_CASE("cases: smoke") { check_file("smoke.txt"); }
TEST_CASE("cases: ci") { check_file("ci.txt"); }
TEST_CASE("cases: chunked") { check_file("chunked.txt"); }
