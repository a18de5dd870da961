// SPDX-License-Identifier: Apache-2.0
// bfloat16, head_dim 64.
#include "output.cuh"
#include "update.cuh"

namespace powerattn::cuda::linear {

template cudaError_t launch_output<__nv_bfloat16, 64>(const OutputArgs &, cudaStream_t);
template cudaError_t launch_update<__nv_bfloat16, 64>(const UpdateArgs &, cudaStream_t);

}  // namespace powerattn::cuda::linear
