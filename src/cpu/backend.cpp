// SPDX-License-Identifier: Apache-2.0
// The CPU backend: the ordered table of implementations and the operations on states.
#include "backend.h"

#include <unistd.h>

#include "kernels/cpu/states.h"
#include "threads.h"

namespace powerattn {

const Implementation &fast_implementation();
const Implementation &reference_implementation();
const Implementation &step_implementation();

namespace {

powerattn_status device_count(int32_t *count) {
  *count = 1;
  return POWERATTN_OK;
}

powerattn_status open_device(int32_t, uint64_t *memory_bytes) {
  *memory_bytes =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGE_SIZE));
  return POWERATTN_OK;
}

// Host memory cannot be told from other addresses; a wrong pointer is the caller's.
powerattn_status check_pointer(const Problem &, const void *, const char *) { return POWERATTN_OK; }

// Fastest first; the reference runs what nothing above it takes.
const Implementation *const *implementations() {
  static const Implementation *const table[] = {&fast_implementation(), &step_implementation(),
                                                &reference_implementation(), nullptr};
  return table;
}

powerattn_status compose(const powerattn_plan &plan, const powerattn_compose_args &args) {
  compose_states(plan.problem, args, parallel(plan.problem.threads));
  return POWERATTN_OK;
}

powerattn_status convert(const powerattn_plan &plan, const powerattn_convert_args &args) {
  convert_states(plan.problem, args, parallel(plan.problem.threads));
  return POWERATTN_OK;
}

powerattn_status pack(const powerattn_plan &plan, const powerattn_pack_args &args, Dtype dtype, void *payload) {
  pack_states(plan.problem, args, dtype, payload, parallel(plan.problem.threads));
  return POWERATTN_OK;
}

powerattn_status unpack(const powerattn_plan &plan, const powerattn_pack_args &args, Dtype dtype,
                        const void *payload) {
  unpack_states(plan.problem, args, dtype, payload, parallel(plan.problem.threads));
  return POWERATTN_OK;
}

}  // namespace

const Backend &cpu_backend() {
  static const Backend backend = {"cpu",   implementations(), device_count, open_device, check_pointer,
                                  compose, convert,           pack,         unpack};
  return backend;
}

}  // namespace powerattn
