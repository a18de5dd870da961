// SPDX-License-Identifier: Apache-2.0
// The rows of the symmetric power embedding, one at a time, in canonical order.
#pragma once

#include <cmath>
#include <cstdint>

namespace powerattn {

constexpr int kMaxDegree = 8;

// phi(x)[r] = weight * prod_m x[index[m]] with i1 <= i2 <= ... <= ip in lexicographic order and
// weight = sqrt(p! / prod(multiplicity!)), so that phi(x) . phi(y) = (x . y)^p (multinomial theorem).
struct Monomial {
  int64_t dim;
  int degree;
  int64_t index[kMaxDegree] = {};
  double weight = 1;

  Monomial(int64_t head_dim, int p) : dim(head_dim), degree(p < kMaxDegree ? p : kMaxDegree) {}

  // The next row; false after the last one.
  bool next() {
    int m = degree - 1;
    while (m >= 0 && index[m] == dim - 1) --m;
    if (m < 0) return false;
    const int64_t value = index[m] + 1;
    for (; m < degree; ++m) index[m] = value;
    double permutations = 1;
    int run = 0;
    for (int i = 0; i < kMaxDegree && i < degree; ++i) {
      run = i > 0 && index[i] == index[i - 1] ? run + 1 : 1;
      permutations = permutations * (i + 1) / run;
    }
    weight = std::sqrt(permutations);
    return true;
  }

  double value(const double *x) const {
    double product = weight;
    for (int m = 0; m < degree; ++m) product *= x[index[m]];
    return product;
  }

  // dx += g * d phi(x)[r] / d x
  void add_gradient(const double *x, double g, double *dx) const {
    for (int m = 0; m < degree; ++m) {
      double product = g * weight;
      for (int i = 0; i < degree; ++i) product *= i == m ? 1.0 : x[index[i]];
      dx[index[m]] += product;
    }
  }
};

}  // namespace powerattn
