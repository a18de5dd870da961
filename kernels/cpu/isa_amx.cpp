// SPDX-License-Identifier: Apache-2.0
// AVX-512 with bfloat16 tiles for the products with states.
#define POWERATTN_ISA amx
#define POWERATTN_VECTOR_BYTES 64
#define POWERATTN_AMX 1
#include "kernels/cpu/isa.h"
