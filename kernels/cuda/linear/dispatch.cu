// SPDX-License-Identifier: Apache-2.0
// From the run-time element type and head dimension to an instance.
#include <algorithm>

#include "output.cuh"
#include "update.cuh"

namespace powerattn::cuda::linear {

extern template cudaError_t launch_output<__nv_bfloat16, 64>(const OutputArgs &, cudaStream_t);
extern template cudaError_t launch_update<__nv_bfloat16, 64>(const UpdateArgs &, cudaStream_t);
extern template cudaError_t launch_output<__nv_bfloat16, 128>(const OutputArgs &, cudaStream_t);
extern template cudaError_t launch_update<__nv_bfloat16, 128>(const UpdateArgs &, cudaStream_t);
extern template cudaError_t launch_output<__half, 64>(const OutputArgs &, cudaStream_t);
extern template cudaError_t launch_update<__half, 64>(const UpdateArgs &, cudaStream_t);
extern template cudaError_t launch_output<__half, 128>(const OutputArgs &, cudaStream_t);
extern template cudaError_t launch_update<__half, 128>(const UpdateArgs &, cudaStream_t);

namespace {

template <typename T>
cudaError_t update_type(const UpdateArgs &a, cudaStream_t stream) {
  return a.shape.head_dim == 64    ? launch_update<T, 64>(a, stream)
         : a.shape.head_dim == 128 ? launch_update<T, 128>(a, stream)
                                   : cudaErrorInvalidValue;
}
template <typename T>
cudaError_t output_type(const OutputArgs &a, cudaStream_t stream) {
  return a.shape.head_dim == 64    ? launch_output<T, 64>(a, stream)
         : a.shape.head_dim == 128 ? launch_output<T, 128>(a, stream)
                                   : cudaErrorInvalidValue;
}

}  // namespace

size_t shared_bytes(int64_t head_dim) {
  return head_dim == 64 ? std::max(OutputForm<64>::kShared, UpdateForm<64>::kShared)
                        : std::max(OutputForm<128>::kShared, UpdateForm<128>::kShared);
}
int resident_blocks(int64_t head_dim) {
  return head_dim == 64 ? OutputForm<64>::kBlocksPerSM : OutputForm<128>::kBlocksPerSM;
}

cudaError_t update(const UpdateArgs &a, cudaStream_t stream) {
  return a.shape.half ? update_type<__half>(a, stream) : update_type<__nv_bfloat16>(a, stream);
}
cudaError_t output(const OutputArgs &a, cudaStream_t stream) {
  return a.shape.half ? output_type<__half>(a, stream) : output_type<__nv_bfloat16>(a, stream);
}

}  // namespace powerattn::cuda::linear
