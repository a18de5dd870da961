// SPDX-License-Identifier: Apache-2.0
// float16, head_dim 128.
#include "output.cuh"
#include "update.cuh"

namespace powerattn::cuda::linear {

template cudaError_t launch_output<__half, 128>(const OutputArgs &, cudaStream_t);
template cudaError_t launch_update<__half, 128>(const UpdateArgs &, cudaStream_t);

}  // namespace powerattn::cuda::linear
