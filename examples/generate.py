#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generates text token by token, at a cost that does not grow with the context, and measures it.

    python examples/train_lm.py                       # writes lm/p2.pt and others
    python examples/generate.py --checkpoint lm/p2.pt --prompt "def main("
    python examples/generate.py --measure             # latency and memory against context, with a plot

--measure compares a model with power attention (a state) and the same model with softmax attention (a key/value
cache that grows). Its weights are random: time and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
from train_lm import KeyValueCache, LanguageModel, human


@torch.no_grad()
def generate(model: LanguageModel, prompt: bytes, count: int, temperature: float, seed: int) -> bytes:
    """Reads the prompt in one pass, then one byte at a time."""
    generator = torch.Generator().manual_seed(seed)
    caches = model.make_caches(1)
    logits = model(torch.tensor([list(prompt)]), caches)[0, -1]
    out = bytearray(prompt)
    for _ in range(count):
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        out.append(token)
        logits = model(torch.tensor([[token]]), caches)[0, -1]
    return bytes(out)


@torch.no_grad()
def at_context(model: LanguageModel, length: int, repeats: int) -> tuple[float, float, int]:
    """Median and worst seconds per token after `length` tokens, and the bytes that are carried along."""
    torch.manual_seed(0)
    caches = model.make_caches(1)
    for start in range(0, length, 2048):
        n = min(2048, length - start)
        if isinstance(caches[0], KeyValueCache):  # the values do not matter to the time, so they need no prefill
            for block, cache in zip(model.blocks, caches, strict=True):
                shape = (1, n, block.attention.heads, block.attention.head_dim)
                cache.append(torch.randn(shape), torch.randn(shape))
        else:
            model(torch.randint(256, (1, n)), caches)
    token = torch.randint(256, (1, 1))
    times = []
    for i in range(repeats + 3):
        begin = time.perf_counter()
        model(token, caches)
        if i >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times), max(times), sum(cache.nbytes for cache in caches)


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Latency and memory against context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [r for r in rows if r["kind"] == kind]
        x = [r["context"] for r in mine]
        label = "softmax, key/value cache" if kind == "softmax" else f"power p = {kind[1:]}, state"
        left.plot(x, [1e3 * r["seconds"] for r in mine], marker="o", label=label)
        right.plot(x, [r["bytes"] / 1e6 for r in mine], marker="o", label=label)
    contexts = sorted({r["context"] for r in rows})
    for axes, title, unit in ((left, "time per token", "ms"), (right, "memory carried along", "MB")):
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=unit, title=title)
        axes.set_xticks(contexts, [str(n) for n in contexts])
        axes.xaxis.set_minor_locator(plt.NullLocator())
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measure(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    rows = []
    lengths = [n for n in (256, 1024, 4096, 16384, 65536) if n <= options.max_context]
    print(f"{'attention':<10} {'context':>8} {'ms per token':>13} {'carried':>10}")
    for kind in options.kinds:
        model = LanguageModel(kind, options.layers, options.width, options.heads).eval()
        for length in lengths:
            median, worst, size = at_context(model, length, options.repeats)
            rows.append({"kind": kind, "context": length, "seconds": median, "worst": worst, "bytes": size})
            print(f"{kind:<10} {length:8d} {1e3 * median:13.3f} {human(size):>10}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "generate.json").write_text(json.dumps(rows))
    plot(rows, options.out / "generate.png")
    print(f"plot in {options.out / 'generate.png'}, numbers in {options.out / 'generate.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, help="written by train_lm.py")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=["softmax", "p2"], choices=["softmax", "p2", "p4"])
    parser.add_argument("--max-context", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("lm"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; a token of a small model fills no more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure(options)
    elif options.checkpoint:
        saved = torch.load(options.checkpoint, weights_only=True)
        model = LanguageModel(**saved["config"]).eval()
        model.load_state_dict(saved["model"])
        begin = time.perf_counter()
        text = generate(model, options.prompt.encode() or b"\n", options.tokens, options.temperature, options.seed)
        seconds = time.perf_counter() - begin
        print(text.decode(errors="replace"))
        print(f"{1e3 * seconds / max(options.tokens, 1):.2f} ms per token", file=sys.stderr)
    else:
        parser.error("give --checkpoint, or --measure")


if __name__ == "__main__":
    main()
