// SPDX-License-Identifier: Apache-2.0
// The fast kernels for one instruction set. Each isa_*.cpp defines POWERATTN_ISA and the width of its vectors,
// is compiled with its own flags and includes this file: everything lives in a namespace of its own, nothing
// from the standard library that has external linkage is used, so no instruction leaks into code that runs
// elsewhere.
#include <cmath>
#include <cstdint>
#if defined(POWERATTN_AMX) && !defined(POWERATTN_EMULATE_ISA)
#include <immintrin.h>
#endif

#include "kernels/cpu/fast.h"
#include "power_attention.h"

#define POWERATTN_STRING2(x) #x
#define POWERATTN_STRING(x) POWERATTN_STRING2(x)

namespace powerattn {
namespace POWERATTN_ISA {

using namespace fast;

// In the order of use.
// clang-format off
#include "kernels/cpu/simd.h"
#include "kernels/cpu/phi.h"
#include "kernels/cpu/scores.h"
#if defined(POWERATTN_AMX)
#if defined(POWERATTN_EMULATE_ISA)
#include "kernels/cpu/amx_emulation.h"
#endif
#include "kernels/cpu/amx.h"
#include "kernels/cpu/amx_query.h"
#include "kernels/cpu/amx_update.h"
#endif
#include "kernels/cpu/tokens.h"
#include "kernels/cpu/update.h"
#if defined(POWERATTN_AMX)
#include "kernels/cpu/amx_output.h"
#endif
#include "kernels/cpu/output.h"
#include "kernels/cpu/dq.h"
#include "kernels/cpu/dkv.h"
#include "kernels/cpu/step_rows.h"
// clang-format on

// The largest need of any unit.
template <class T>
int64_t scratch(const Call<T> &call) {
  int64_t most = kNr<T> * (call.dp + call.ep) * static_cast<int64_t>(sizeof(T));
  const int64_t needs[] = {update_scratch<T>(), output_scratch(call), dq_scratch(call), dkv_scratch(call)};
#if defined(POWERATTN_AMX)
  const int64_t amx = amx_update_scratch();
  if (call.low && amx > most) most = amx;
#endif
  for (const int64_t need : needs) most = need > most ? need : most;
  return round_up(most, 256);
}

#if defined(POWERATTN_AMX)
template <class T>
constexpr bool kLow = sizeof(T) == sizeof(float);
#else
template <class T>
constexpr bool kLow = false;
#endif

template <class T>
constexpr Kernels<T> table() {
  return {POWERATTN_STRING(POWERATTN_ISA),
          kMr,
          kNr<T>,
          kLow<T>,
          &scratch<T>,
          &pack<T>,
          &gates<T>,
          &output_grad<T>,
          &output<T>,
          &update<T>,
          &dq<T>,
          &dkv<T>,
          &image_size<T>,
          &image<T>,
          &import_state<T>,
          &export_state<T>,
          &inner<T>,
          &step_unit};
}

const Isa &isa() {
  static constexpr Isa kernels = {table<float>(), table<double>()};
  return kernels;
}

}  // namespace POWERATTN_ISA
}  // namespace powerattn
