// SPDX-License-Identifier: Apache-2.0
// States as data: folded, converted, copied between pools and to and from a saved block.
#pragma once

#include "parallel.h"
#include "problem.h"

namespace powerattn {

void compose_states(const Problem &p, const powerattn_compose_args &a, const ParallelFor &parallel);
void convert_states(const Problem &p, const powerattn_convert_args &a, const ParallelFor &parallel);

// The payload of a packed state: for each state and kv head z [D], then S [D, e], little-endian, of type
// `dtype`, at any alignment. Where the state has no z, zeros are packed and what is unpacked is dropped.
void pack_states(const Problem &p, const powerattn_pack_args &a, Dtype dtype, void *payload,
                 const ParallelFor &parallel);
void unpack_states(const Problem &p, const powerattn_pack_args &a, Dtype dtype, const void *payload,
                   const ParallelFor &parallel);

}  // namespace powerattn
