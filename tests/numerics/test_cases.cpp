// SPDX-License-Identifier: Apache-2.0
// Every line of tests/cases against the oracles.
#include <cstdio>

#include "doctest/doctest.h"
#include "expect.h"

using namespace powerattn_test;

namespace {

void check(const std::vector<Case> &cases) {
  Memory memory;
  const bool print = std::getenv("POWERATTN_TEST_VERBOSE") != nullptr;
  const char *only = std::getenv("POWERATTN_TEST_CASE");
  for (const Case &c : cases) {
    if (only && c.line.find(only) == std::string::npos) continue;
    Report report;
    const std::string problems = check_case(memory, c, seed_of(c.line), &report);
    if (print) std::printf("%5.2f %-8s %s\n", report.worst_ratio, report.worst_name.c_str(), c.line.c_str());
    INFO(c.line);
    CHECK(problems == "");
  }
}

void check_file(const char *name) { check(load_cases(std::string(POWERATTN_CASES) + "/" + name)); }

}  // namespace

// So that no test of an instruction set runs on another one unseen.
TEST_CASE("isa: POWERATTN_CPU_ISA names the kernels that run") {
  const char *asked = std::getenv("POWERATTN_CPU_ISA");
  if (asked == nullptr) return;
  const std::string isa = asked;
#if defined(__x86_64__) && !defined(POWERATTN_EMULATE_ISA)
  if (isa == "avx2" && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return;
  if (isa == "avx512" || isa == "amx") return;  // the processor decides
#endif
  powerattn_plan *plan = nullptr;
  const powerattn_desc desc = parse_case("fwd f32 b1 t8 h1 d8 p2").desc();
  REQUIRE(powerattn_plan_create(&desc, &plan) == POWERATTN_OK);
  char text[4096] = "";
  CHECK(powerattn_plan_describe(plan, text, sizeof text, nullptr) == POWERATTN_OK);
  powerattn_plan_destroy(plan);
  INFO(text);
  CHECK(std::string(text).find("forward cpu." + isa + ",") != std::string::npos);
}

TEST_CASE("cases: smoke") { check_file("smoke.txt"); }
TEST_CASE("cases: ci") { check_file("ci.txt"); }
TEST_CASE("cases: chunked") { check_file("chunked.txt"); }
TEST_CASE("cases: wide") { check_file("wide.txt"); }

TEST_CASE("cases: every head_dim and value_dim from 1 to 256") {
  std::vector<Case> cases;
  for (int d = 1; d <= 256; ++d) {
    // Tokens enough, and denominators far enough from 0, that the error of the plain implementation, which is
    // the measure, is no stroke of luck.
    const std::string dims = " t29 h1 eps1 d" + std::to_string(d) + " e" + std::to_string(257 - d);
    cases.push_back(parse_case("fwd f32" + dims + " p2 attn gated"));
    if (d % 3 == 1) cases.push_back(parse_case("bwd f32" + dims + " p2 attn gated"));
    if (d % 51 != 1 && d > 12) continue;  // with states, which take longer: small ones, every 51st, the last
    cases.push_back(parse_case("fwd f32" + dims + " p2 chunked c10 gated state"));
    cases.push_back(parse_case("bwd f32" + dims + " p2 chunked c10 gated state"));
  }
  check(cases);
}
