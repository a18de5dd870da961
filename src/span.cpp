// SPDX-License-Identifier: Apache-2.0
#include "span.h"

#include <algorithm>

namespace powerattn {
namespace {

using Wide = __int128;

// A bounded linear form: sum_k coefficient_k * x_k with low_k <= x_k <= high_k.
struct Term {
  Wide coefficient, low, high;
};

Wide magnitude(Wide x) { return x < 0 ? -x : x; }
Wide floor_div(Wide a, Wide b) {  // b > 0
  const Wide q = a / b;
  return q * b > a ? q - 1 : q;
}

struct Form {
  Term term[8];
  int size = 0;
  int budget = 1 << 14;  // nodes of the search; nested layouts need a few dozen

  // Adds a term; equal coefficients share one, so that slices of one buffer stay cheap.
  void add(Wide coefficient, Wide low, Wide high) {
    if (coefficient == 0 || (low == 0 && high == 0)) return;
    if (coefficient < 0) {
      coefficient = -coefficient;
      std::swap(low, high);
      low = -low;
      high = -high;
    }
    for (int k = 0; k < size; ++k) {
      if (term[k].coefficient == coefficient) {
        term[k].low += low;
        term[k].high += high;
        return;
      }
    }
    term[size++] = {coefficient, low, high};
  }

  // Is sum = target possible? Depth first from the largest coefficient; at each level only the values that
  // leave a remainder within reach of the smaller ones are tried.
  Overlap solve(Wide target) {
    std::sort(term, term + size, [](const Term &a, const Term &b) { return a.coefficient > b.coefficient; });
    return search(0, target);
  }

 private:
  Overlap search(int level, Wide target) {
    if (level == size) return target == 0 ? Overlap::kYes : Overlap::kNo;
    if (--budget < 0) return Overlap::kUnknown;
    Wide low = 0, high = 0;  // reach of the terms below
    for (int k = level + 1; k < size; ++k) {
      low += term[k].coefficient * term[k].low;
      high += term[k].coefficient * term[k].high;
    }
    const Term &t = term[level];
    const Wide first = std::max(t.low, -floor_div(-(target - high), t.coefficient));
    const Wide last = std::min(t.high, floor_div(target - low, t.coefficient));
    for (Wide x = first; x <= last; ++x) {
      const Overlap found = search(level + 1, target - x * t.coefficient);
      if (found != Overlap::kNo) return found;
    }
    return Overlap::kNo;
  }
};

void bounds(const Span &s, Wide *first, Wide *last) {
  *first = *last = static_cast<Wide>(s.base);
  for (int k = 0; k < 3; ++k) {
    const Wide reach = static_cast<Wide>(s.stride[k]) * (s.extent[k] - 1);
    (reach < 0 ? *first : *last) += reach;
  }
  *last += s.run - 1;
}

}  // namespace

bool addressable(const Span &s) {
  Wide first = 0, last = 0;
  bounds(s, &first, &last);
  return first >= 0 && last <= static_cast<Wide>(UINT64_MAX) && last - first < static_cast<Wide>(INT64_MAX);
}

void reach(const Span &s, uint64_t *first, uint64_t *last) {
  Wide low = 0, high = 0;
  bounds(s, &low, &high);
  *first = static_cast<uint64_t>(low);
  *last = static_cast<uint64_t>(high);
}

// Each dimension steps over all that the smaller ones reach: the layout of nearly every tensor.
static bool nested(const Span &s) {
  int order[3] = {0, 1, 2};
  std::sort(order, order + 3, [&](int a, int b) { return magnitude(s.stride[a]) < magnitude(s.stride[b]); });
  Wide span = s.run;
  for (const int k : order) {
    if (s.extent[k] <= 1) continue;
    if (magnitude(s.stride[k]) < span) return false;
    span += magnitude(s.stride[k]) * (s.extent[k] - 1);
  }
  return true;
}

// Two indices collide when their difference moves less than the run. The first dimension that differs can be
// taken as positive; dimensions before it are equal, those after it differ either way.
Overlap overlaps_itself(const Span &s) {
  if (nested(s)) return Overlap::kNo;
  for (int k = 0; k < 3; ++k) {
    if (s.extent[k] <= 1) continue;
    if (s.stride[k] == 0) return Overlap::kYes;
    Form f;
    const Wide step = magnitude(s.stride[k]);
    // x_k = 1 + x, so the equation is  step * x + ... = -step.
    f.add(step, 0, s.extent[k] - 2);
    for (int j = k + 1; j < 3; ++j) {
      f.add(s.stride[j], -static_cast<Wide>(s.extent[j] - 1), static_cast<Wide>(s.extent[j] - 1));
    }
    f.add(1, -static_cast<Wide>(s.run - 1), static_cast<Wide>(s.run - 1));
    const Overlap found = f.solve(-step);
    if (found != Overlap::kNo) return found;
  }
  return Overlap::kNo;
}

// a.base + a(x) = b.base + b(x'), solved as a(x) - b(x') = b.base - a.base.
Overlap overlap(const Span &a, const Span &b) {
  Wide a_first, a_last, b_first, b_last;
  bounds(a, &a_first, &a_last);
  bounds(b, &b_first, &b_last);
  if (a_last < b_first || b_last < a_first) return Overlap::kNo;
  Form f;
  for (int k = 0; k < 3; ++k) f.add(a.stride[k], 0, a.extent[k] - 1);
  for (int k = 0; k < 3; ++k) f.add(-static_cast<Wide>(b.stride[k]), 0, b.extent[k] - 1);
  f.add(1, -static_cast<Wide>(b.run - 1), a.run - 1);
  return f.solve(static_cast<Wide>(b.base) - static_cast<Wide>(a.base));
}

}  // namespace powerattn
