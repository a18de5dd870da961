# SPDX-License-Identifier: Apache-2.0
# What limits each kernel: counters of Nsight Compute (ncu) over the shapes with targets, one launch of every kernel. Clocks
# are left alone. Writes bench/results/gpu-counters.txt. GPU_BUILD: a folder that holds bench_gpu already.
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${GPU_BUILD:-${POWERATTN_BUILD:-build}/gpu}
program=$build/tests/gpu/bench_gpu
[ -x "$program" ] || program=$build/bench_gpu
results=${GPU_RESULTS:-bench/results}
command -v ncu >/dev/null || { echo "gpu-counters: ncu (Nsight Compute) is not on the path" >&2; exit 1; }
metrics=$(sed -n 's/^    "\([a-z0-9_]*__[^"]*\)": .*/\1/p' bench/gpu/counters.py | paste -sd,)
{
  echo "# libpowerattn GPU counters, $(date -u +%Y-%m-%d), $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
  echo "# shares of peak rates in percent (bench/gpu/counters.py); ncu flushes the caches before each launch"
  for shape in 'p2 d64 b1 t65536' 'p2 d128 b1 t65536' 'p2 d64 b16 t4096' 'p2 d64 b64 t1024' 'p2 d128 b16 t4096' 'p1 d64 b1'; do
    echo "=== $shape"
    timeout 90 ncu --clock-control none --csv --metrics "$metrics" -c 60 \
      -k 'regex:output|update|joint|gradient|tiles|z_kernel|scan|rows|delta|begin|boundary|gates' \
      "$program" targets --only "$shape" --quick --seconds 6 2>&1 | grep '^"' ||
      echo "gpu-counters: '$shape' failed or was cut off" >&2
  done | python3 bench/gpu/counters.py
} | tee "$results/gpu-counters.txt"
