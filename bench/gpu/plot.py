# SPDX-License-Identifier: Apache-2.0
"""Draws time against sequence length from bench/results/gpu.csv and gpu-peers.csv: python3 bench/gpu/plot.py [folder].
Writes gpu-d64.svg and gpu-d128.svg beside them. Needs matplotlib."""

import collections
import csv
import pathlib
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file)) if path.exists() else []


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    lines = collections.defaultdict(dict)  # (what, d, label) -> {t: ms}
    for row in read(folder / "gpu.csv"):
        match = re.fullmatch(r"bf16 p2 d(\d+) b\d+ t(\d+) h8 gated (attention|chunked)", row["config"])
        if match:
            lines[row["what"], int(match[1]), f"power p=2, {match[3]}"][int(match[2])] = float(row["ms"])
    if (folder / "gpu-peers.csv").exists():
        for row in read(folder / "gpu-peers.csv"):
            match = re.fullmatch(r"bf16 d(\d+) b\d+ t(\d+) h8", row["config"])
            if match:
                lines[row["what"], int(match[1]), row["name"]][int(match[2])] = float(row["ms"])
    for d in sorted({key[1] for key in lines}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
        for axis, what in zip(axes, ("forward", "fwd+bwd")):
            for (kind, dim, label), points in sorted(lines.items()):
                if kind == what and dim == d:
                    at = sorted(points)
                    axis.plot(at, [points[t] for t in at], marker="o", label=label)
            axis.set(xscale="log", yscale="log", xlabel="tokens per sequence (65536 in all)", title=f"{what}, d = {d}")
            axis.grid(True, which="both", alpha=0.3)
        axes[0].set_ylabel("milliseconds")
        axes[0].legend()
        figure.tight_layout()
        figure.savefig(folder / f"gpu-d{d}.svg")
        print(folder / f"gpu-d{d}.svg")


if __name__ == "__main__":
    main()
