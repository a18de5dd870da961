// SPDX-License-Identifier: Apache-2.0
#define POWERATTN_ISA avx2
#include "kernels/cpu/isa.h"
