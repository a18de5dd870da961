// SPDX-License-Identifier: Apache-2.0
// From runtime type, head dimension and degree to an instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "args.h"
#include "shapes.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

template <typename T, int D, int P>
cudaError_t launch_output(const OutputArgs &, cudaStream_t);
template <typename T, int D, int P>
cudaError_t launch_gradient(const GradientArgs &, cudaStream_t);
template <typename T, int D, int P>
cudaError_t launch_update(const UpdateArgs &, cudaStream_t);

namespace {

template <int D>
cudaError_t output_d(const OutputArgs &a, cudaStream_t stream) {
  const bool square = a.shape.degree == 2;
  if (a.shape.dtype == Dtype::kFloat16)
    return square ? launch_output<__half, D, 2>(a, stream) : launch_output<__half, D, 0>(a, stream);
  if (a.shape.degree == 1) return launch_output<__nv_bfloat16, D, 1>(a, stream);
  return square ? launch_output<__nv_bfloat16, D, 2>(a, stream) : launch_output<__nv_bfloat16, D, 0>(a, stream);
}

template <int D>
cudaError_t gradient_d(const GradientArgs &a, cudaStream_t stream) {
  const bool square = a.shape.degree == 2;
  if (a.shape.dtype == Dtype::kFloat16)
    return square ? launch_gradient<__half, D, 2>(a, stream) : launch_gradient<__half, D, 0>(a, stream);
  if (a.shape.degree == 1) return launch_gradient<__nv_bfloat16, D, 1>(a, stream);
  return square ? launch_gradient<__nv_bfloat16, D, 2>(a, stream)
                : launch_gradient<__nv_bfloat16, D, 0>(a, stream);
}

template <int D>
cudaError_t update_d(const UpdateArgs &a, cudaStream_t stream) {
  if (a.as_z || a.shape.degree == 1) return launch_update<__nv_bfloat16, D, 1>(a, stream);
  return launch_update<__nv_bfloat16, D, 2>(a, stream);
}

}  // namespace

size_t shared_bytes(int64_t head_dim) {
  auto most = [](int a, int b, int c) { return static_cast<size_t>(std::max(a, std::max(b, c))); };
  switch (head_dim) {
    case 32:
      return most(GradientShape<32>::kShared, OutputShape<32>::kShared, UpdateShape<32, 2>::kShared);
    case 64:
      return most(GradientShape<64>::kShared, OutputShape<64>::kShared, UpdateShape<64, 2>::kShared);
    default:
      return most(GradientShape<128>::kShared, OutputShape<128>::kShared, UpdateShape<128, 2>::kShared);
  }
}

cudaError_t output(const OutputArgs &a, cudaStream_t stream) {
  switch (a.shape.head_dim) {
    case 32:
      return output_d<32>(a, stream);
    case 64:
      return output_d<64>(a, stream);
    case 128:
      return output_d<128>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t gradient(const GradientArgs &a, cudaStream_t stream) {
  switch (a.shape.head_dim) {
    case 32:
      return gradient_d<32>(a, stream);
    case 64:
      return gradient_d<64>(a, stream);
    case 128:
      return gradient_d<128>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t update(const UpdateArgs &a, cudaStream_t stream) {
  if (a.shape.dtype != Dtype::kBfloat16) return cudaErrorInvalidValue;
  switch (a.shape.head_dim) {
    case 32:
      return update_d<32>(a, stream);
    case 64:
      return update_d<64>(a, stream);
    case 128:
      return update_d<128>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
