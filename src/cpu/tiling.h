// SPDX-License-Identifier: Apache-2.0
// The cost model of the fast CPU kernels: form and chunk. A pure function of the problem.
#pragma once

#include <string>

#include "backend.h"

namespace powerattn {
namespace cpu {

// Sustained multiply-add rate of one core in the kernels, FLOP/s.
double rate(const Problem &p);

// False, and why, where the pins cannot be met.
bool choose_tiling(const Problem &p, const Pins &pins, Tiling *tiling, std::string *why);

}  // namespace cpu
}  // namespace powerattn
