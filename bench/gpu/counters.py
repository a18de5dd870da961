# SPDX-License-Identifier: Apache-2.0
"""What limits each kernel, from hardware counters: reads ncu's CSV (scripts/gpu-counters.sh), prints a table.

Each number is a share of the peak rate in percent: of the tensor cores (cycles in which they work), of the issue
slots, of the pipe between registers and shared memory, of the L2 cache and of device memory. A kernel near 100 in one
of them is limited by it; one near none of them waits for latencies.
"""

import csv
import re
import sys

METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__pipe_shared_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed": "issue",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": "shared",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "lts__t_sector_hit_rate.pct": "L2 hits",
}


def short(kernel):
    """`output64_kernel<__nv_bfloat16, 2>` out of a demangled name with its arguments."""
    name = re.sub(r"\(.*", "", re.sub(r"\(anonymous namespace\)::|<unnamed>::|unnamed>::", "", kernel))
    return re.sub(r"^void |\b(powerattn|cuda|sm80|sm90|joint|linear)::", "", name)


def read(lines):
    """{(case, kernel): {column: number}}, of the first launch of each kernel; a line `=== NAME` begins a case."""
    case, header, rows, launch = "", None, {}, {}
    for line in lines:
        if line.startswith("==="):
            case, launch = line[3:].strip(), {}
            continue
        if not line.startswith('"'):
            continue
        cells = next(csv.reader([line]))
        if cells[0] == "ID":
            header = cells
            continue
        cell = dict(zip(header, cells))
        key = (case, short(cell["Kernel Name"]))
        if launch.setdefault(key, cell["ID"]) != cell["ID"] or cell["Metric Name"] not in METRICS:
            continue
        value = float(cell["Metric Value"].replace(",", ""))
        if cell["Metric Unit"] in ("ns", "nsecond"):
            value /= 1000
        rows.setdefault(key, {})[METRICS[cell["Metric Name"]]] = value
    return rows


def main():
    rows = read(sys.stdin)
    columns = list(METRICS.values())
    print(f"{'':46}" + "".join(f"{c:>9}" for c in columns))
    last = None
    for (case, kernel), values in rows.items():
        if case != last:
            print(case)
            last = case
        print(f"  {kernel:44}" + "".join(f"{values.get(c, float('nan')):9.1f}" for c in columns))


if __name__ == "__main__":
    main()
