# SPDX-License-Identifier: Apache-2.0
# The GPU benchmark, in about nine minutes: the device's matrix-multiply rate and copy bandwidth, the library, and the
# installed peers, in one run. Writes gpu.csv (ours and the ceilings), gpu-peers.csv, and what report.py made of both
# (gpu-sweep.csv, gpu-report.txt) into bench/results; bench/gpu/plot.py draws. Arguments go to bench_gpu (sections,
# --only TEXT, --quick). GPU_BUILD: a folder that holds bench_gpu already (default: build it here). GPU_RESULTS: where the
# tables go. GPU_PEERS_ARGS: arguments of peers.py. GPU_SECONDS: time for the whole, the build not counted (default 570).
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${GPU_BUILD:-}
if [ -z "$build" ]; then
  build=${POWERATTN_BUILD:-build}/gpu
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_CUDA=ON -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DCMAKE_CUDA_ARCHITECTURES=native >/dev/null
  cmake --build "$build" -j "${POWERATTN_JOBS:-$(nproc)}" --target bench_gpu
fi
program=$build/tests/gpu/bench_gpu
[ -x "$program" ] || program=$build/bench_gpu
results=${GPU_RESULTS:-bench/results}
mkdir -p "$results"
SECONDS=0
total=${GPU_SECONDS:-570}
left() { echo $((total - SECONDS > 1 ? total - SECONDS : 1)); }
status=0

# part LABEL SECONDS COMMAND...: a part that fails or hangs leaves the others their time; what it wrote until then counts.
part() {
  local label=$1 limit=$2 code=0
  shift 2
  timeout "$limit" "$@" || code=$?
  if [ "$code" -eq 77 ]; then exit 77; fi  # no device
  if [ "$code" -ne 0 ]; then
    echo "== $label: failed ($code)"
    status=1
  fi
}

rm -f "$results/gpu.csv" "$results/gpu-peers.csv"
part bench_gpu 240 "$program" --csv "$results/gpu.csv" --seconds $((total * 2 / 5)) "$@"
# Without arguments, also the rows that have targets of their own and that the planner passes over on this device.
if [ $# -eq 0 ] && [ -z "${POWERATTN_CUDA_IMPLEMENTATION:-}" ]; then
  for row in cuda.sm80 cuda.generic; do
    part "$row" 40 env POWERATTN_CUDA_IMPLEMENTATION=$row "$program" targets --only 'p2 d64 b1 ' --label "only $row" \
      --csv "$results/gpu.csv" --append
  done
fi
# The planner's choice after 0.4 s of load, when the device is at its power cap.
if [ $# -eq 0 ]; then
  part "sustained" 70 "$program" sweep --only planner --warm 400 --label sustained --csv "$results/gpu.csv" --append
fi
if python3 -c 'import torch' 2>/dev/null; then
  # shellcheck disable=SC2086
  part peers "$(left)" python3 bench/gpu/peers.py --csv "$results/gpu-peers.csv" --seconds $(($(left) - 70)) \
    ${GPU_PEERS_ARGS:-}
  if [ $# -eq 0 ]; then
    part "peers, sustained" 65 python3 bench/gpu/peers.py --csv "$results/gpu-peers.csv" --append --only cudnn \
      --warm 400 --seconds 60
  fi
else
  echo "peers: PyTorch is not installed here; only the library was measured"
fi
python3 bench/gpu/report.py "$results" | tee "$results/gpu-report.txt"
exit "$status"
