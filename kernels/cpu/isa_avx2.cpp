// SPDX-License-Identifier: Apache-2.0
#define POWERATTN_ISA avx2
#define POWERATTN_VECTOR_BYTES 32
#include "kernels/cpu/isa.h"
