// SPDX-License-Identifier: Apache-2.0
// From the run-time head dimension to an instance.
#include <algorithm>

#include "output.cuh"
#include "update.cuh"

namespace powerattn::cuda::linear {

extern template cudaError_t launch_output<64>(const OutputArgs &, cudaStream_t);
extern template cudaError_t launch_output<128>(const OutputArgs &, cudaStream_t);
extern template cudaError_t launch_update<64>(const UpdateArgs &, cudaStream_t);
extern template cudaError_t launch_update<128>(const UpdateArgs &, cudaStream_t);

size_t shared_bytes(int64_t head_dim) {
  return head_dim == 64 ? std::max(OutputForm<64>::kShared, UpdateForm<64>::kShared)
                        : std::max(OutputForm<128>::kShared, UpdateForm<128>::kShared);
}
int resident_blocks(int64_t head_dim) {
  return head_dim == 64 ? OutputForm<64>::kBlocksPerSM : OutputForm<128>::kBlocksPerSM;
}

cudaError_t update(const UpdateArgs &a, cudaStream_t stream) {
  return a.shape.head_dim == 64    ? launch_update<64>(a, stream)
         : a.shape.head_dim == 128 ? launch_update<128>(a, stream)
                                   : cudaErrorInvalidValue;
}
cudaError_t output(const OutputArgs &a, cudaStream_t stream) {
  return a.shape.head_dim == 64    ? launch_output<64>(a, stream)
         : a.shape.head_dim == 128 ? launch_output<128>(a, stream)
                                   : cudaErrorInvalidValue;
}

}  // namespace powerattn::cuda::linear
