// SPDX-License-Identifier: Apache-2.0
// How far a result may be from the oracle's: at most twice as far as a plain implementation in the same
// precision, plus one rounding of the result itself; the largest error and the root mean square, both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "rounding.h"

namespace powerattn_test {

struct Distance {
  double largest = 0, rms = 0;
  bool finite = true;
};

inline Distance distance(const Vector &x, const Vector &reference) {
  Distance d;
  double sum = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double off = std::fabs(x[i] - reference[i]);
    if (!(off < std::numeric_limits<double>::infinity())) d.finite = false;
    d.largest = std::max(d.largest, off);
    sum += off * off;
  }
  d.rms = reference.empty() ? 0 : std::sqrt(sum / static_cast<double>(reference.size()));
  return d;
}

// The errors of one output and what is allowed.
struct Measure {
  std::string name;
  Distance error, allowed;

  double ratio() const {
    if (!error.finite) return std::numeric_limits<double>::infinity();
    return std::max(over(error.largest, allowed.largest), over(error.rms, allowed.rms));
  }
  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line, "%s: error max %.3g rms %.3g, allowed max %.3g rms %.3g%s; ", name.c_str(),
                  error.largest, error.rms, allowed.largest, allowed.rms, error.finite ? "" : ", not finite");
    return line;
  }

 private:
  static double over(double error, double allowed) {
    if (allowed > 0) return error / allowed;
    return error > 0 ? 1e300 : 0;
  }
};

struct Report {
  std::string problems;    // empty: within tolerance
  bool wrong = false;      // what no other draw can mend
  bool empty = false;      // a plain implementation overflows: the draw tests nothing
  double worst_ratio = 0;  // of an error to its tolerance
  std::string worst_name;
  std::vector<Measure> measures;

  void add(const Measure &m) {
    measures.push_back(m);
    wrong |= !m.error.finite;
    const double ratio = m.ratio();
    if (ratio > worst_ratio) {
      worst_ratio = ratio;
      worst_name = m.name;
    }
    if (ratio > 1) problems += m.text();
  }
  void add(const Report &other) {
    problems += other.problems;
    wrong |= other.wrong;
    empty |= other.empty;
    if (other.worst_ratio > worst_ratio) {
      worst_ratio = other.worst_ratio;
      worst_name = other.worst_name;
    }
    measures.insert(measures.end(), other.measures.begin(), other.measures.end());
  }
};

// `dtype` is what the result is stored in: that rounding nobody can avoid.
inline void judge(const char *name, int32_t dtype, const Vector &got, const Vector &exact,
                  const std::vector<const Vector *> &plain, Report *report) {
  if (got.empty() && exact.empty()) return;
  if (got.size() != exact.size()) {
    report->problems += std::string(name) + ": " + std::to_string(got.size()) + " numbers, expected " +
                        std::to_string(exact.size()) + "; ";
    report->wrong = true;
    return;
  }
  Measure m;
  m.name = name;
  for (const Vector *one : plain) {
    const Distance d = distance(*one, exact);
    if (!d.finite) {
      report->problems += m.name + ": the plain implementation overflows, the draw tests nothing; ";
      report->empty = true;
      return;
    }
    m.allowed.largest = std::max(m.allowed.largest, d.largest);
    m.allowed.rms = std::max(m.allowed.rms, d.rms);
  }
  const Distance size = distance(Vector(exact.size(), 0.0), exact);
  const double u = unit_roundoff(dtype);
  m.error = distance(got, exact);
  m.allowed.largest = 2 * m.allowed.largest + u * size.largest;
  m.allowed.rms = 2 * m.allowed.rms + u * size.rms;
  report->add(m);
}

// Errors of several draws, as root mean squares over the draws. The errors of one draw are a sample, and where
// a single number decides (the largest; a sum that all of an output depends on) the ratio of two samples is
// anything: of two implementations of the same accuracy, one is more than twice as far off as the other in
// three draws of ten. Over nine draws that is so in three sets of a hundred, over thirty in none.
class Pool {
 public:
  void add(const Report &report) {
    if (report.wrong) wrong_ += report.problems;
    if (report.empty) return;
    for (const Measure &m : report.measures) {
      Squares &s = outputs_[m.name];
      s.error.largest += m.error.largest * m.error.largest;
      s.error.rms += m.error.rms * m.error.rms;
      s.allowed.largest += m.allowed.largest * m.allowed.largest;
      s.allowed.rms += m.allowed.rms * m.allowed.rms;
      ++s.count;
    }
  }
  Report verdict() const {
    Report all;
    if (outputs_.empty()) all.problems = "the plain implementation overflows in every draw; ";
    for (const auto &[name, s] : outputs_) {
      const auto root = [count = s.count](const Distance &sums) {
        return Distance{std::sqrt(sums.largest / count), std::sqrt(sums.rms / count), true};
      };
      all.add(Measure{name, root(s.error), root(s.allowed)});
    }
    if (!wrong_.empty()) {
      all.problems += wrong_;
      all.wrong = true;
      all.worst_ratio = std::numeric_limits<double>::infinity();
    }
    return all;
  }

 private:
  struct Squares {
    Distance error, allowed;
    int count = 0;
  };
  std::map<std::string, Squares> outputs_;
  std::string wrong_;
};

}  // namespace powerattn_test
