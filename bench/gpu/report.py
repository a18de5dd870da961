# SPDX-License-Identifier: Apache-2.0
"""Judges what bench_gpu and peers.py measured: python3 bench/gpu/report.py [folder] (default bench/results). Reads
gpu.csv and gpu-peers.csv there; prints every target with its measurement, the planner's choice beside the faster form,
the crossovers that it predicts beside the measured ones, and times and memory beside the peers'. Writes gpu-sweep.csv,
which plot.py draws. What was not measured is named, never guessed. Needs nothing but Python."""

import csv
import math
import pathlib
import re
import sys

# Two measurements closer than this are a tie: medians of one run differ by that much.
TIE = 0.02

LONG = "bf16 p2 d64 b1 t65536 h8 gated"
SHARE = "of the in-place rate"
# (what is measured, what, config, limit, unit): a time in ms, or the least share of the in-place rate.
TARGETS = [
    ("p=2 d=64 t=65536, forward", "forward", LONG, 1.0, "ms"),
    ("p=2 d=64 t=65536, forward + backward", "fwd+bwd", LONG, 3.5, "ms"),
    ("p=2 d=128 t=65536, forward", "forward", "bf16 p2 d128 b1 t65536 h8 gated", 5.3, "ms"),
    ("p=2 d=128 t=65536, forward + backward", "fwd+bwd", "bf16 p2 d128 b1 t65536 h8 gated", 18.0, "ms"),
    ("p=2 d=64 t=4096 b=16, forward", "forward", "bf16 p2 d64 b16 t4096 h8 gated", 0.60, "ms"),
    ("p=2 d=64 t=4096 b=16, forward + backward", "fwd+bwd", "bf16 p2 d64 b16 t4096 h8 gated", 2.4, "ms"),
    ("p=2 d=64 t=1024 b=64, forward", "forward", "bf16 p2 d64 b64 t1024 h8 gated", 0.20, "ms"),
    ("p=2 d=64 t=1024 b=64, forward + backward", "fwd+bwd", "bf16 p2 d64 b64 t1024 h8 gated", 0.80, "ms"),
    ("p=1 d=64 t=65536, forward", "forward", "bf16 p1 d64 b1 t65536 h8 gated", 0.30, "ms"),
    ("step, b*h = 8", "step", "f32 state d64 b*h8 tokens1 group1", 0.008, "ms"),
    ("step, b*h = 192", "step", "f32 state d64 b*h192 tokens1 group1", 0.70, SHARE),
    ("step, b*h = 256", "step", "f32 state d64 b*h256 tokens1 group1", 0.80, SHARE),
    ("cuda.sm80 d=64 t=65536, forward", "forward", f"{LONG} only cuda.sm80", 3.0, "ms"),
    ("cuda.sm80 d=64 t=65536, forward + backward", "fwd+bwd", f"{LONG} only cuda.sm80", 9.0, "ms"),
    ("cuda.generic d=64 t=65536, forward", "forward", f"{LONG} only cuda.generic", 5.0, "ms"),
]


def read(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def number(row, key):
    return float((row or {}).get(key) or 0)


def verdict(good):
    return "met" if good else "MISSED"


def judge_targets(rows):
    """(label, measured, limit, unit, verdict), measured None where there is no row."""
    table = {(row["what"], row["config"]): row for row in reversed(rows)}
    in_place = max((number(row, "gbps") for row in rows if row["what"] in ("copy", "in place")), default=0)
    result = []
    for label, what, config, limit, unit in TARGETS:
        row = table.get((what, config))
        if row is None:
            result.append((label, None, limit, unit, "not measured"))
        elif unit == "ms":
            result.append((label, number(row, "ms"), limit, unit, verdict(number(row, "ms") <= limit)))
        elif in_place == 0:
            result.append((label, None, limit, unit, "no in-place rate"))
        else:
            share = number(row, "gbps") / in_place
            result.append((label, share, limit, unit, verdict(share >= limit)))
    return result


# "planner sustained": the planner's choice again at the clock of a long run (bench_gpu --warm).
SWEEP = re.compile(r"bf16 p2 d(\d+) b(\d+) t(\d+) h8 gated (attention|chunked|planner|planner sustained)")
PEER = re.compile(r"bf16 d(\d+) b(\d+) t(\d+) h8")
COLUMNS = (
    "d,b,t,what,attention_ms,chunked_ms,planner_ms,planner_form,predicted_attention_ms,predicted_chunked_ms,"
    "faster_form,planner_right,cudnn_ms,flash_ms,slower_than_cudnn,tflops,share,memory_bytes,cudnn_memory_bytes,"
    "flash_memory_bytes,mhz,sustained_ms,sustained_mhz,cudnn_sustained_ms,sustained_slower_than_cudnn"
).split(",")


def sweep(rows, peers):
    """One line per head_dim, length and direction: COLUMNS, with "" for what was not measured."""
    cells = {}
    for row in rows:
        if match := SWEEP.fullmatch(row["config"]):
            d, b, t = map(int, match.groups()[:3])
            cells.setdefault((d, t, b, row["what"]), {})[match[4]] = row
    softmax = {}
    for row in peers:
        if match := PEER.fullmatch(row["config"]):
            d, b, t = map(int, match.groups())
            softmax[d, t, b, row["what"], row["name"]] = row
    lines = []
    for (d, t, b, what), forms in sorted(
        cells.items(), key=lambda item: (item[0][0], item[0][3] != "forward", item[0])
    ):
        line = dict.fromkeys(COLUMNS, "") | {"d": d, "b": b, "t": t, "what": what}
        for form in ("attention", "chunked"):
            if form in forms:
                line[f"{form}_ms"] = number(forms[form], "ms")
                line[f"predicted_{form}_ms"] = number(forms[form], "predicted_ms")
        if line["attention_ms"] and line["chunked_ms"]:
            line["faster_form"] = min(("attention", "chunked"), key=lambda form: line[f"{form}_ms"])
        if planner := forms.get("planner"):
            line["planner_ms"] = number(planner, "ms")
            line["planner_form"] = planner["form"]
            line |= {key: number(planner, key) for key in ("tflops", "share", "mhz")}
            line["memory_bytes"] = int(number(planner, "memory_bytes"))
            if line["faster_form"]:
                chosen, best = line[f"{planner['form']}_ms"], line[f"{line['faster_form']}_ms"]
                right = planner["form"] == line["faster_form"]
                line["planner_right"] = "yes" if right else "tie" if chosen <= best * (1 + TIE) else "no"
        if held := forms.get("planner sustained"):
            line |= {"sustained_ms": number(held, "ms"), "sustained_mhz": number(held, "mhz")}
        if row := softmax.get((d, t, b, what, "cudnn softmax sustained")):
            line["cudnn_sustained_ms"] = number(row, "ms")
        for name in ("cudnn", "flash"):
            if row := softmax.get((d, t, b, what, f"{name} softmax")):
                line[f"{name}_ms"] = number(row, "ms")
                line[f"{name}_memory_bytes"] = int(number(row, "memory_bytes"))
        for slower, ours, theirs in (
            ("slower_than_cudnn", "planner_ms", "cudnn_ms"),
            ("sustained_slower_than_cudnn", "sustained_ms", "cudnn_sustained_ms"),
        ):
            if line[ours] and line[theirs]:
                line[slower] = "yes" if line[ours] > line[theirs] else "no"
        lines.append(line)
    return lines


def crossover(points):
    """The length from which chunks are faster, from (t, attention, chunked): where the ratio of the two passes 1
    between the last length at which attention was faster and the next one, on logarithmic scales. None where one form
    always wins; the text says which."""
    points = sorted(points)
    if not points:
        return None, "not measured"
    ratio = [math.log(attention / chunked) for _, attention, chunked in points]
    if all(r > 0 for r in ratio):
        return None, f"chunks are faster from {points[0][0]} on"
    if all(r <= 0 for r in ratio):
        return None, f"attention is faster up to {points[-1][0]}"
    last = max(i for i, r in enumerate(ratio) if r <= 0)
    if last + 1 == len(points):
        return None, "no crossover: attention is faster at the longest length"
    a, b = math.log(points[last][0]), math.log(points[last + 1][0])
    t = math.exp(a + (b - a) * -ratio[last] / (ratio[last + 1] - ratio[last]))
    return t, f"{t:.0f}"


def crossovers(lines):
    """(d, what, measured, predicted) as texts."""
    result = []
    for d, what in dict.fromkeys((line["d"], line["what"]) for line in lines):
        here = [
            line
            for line in lines
            if (line["d"], line["what"]) == (d, what) and line["attention_ms"] and line["chunked_ms"]
        ]
        measured = crossover([(x["t"], x["attention_ms"], x["chunked_ms"]) for x in here])[1]
        known = [x for x in here if x["predicted_attention_ms"] and x["predicted_chunked_ms"]]
        predicted = crossover([(x["t"], x["predicted_attention_ms"], x["predicted_chunked_ms"]) for x in known])[1]
        result.append((d, what, measured, predicted))
    return result


def text(value, form="{:.3f}"):
    return form.format(value) if value != "" and value is not None else "-"


SAID = {"yes": "SLOWER", "no": "faster", "": "-"}


def print_table(title, head, rows):
    print(f"\n## {title}")
    if not rows:
        print("not measured")
        return
    table = [head, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    rows, peers = read(folder / "gpu.csv"), read(folder / "gpu-peers.csv")
    if not rows:
        sys.exit(f"{folder / 'gpu.csv'}: no measurements; ./dev gpu-bench makes them")

    seen = [
        (row["what"], row["config"], row.get("implementation") or row.get("name"), text(number(row, "ms"), "{:.3f} ms"))
        for row in rows + peers
        if row["what"] in ("matmul", "copy", "in place")
    ]
    print_table("the machine", ["what", "size", "by", "time"], seen)

    lines = sweep(rows, peers)
    for what in ("forward", "fwd+bwd"):
        shown = [
            (x["d"], x["b"], x["t"], text(x["attention_ms"]), text(x["chunked_ms"]), text(x["planner_ms"]),
             x["planner_form"] or "-", x["planner_right"] or "-", text(x["cudnn_ms"]), text(x["flash_ms"]),
             text(x["cudnn_ms"] / x["planner_ms"] if x["cudnn_ms"] and x["planner_ms"] else "", "{:.2f}"),
             SAID[x["slower_than_cudnn"]], text(x["tflops"], "{:.0f}"), text(x["share"], "{:.0%}"),
             text(x["mhz"] or "", "{:.0f}"))
            for x in lines if x["what"] == what
        ]  # fmt: skip
        head = "d b t attention chunked planner chose right cudnn flash x_cudnn than_cudnn TFLOP/s of_matmul MHz".split()
        print_table(f"every length, {what}, ms", head, shown)
    shown = [
        (x["d"], x["b"], x["t"], x["what"], text(x["sustained_ms"]), text(x["cudnn_sustained_ms"]),
         text(x["cudnn_sustained_ms"] / x["sustained_ms"] if x["sustained_slower_than_cudnn"] else "", "{:.2f}"),
         SAID[x["sustained_slower_than_cudnn"]], text(x["sustained_mhz"] or "", "{:.0f}"))
        for x in lines if x["sustained_ms"]
    ]  # fmt: skip
    head = "d b t what planner cudnn x_cudnn than_cudnn MHz".split()
    print_table("every length under sustained load, ms", head, shown)
    shown = [
        (x["d"], x["b"], x["t"], x["what"], *(text(x[key] / 1e6 if x[key] else "", "{:.0f}") for key in
         ("memory_bytes", "cudnn_memory_bytes", "flash_memory_bytes")))
        for x in lines if x["planner_ms"]
    ]  # fmt: skip
    print_table("peak memory beside the inputs, MB", ["d", "b", "t", "what", "planner", "cudnn", "flash"], shown)
    print_table("crossover to chunks, tokens", ["d", "what", "measured", "predicted"], crossovers(lines))

    table = {(row["what"], row["config"]): row for row in reversed(rows)}
    shown = []
    for row in peers:
        if (match := PEER.fullmatch(row["config"])) and "softmax" not in row["name"]:
            degree = 1 if " p1" in row["name"] else 2
            config = f"bf16 p{degree} d{match[1]} b{match[2]} t{match[3]} h8 gated"
            ours = table.get((row["what"], config))
            shown.append(
                (row["name"], row["what"], row["config"])
                + (text(number(row, "ms")), text(number(ours, "ms") if ours else None))
                + (text(number(row, "ms") / number(ours, "ms") if ours else None, "{:.2f}"),)
                + tuple(text(number(x, "memory_bytes") / 1e6 if x else None, "{:.0f}") for x in (row, ours))
            )
    print_table("other peers", ["peer", "what", "shape", "peer ms", "ours ms", "x", "peer MB", "ours MB"], shown)

    targets = judge_targets(rows)
    shown = [
        (label, "-" if measured is None else f"{measured:.4f}" if unit == "ms" else f"{measured:.1%}",
         f"<= {limit:g} ms" if unit == "ms" else f">= {limit:.0%} {unit}", result)
        for label, measured, limit, unit, result in targets
    ]  # fmt: skip
    print_table("targets", ["", "measured", "target", ""], shown)

    with open(folder / "gpu-sweep.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)

    # One plan serves both directions, so forward + backward is what the planner minimises.
    both = [x for x in lines if x["what"] == "fwd+bwd"]
    count = lambda key, value, where: sum(x[key] == value for x in where)  # noqa: E731
    print("\n## in short")
    met = sum(t[4] == "met" for t in targets)
    missed = sum(t[4] == "MISSED" for t in targets)
    print(f"targets: {met} met, {missed} missed, {len(targets) - met - missed} not measured")
    print(
        f"planner: faster form of forward + backward at {count('planner_right', 'yes', both)} of {len(both)} points, "
        f"{count('planner_right', 'tie', both)} ties within {TIE:.0%}, {count('planner_right', 'no', both)} wrong, "
        f"{count('planner_right', '', both)} not judged"
    )
    for label, key in (
        ("cuDNN softmax", "slower_than_cudnn"),
        ("under sustained load", "sustained_slower_than_cudnn"),
    ):
        print(
            f"{label}: faster than it at {count(key, 'no', lines)} of {len(lines)} points, slower at "
            f"{count(key, 'yes', lines)}, {count(key, '', lines)} not compared"
        )


if __name__ == "__main__":
    main()
