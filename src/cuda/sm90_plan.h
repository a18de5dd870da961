// SPDX-License-Identifier: Apache-2.0
// What "cuda.sm90" runs, and how it is tiled.
#pragma once

#include <string>

#include "tensor_core.h"

namespace powerattn::cuda::sm90 {

// What the kernels can do beyond the row "cuda.sm90" as it was measured. A feature whose kernels have been
// compiled and checked in emulation (tests/emulation), but have not run on a device, is never chosen: only the
// row "cuda.sm90.next" takes it, and only POWERATTN_CUDA_IMPLEMENTATION reaches that row. Its line in kMeasured
// becomes true when its tests and times are in docs/performance-log.md.
struct Features {
  bool states;  // initial and final states and their gradients: exact update weights, corrected delta
  bool d128;    // head_dim = value_dim = 128
  bool rope;    // rotary embedding: through the prepare pass
  bool half;    // float16
};
constexpr Features kMeasured = {/*states=*/true, /*d128=*/true, /*rope=*/true, /*half=*/true};
constexpr Features kWritten = {/*states=*/true, /*d128=*/true, /*rope=*/true, /*half=*/true};

bool choose(const Features &features, Op op, const Problem &p, const Pins &pins, Tiling *tiling,
            std::string *why);
void describe(const Problem &p, const Tiling &t, std::string *text);

// Whether dq, dk and dv come from one pass.
bool in_one_pass(const Problem &p, bool chunks);

}  // namespace powerattn::cuda::sm90
