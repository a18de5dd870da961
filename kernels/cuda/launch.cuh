// SPDX-License-Identifier: Apache-2.0
// How every kernel is launched, and how it names its dynamic shared memory: plain CUDA without syntax of its
// own, so that a C++ compiler builds the same sources for the emulator of tests/emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace powerattn::cuda {

template <class... P, class... A>
cudaError_t launch_with(cudaLaunchAttribute *attribute, void (*kernel)(P...), dim3 grid, dim3 block,
                        size_t shared, cudaStream_t stream, A &&...args) {
  if (shared > 48 * 1024) {
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute != nullptr ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

// Raises the dynamic shared memory limit of a kernel where needed, then launches it. An error is also what
// cudaGetLastError says, for a caller that launches several kernels.
template <class... P, class... A>
cudaError_t launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                          A &&...args) {
  return launch_with(nullptr, kernel, grid, block, shared, stream, std::forward<A>(args)...);
}

// The same for a kernel of sm_90 whose every thread begins with ptx::wait_for_kernel_before: its blocks take
// their places while the last ones of the kernel before still run.
template <class... P, class... A>
cudaError_t launch_early(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                         A &&...args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(&attribute, kernel, grid, block, shared, stream, std::forward<A>(args)...);
}

}  // namespace powerattn::cuda
