// SPDX-License-Identifier: Apache-2.0
// What a case must give, from the oracles, and the plain implementations that its errors are compared with.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "judge.h"
#include "run_case.h"

namespace powerattn_test {

enum class Method { kAttention, kAttentionBackwards, kRecurrence, kRecurrenceBackwards };

template <typename A, typename R>
Outputs compute(const Case &c, const Inputs &in, const R &round, Method method) {
  const int64_t b = c.packed ? 1 : c.b, tokens = b * c.t;
  Outputs out;
  const bool backward = c.op == CaseOp::kBackward || c.op == CaseOp::kSummaryReverse;
  const bool states = c.op != CaseOp::kBackward && (c.op != CaseOp::kForward || c.state);
  const int64_t rows =
      c.state || c.op == CaseOp::kSummary || c.op == CaseOp::kSummaryReverse || c.op == CaseOp::kStep
          ? embedding(c.d, c.p).rows()
          : 0;
  out.y.assign(static_cast<size_t>(tokens * c.heads_q * c.e), 0);
  out.norm.assign(static_cast<size_t>(tokens * c.heads_q), 0);
  if (backward) {
    out.dq.assign(static_cast<size_t>(tokens * c.heads_q * c.d), 0);
    out.dk.assign(static_cast<size_t>(tokens * c.heads_kv * c.d), 0);
    out.dv.assign(static_cast<size_t>(tokens * c.heads_kv * c.e), 0);
    out.dlog_g.assign(static_cast<size_t>(tokens * c.heads_kv), 0);
  }
  if (c.op == CaseOp::kStep) {
    out.s = in.s0;
    out.z = in.z0;
  }
  for (int64_t n = 0; n < c.count(); ++n) {
    const int64_t slot = in.slots.empty() ? n : in.slots[n];
    if (slot < 0) continue;
    for (int64_t g = 0; g < c.heads_kv; ++g) {
      HeadInput head = head_input(c, in, n, g);
      head.backwards = method == Method::kAttentionBackwards || method == Method::kRecurrenceBackwards;
      const int64_t at_b = c.packed ? 0 : n, start = start_of(c, in, n), first = g * c.group();
      const bool recurrence = method == Method::kRecurrence || method == Method::kRecurrenceBackwards;
      HeadOutput f;
      // The states come from the recurrence in every method; the outputs from the method's own form.
      if (recurrence || states) f = recurrent_forward<A>(head, round);
      if (!recurrence && c.op != CaseOp::kSummary) {
        HeadOutput a = attention_forward<A>(head, round);
        f.y = a.y;
        f.norm = a.norm;
      }
      scatter(c, f.y, c.heads_q, c.e, at_b, start, head.t, first, c.group(), &out.y);
      scatter(c, f.norm, c.heads_q, 1, at_b, start, head.t, first, c.group(), &out.norm);
      if (c.op == CaseOp::kStep) {
        if (head.t > 0) {
          std::copy(f.s.begin(), f.s.end(), out.s.begin() + (slot * c.heads_kv + g) * rows * c.e);
          std::copy(f.z.begin(), f.z.end(), out.z.begin() + (slot * c.heads_kv + g) * rows);
        }
      } else if (states && c.op != CaseOp::kSummaryReverse) {
        out.s.insert(out.s.end(), f.s.begin(), f.s.end());
        out.z.insert(out.z.end(), f.z.begin(), f.z.end());
      }
      if (c.op == CaseOp::kSummary || c.op == CaseOp::kSummaryReverse) {
        double total = 0;
        for (double x : head.log_g) total += x;
        out.total.push_back(total);
      }
      if (!backward) continue;
      HeadGradient d;
      if (recurrence || c.op == CaseOp::kSummaryReverse)
        d = recurrent_backward<A>(head, f, round);
      else
        d = attention_backward<A>(head, f, round);
      scatter(c, d.dq, c.heads_q, c.d, at_b, start, head.t, first, c.group(), &out.dq);
      scatter(c, d.dk, c.heads_kv, c.d, at_b, start, head.t, g, 1, &out.dk);
      scatter(c, d.dv, c.heads_kv, c.e, at_b, start, head.t, g, 1, &out.dv);
      scatter(c, d.dlog_g, c.heads_kv, 1, at_b, start, head.t, g, 1, &out.dlog_g);
      if (!in.s0.empty() || c.op == CaseOp::kSummaryReverse) {
        out.ds0.insert(out.ds0.end(), d.ds0.begin(), d.ds0.end());
        out.dz0.insert(out.dz0.end(), d.dz0.begin(), d.dz0.end());
      }
    }
  }
  return out;
}

// The oracle: float64, and what the machine has beyond it for float64 data.
inline Outputs oracle(const Case &c, const Inputs &in) {
  const Method method = c.op == CaseOp::kStep ? Method::kRecurrence : Method::kAttention;
  if (c.dtype == POWERATTN_FLOAT64) return compute<long double>(c, in, Exact(), method);
  return compute<double>(c, in, Exact(), method);
}

// Plain implementations of the case's precision, of each form that the plan may have chosen.
inline std::vector<Outputs> plain_versions(const Case &c, const Inputs &in, bool states) {
  std::vector<Outputs> all;
  std::vector<Method> methods;
  if (c.op != CaseOp::kSummary && c.op != CaseOp::kStep) {
    methods = {Method::kAttention, Method::kAttentionBackwards};
  }
  if (states || c.op == CaseOp::kSummary || c.op == CaseOp::kStep) {
    methods.push_back(Method::kRecurrence);
    methods.push_back(Method::kRecurrenceBackwards);
  }
  for (Method m : methods) {
    if (c.dtype == POWERATTN_FLOAT64)
      all.push_back(compute<double>(c, in, Exact(), m));
    else
      all.push_back(compute<float>(c, in, Rounded{c.dtype, c.out_of_range()}, m));
  }
  if (c.bf16_state) {  // a state is rounded when it is stored
    for (Outputs &one : all) {
      for (Vector *x : {&one.s, &one.z, &one.ds0, &one.dz0}) {
        for (double &value : *x) value = round_to(POWERATTN_BFLOAT16, value);
      }
    }
  }
  return all;
}

inline Report judge_all(const Case &c, const Outputs &got, const Outputs &exact,
                        const std::vector<Outputs> &plain) {
  Report report;
  const auto one = [&](const char *name, int32_t dtype, Vector Outputs::*field) {
    if ((got.*field).empty()) return;
    std::vector<const Vector *> versions;
    for (const Outputs &p : plain) versions.push_back(&(p.*field));
    judge(name, dtype, got.*field, exact.*field, versions, &report);
  };
  one("y", c.dtype, &Outputs::y);
  one("row_norm", stat_dtype(c), &Outputs::norm);
  one("S", state_dtype(c), &Outputs::s);
  one("z", state_dtype(c), &Outputs::z);
  one("d_q", c.dtype, &Outputs::dq);
  one("d_k", c.dtype, &Outputs::dk);
  one("d_v", c.dtype, &Outputs::dv);
  one("d_log_g", stat_dtype(c), &Outputs::dlog_g);
  one("dS", state_dtype(c), &Outputs::ds0);
  one("dz", state_dtype(c), &Outputs::dz0);
  return report;
}

// Runs a case with the numbers of one seed and judges every output.
inline Report check_draw(Memory &memory, const Case &c, uint64_t seed) {
  Inputs in = make_inputs(c, seed);
  const Outputs exact = oracle(c, in);
  if (c.op == CaseOp::kSummaryReverse) {  // needs what the forward call returned
    in.y = exact.y;
    in.norm = exact.norm;
    for (double &x : in.y) x = round_to(c.dtype, x);
    for (double &x : in.norm) x = round_to(stat_dtype(c), x);
  }
  Report all;
  try {
    const Plan plan(c.desc(memory.device_type()));
    const bool states =
        c.state || plan.info().form == POWERATTN_FORM_CHUNKED || c.op == CaseOp::kSummaryReverse;
    const std::vector<Outputs> plain = plain_versions(c, in, states);
    for (int saved = 0; saved < (c.op == CaseOp::kBackward && plan.info().saved_bytes ? 2 : 1); ++saved) {
      Outputs got = run(memory, c, in, plan, saved == 1);
      if (!got.total.empty()) {
        const Vector bound(got.total.size(), 0.0);
        Report sums;
        judge("total_log_g", stat_dtype(c), got.total, exact.total, {&exact.total}, &sums);
        // A sum of t gates: one rounding each.
        if (sums.worst_ratio > static_cast<double>(std::max<int64_t>(c.t, 1))) {
          sums.wrong = true;
          all.add(sums);
        }
      }
      Report report = judge_all(c, got, exact, plain);
      if (saved == 1 && !report.problems.empty()) report.problems += "(with saved) ";
      all.add(report);
    }
    if (!all.problems.empty()) all.problems += "\n" + plan.text();
  } catch (const std::exception &error) {
    all.problems += error.what();
    all.wrong = true;
  }
  if (all.wrong) all.worst_ratio = std::numeric_limits<double>::infinity();
  return all;
}

// One draw, or as many as are asked for; where one is over its tolerance, more. Judged together; returns what
// is wrong, or "".
constexpr int kPooledDraws = 9;
inline std::string check_case(Memory &memory, const Case &c, uint64_t seed, Report *summary = nullptr,
                              int draws = 1) {
  Report report = check_draw(memory, c, seed);
  if (!report.wrong && (draws > 1 || !report.problems.empty())) {
    if (draws == 1) draws = kPooledDraws;
    Pool pool;
    pool.add(report);
    for (int draw = 1; draw < draws; ++draw)
      pool.add(check_draw(memory, c, seed + 1000003u * static_cast<uint64_t>(draw)));
    const std::string text = report.problems;
    report = pool.verdict();
    if (!report.problems.empty()) report.problems += "\nfirst draw: " + text;
  }
  if (summary) *summary = report;
  return report.problems;
}

inline uint64_t seed_of(const std::string &line) {
  uint64_t hash = 1469598103934665603u;  // FNV-1a: every case has its own numbers
  for (char ch : line) hash = (hash ^ static_cast<unsigned char>(ch)) * 1099511628211u;
  const char *text = std::getenv("POWERATTN_TEST_SEED");
  return hash + (text ? std::strtoull(text, nullptr, 10) : 0);
}

}  // namespace powerattn_test
