// SPDX-License-Identifier: Apache-2.0
#define POWERATTN_ISA baseline
#define POWERATTN_VECTOR_BYTES 16
#include "kernels/cpu/isa.h"
