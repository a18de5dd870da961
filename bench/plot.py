#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Plots what bench_cpu wrote: plot.py results/cpu.csv [out.png]"""
import csv
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    source = sys.argv[1]
    target = sys.argv[2] if len(sys.argv) > 2 else source.rsplit(".", 1)[0] + ".png"
    with open(source, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio"]]  # without what the machine cannot run
    bars = [row for row in rows if row["part"] not in ("length", "phases")]
    lengths = [row for row in rows if row["part"] == "length"]
    figure, axes = plt.subplots(1, 2 if lengths else 1, figsize=(14 if lengths else 8, 1.5 + 0.35 * len(bars)), squeeze=False)
    left = axes[0][0]
    left.barh([row["case"] for row in bars], [float(row["ratio"]) for row in bars])
    left.axvline(1, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.set_xlabel("ratio to sgemm (rates), copies (step) or one thread (scaling)")
    if lengths:
        tokens = [int(row["case"].split(" t")[1].split()[0]) for row in lengths]
        axes[0][1].semilogx(tokens, [float(row["value"]) for row in lengths], "o-", base=2)
        axes[0][1].set_ylim(bottom=0)
        axes[0][1].set_xlabel("tokens")
        axes[0][1].set_ylabel("ns per token and head")
    figure.suptitle(rows[0]["machine"] if rows else "")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    print(target)


if __name__ == "__main__":
    main()
