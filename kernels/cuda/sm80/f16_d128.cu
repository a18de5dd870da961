// SPDX-License-Identifier: Apache-2.0
// float16, head_dim 128: attention form of any degree, chunked form of degrees 1 and 2.
#include "instances.cuh"

namespace powerattn {
namespace cuda {
namespace sm80 {
POWERATTN_SM80_INSTANCES(__half, 128)
}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
