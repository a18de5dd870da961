// SPDX-License-Identifier: Apache-2.0
#define POWERATTN_ISA avx512
#define POWERATTN_VECTOR_BYTES 64
#include "kernels/cpu/isa.h"
