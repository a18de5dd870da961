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

template <typename T, int D>
cudaError_t output_d(const OutputArgs &a, cudaStream_t stream) {
  switch (a.shape.degree) {
    case 1:
      return launch_output<T, D, 1>(a, stream);
    case 2:
      return launch_output<T, D, 2>(a, stream);
    default:
      return launch_output<T, D, 0>(a, stream);
  }
}

template <typename T, int D>
cudaError_t gradient_d(const GradientArgs &a, cudaStream_t stream) {
  switch (a.shape.degree) {
    case 1:
      return launch_gradient<T, D, 1>(a, stream);
    case 2:
      return launch_gradient<T, D, 2>(a, stream);
    default:
      return launch_gradient<T, D, 0>(a, stream);
  }
}

template <typename T, int D>
cudaError_t update_d(const UpdateArgs &a, cudaStream_t stream) {
  if (a.as_z || a.shape.degree == 1) return launch_update<T, D, 1>(a, stream);
  return launch_update<T, D, 2>(a, stream);
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
  const bool half = a.shape.dtype == Dtype::kFloat16;
  switch (a.shape.head_dim) {
    case 32:
      return half ? output_d<__half, 32>(a, stream) : output_d<__nv_bfloat16, 32>(a, stream);
    case 64:
      return half ? output_d<__half, 64>(a, stream) : output_d<__nv_bfloat16, 64>(a, stream);
    case 128:
      return half ? output_d<__half, 128>(a, stream) : output_d<__nv_bfloat16, 128>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t gradient(const GradientArgs &a, cudaStream_t stream) {
  const bool half = a.shape.dtype == Dtype::kFloat16;
  switch (a.shape.head_dim) {
    case 32:
      return half ? gradient_d<__half, 32>(a, stream) : gradient_d<__nv_bfloat16, 32>(a, stream);
    case 64:
      return half ? gradient_d<__half, 64>(a, stream) : gradient_d<__nv_bfloat16, 64>(a, stream);
    case 128:
      return half ? gradient_d<__half, 128>(a, stream) : gradient_d<__nv_bfloat16, 128>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t update(const UpdateArgs &a, cudaStream_t stream) {
  const bool half = a.shape.dtype == Dtype::kFloat16;
  switch (a.shape.head_dim) {
    case 32:
      return half ? update_d<__half, 32>(a, stream) : update_d<__nv_bfloat16, 32>(a, stream);
    case 64:
      return half ? update_d<__half, 64>(a, stream) : update_d<__nv_bfloat16, 64>(a, stream);
    case 128:
      return half ? update_d<__half, 128>(a, stream) : update_d<__nv_bfloat16, 128>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
