// SPDX-License-Identifier: Apache-2.0
#define POWERATTN_ISA avx512
#include "kernels/cpu/isa.h"
