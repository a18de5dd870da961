// SPDX-License-Identifier: Apache-2.0
// bfloat16, head_dim 128.
#include "output.cuh"
#include "update.cuh"

namespace powerattn::cuda::linear {

template cudaError_t launch_output<__nv_bfloat16, 128>(const OutputArgs &, cudaStream_t);
template cudaError_t launch_update<__nv_bfloat16, 128>(const UpdateArgs &, cudaStream_t);

}  // namespace powerattn::cuda::linear
