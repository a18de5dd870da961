// SPDX-License-Identifier: Apache-2.0
// head_dim 128.
#include "output.cuh"
#include "update.cuh"

namespace powerattn::cuda::linear {

template cudaError_t launch_output<128>(const OutputArgs &, cudaStream_t);
template cudaError_t launch_update<128>(const UpdateArgs &, cudaStream_t);

}  // namespace powerattn::cuda::linear
