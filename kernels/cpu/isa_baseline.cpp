// SPDX-License-Identifier: Apache-2.0
#define POWERATTN_ISA baseline
#include "kernels/cpu/isa.h"
