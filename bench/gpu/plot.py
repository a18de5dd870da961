# SPDX-License-Identifier: Apache-2.0
"""Draws what bench/gpu/report.py judged: python3 bench/gpu/plot.py [folder with gpu-sweep.csv [folder for the plots]].
gpu-time.svg: milliseconds against tokens per sequence, both forms, the planner's choice and softmax through cuDNN and
FlashAttention; gpu-speedup.svg: how many times faster the planner's choice is than each. Needs matplotlib."""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import read

SERIES = [  # column, label, style
    ("attention_ms", "power p=2, attention form", {"color": "tab:blue", "linestyle": "--", "linewidth": 1}),
    ("chunked_ms", "power p=2, chunked form", {"color": "tab:cyan", "linestyle": "--", "linewidth": 1}),
    ("planner_ms", "power p=2, as planned", {"color": "tab:blue", "marker": "o"}),
    ("cudnn_ms", "softmax, cuDNN", {"color": "tab:green", "marker": "s"}),
    ("flash_ms", "softmax, FlashAttention", {"color": "tab:orange", "marker": "^"}),
]


def series(rows, d, what, column):
    """[(t, value)] of the lengths at which the column was measured."""
    points = [(int(r["t"]), float(r[column])) for r in rows if (int(r["d"]), r["what"]) == (d, what) and r[column]]
    return sorted(points)


def figure(rows, title, ylabel, draw):
    dims = sorted({int(row["d"]) for row in rows})
    fig, axes = plt.subplots(len(dims), 2, figsize=(11, 4.2 * len(dims)), sharex=True, sharey=True, squeeze=False)
    for line, d in zip(axes, dims):
        for axis, what in zip(line, ("forward", "fwd+bwd")):
            draw(axis, d, what)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(f"{'forward' if what == 'forward' else 'forward + backward'}, head_dim {d}")
            axis.grid(True, which="major", alpha=0.3)
        line[0].set_ylabel(ylabel)
    for axis in axes[-1]:
        axis.set_xlabel("tokens per sequence (at least 65536 in all, 8 heads)")
    axes[0][0].legend(fontsize=8)
    fig.suptitle(title)
    fig.tight_layout()
    return fig


def main():
    source = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    target = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else source
    rows = read(source / "gpu-sweep.csv")
    if not rows:
        sys.exit(f"{source / 'gpu-sweep.csv'}: no measurements; ./dev gpu-bench makes them")

    def times(axis, d, what):
        for column, label, style in SERIES:
            if points := series(rows, d, what, column):
                axis.plot(*zip(*points), label=label, **style)

    def speedups(axis, d, what):
        ours = dict(series(rows, d, what, "planner_ms"))
        for column, label, style in SERIES[3:]:
            if points := [(t, ms / ours[t]) for t, ms in series(rows, d, what, column) if t in ours]:
                axis.plot(*zip(*points), label=f"against {label}", **style)
        axis.axhline(1, color="black", linewidth=0.8)

    for name, title, ylabel, draw in (
        ("gpu-time.svg", "Power attention and softmax attention, bfloat16, causal", "milliseconds", times),
        ("gpu-speedup.svg", "Speed-up of power attention (p=2) over softmax attention", "times faster", speedups),
    ):
        figure(rows, title, ylabel, draw).savefig(target / name)
        print(target / name)


if __name__ == "__main__":
    main()
