# SPDX-License-Identifier: Apache-2.0
# The CUDA part. `cuda_test` needs no GPU: it compiles every kernel, reads what the compiler said about each, runs what a
# library with the backend must do on a machine without a device, and runs the kernels on an emulated device.
# `cuda_gpu_test` and `cuda_gpu_bench` need a real one.

CUDA_BUILD=$BUILD/cuda
EMULATION_BUILD=$BUILD/emulation

cuda_setup() {
  need_build_tools
  need_apt doctest-dev binutils
  need_toolkit
}

# The backend must link nothing of CUDA: no driver, no runtime, no cuBLAS.
cuda_needs_no_library() {
  ! readelf -d "$CUDA_BUILD/libpowerattn.so" | grep NEEDED | grep -Ei 'cuda|cublas|nvrtc|nvidia'
}

# Register spills and wgmma serialisation (ptxas warnings C75xx) in the compiler's report, by kernel. Spills that are
# listed in kernels/cuda/known_spills.txt, and no larger, are let through.
cuda_report_is_clean() {
  local bad
  bad=$(awk 'FNR == NR { if (NF == 2 && !/^#/) allowed[$1] = $2; next }
             /Compiling entry function/ { name = $0; sub(/.*entry function ./, "", name); sub(/. for .*/, "", name) }
             /spill stores/ {
               most = 0
               for (i = 2; i <= NF; i++) if ($i ~ /^bytes/ && $(i - 1) + 0 > most) most = $(i - 1) + 0
               limit = 0
               for (part in allowed) if (index(name, part) && allowed[part] > limit) limit = allowed[part]
               spill = !/ 0 bytes spill stores, 0 bytes spill loads/
               if (spill && most > limit) print name ": " $0
             }
             /C75[0-9][0-9]/ { print }' kernels/cuda/known_spills.txt "$1")
  [ -z "$bad" ] || { echo "$bad" | c++filt; return 1; }
}

# A CUDA plan where there is no device: a status and a message, and the CPU goes on working.
cuda_without_device() {
  cat >"$CUDA_BUILD/no_device.c" <<'C'
#include <stdio.h>
#include <string.h>
#include "power_attention.h"
int main(void) {
  int32_t count = -1;
  powerattn_desc d;
  powerattn_plan *plan = 0;
  memset(&d, 0, sizeof d);
  d.struct_size = sizeof d;
  d.device_type = POWERATTN_CUDA;
  d.dtype = POWERATTN_BFLOAT16;
  d.degree = 2;
  d.batch = d.seq_len = d.heads_q = d.heads_kv = 1;
  d.head_dim = 64;
  if (powerattn_device_count(POWERATTN_CUDA, &count) != POWERATTN_OK || count != 0) return 1;
  if (powerattn_plan_create(&d, &plan) != POWERATTN_ERROR_NO_DEVICE || plan) return 2;
  if (!*powerattn_last_error()) return 3;
  d.device_type = POWERATTN_CPU;
  d.dtype = POWERATTN_FLOAT32;
  if (powerattn_plan_create(&d, &plan) != POWERATTN_OK || !plan) return 4;
  powerattn_plan_destroy(plan);
  return 0;
}
C
  cc -Iinclude "$CUDA_BUILD/no_device.c" -o "$CUDA_BUILD/no_device" -L"$CUDA_BUILD" -lpowerattn -Wl,-rpath,"$CUDA_BUILD"
  CUDA_VISIBLE_DEVICES='' "$CUDA_BUILD/no_device"
}

cuda_test() {
  cmake_build "$CUDA_BUILD" -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_CUDA=ON -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DPOWERATTN_BUILD_BENCH=OFF -DCMAKE_CUDA_FLAGS="-Xptxas=-v"
  cuda_report
  local kernels
  kernels=$(grep -c 'Compiling entry function' "$CUDA_BUILD/ptxas.txt" || true)
  say "$kernels kernels compiled"
  check "the compiler reported on every kernel" test "$kernels" -ge 100
  check "no kernel serialises its matrix instructions" cuda_no_serialisation
  check "no kernel spills registers" cuda_no_spills
  check "the library loads without CUDA libraries" cuda_needs_no_library
  check "a CUDA plan without a device is refused with a message" cuda_without_device
  check "the GPU benchmark's report judges as it should" python3 -m unittest discover -s bench/gpu
  cuda_emulated
}

# The kernels as C++ on the device of tests/emulation, against the float64 oracles.
cuda_emulated() {
  TARGETS="test_emulation test_gpu_cases test_gpu_long test_plan test_tensor_map sm80_kernels" cmake_build "$EMULATION_BUILD" \
    -DCMAKE_BUILD_TYPE=Release \
    -DPOWERATTN_CUDA=EMULATED -DPOWERATTN_BUILD_EXAMPLES=OFF -DPOWERATTN_BUILD_BENCH=OFF
  run_counted ctest ctest --test-dir "$EMULATION_BUILD" -L emulation -j "$JOBS" --output-on-failure
}

# The compiler's report on every kernel, into ptxas.txt: each .cu file once more with the very command of the build, through
# the compiler cache, which keeps what a command printed, so that a file that was just built costs nothing.
cuda_report() {
  local command
  : >"$CUDA_BUILD/ptxas.txt"
  while read -r -d '' command; do
    (cd "$CUDA_BUILD" && eval "$command") >>"$CUDA_BUILD/ptxas.txt" 2>&1 || {
      tail -n 20 "$CUDA_BUILD/ptxas.txt"
      return 1
    }
  done < <(ninja -C "$CUDA_BUILD" -t compdb | python3 -c '
import json, sys

text = sys.stdin.read()
for entry in json.loads(text[text.index("["):]):
    if entry["file"].endswith(".cu"):
        sys.stdout.write(entry["command"] + "\0")
')
}
cuda_no_serialisation() { ! grep -E 'C75[0-9][0-9]' "$CUDA_BUILD/ptxas.txt"; }
cuda_no_spills() { cuda_report_is_clean "$CUDA_BUILD/ptxas.txt"; }

cuda_gpu_test() { bash scripts/gpu-test.sh "$@"; }
cuda_gpu_bench() { bash scripts/gpu-bench.sh "$@"; }
