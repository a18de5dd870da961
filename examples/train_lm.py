#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains a small GPT on real text, with power attention or softmax attention, and compares them.

    python examples/train_lm.py                              # softmax, p = 2, 4, 6; three seeds each
    python examples/train_lm.py --attention p4 --text book.txt --steps 2000
    python examples/train_lm.py --gated                      # learned decay in the power layers

Everything but the attention is the same: the parameters, the rotary embedding, the batches of a seed. The default
text is the source of Python's standard library, which every machine has. Writes losses.json, losses.png and one
checkpoint for each kind of attention (for generate.py) below --out.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
import sysconfig
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import power_attention as pa
from power_attention.torch import PowerAttention, PowerAttentionCache

KINDS = ("softmax", "p2", "p4", "p6")


class KeyValueCache:
    """Keys and values of all tokens so far."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.k is None or self.v is None else self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None and self.v is not None:
            k, v = torch.cat((self.k, k), 1), torch.cat((self.v, v), 1)
        self.k, self.v = k, v
        return k, v


class SoftmaxAttention(nn.Module):
    """The layer that PowerAttention replaces: same projections, same rotary embedding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def rotate(self, x: Tensor, start: int) -> Tensor:
        half = self.head_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angle = torch.arange(start, start + x.shape[1], device=x.device)[:, None] * frequency
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * c - b * s, a * s + b * c), -1)

    def make_cache(self, batch: int) -> KeyValueCache:
        return KeyValueCache()

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        b, t, width = x.shape
        start = 0 if cache is None or cache.k is None else cache.k.shape[1]
        q, k, v = (p(x).view(b, t, self.heads, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotate(q, start), self.rotate(k, start)
        if cache is not None:
            k, v = cache.append(k, v)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        causal = t > 1 and k.shape[2] == t
        mask = None
        if t > 1 and not causal:
            mask = torch.ones(t, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - t)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kind: str, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if kind == "softmax":
            self.attention: nn.Module = SoftmaxAttention(width, heads)
        else:
            self.attention = PowerAttention(width, heads, degree=int(kind[1:]), rope="half", gated=gated)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: PowerAttentionCache | KeyValueCache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache=cache)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """A GPT over bytes."""

    def __init__(self, kind: str, layers: int, width: int, heads: int, gated: bool = False) -> None:
        super().__init__()
        self.config = {"kind": kind, "layers": layers, "width": width, "heads": heads, "gated": gated}
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, kind, gated) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                small = name.endswith(("out_proj.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if small else 0.02)
        for block in self.blocks:  # queries and keys of size one: powers of tiny scores learn slowly
            for proj in (block.attention.q_proj, block.attention.k_proj):
                nn.init.normal_(proj.weight, std=1 / math.sqrt(width))

    def make_caches(self, batch: int) -> list[PowerAttentionCache | KeyValueCache]:
        return [block.attention.make_cache(batch) for block in self.blocks]

    def forward(self, tokens: Tensor, caches: list[PowerAttentionCache | KeyValueCache] | None = None) -> Tensor:
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return self.head(self.norm(x))


def read_text(paths: list[pathlib.Path], limit: int) -> bytes:
    """The given files, or the standard library's sources."""
    if not paths:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        paths = sorted(p for p in root.glob("*.py") if p.is_file()) + sorted(root.glob("*/*.py"))
    text = bytearray()
    for path in paths:
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if len(text) < 10000:
        sys.exit(f"the text has {len(text)} bytes; at least 10000 are needed")
    return bytes(text[:limit])


def progress(label: str, step: int, steps: int, loss: float, start: float) -> None:
    """A bar on one line of a terminal, a line now and then in a file."""
    done = (step + 1) / steps
    left = (time.perf_counter() - start) * (1 / done - 1)
    line = f"{label:<18} |{'#' * int(30 * done):<30}| {step + 1:5d}/{steps}  loss {loss:.3f}  {left:4.0f} s left"
    if sys.stderr.isatty():
        print("\r" + line, end="\n" if step + 1 == steps else "", file=sys.stderr, flush=True)
    elif (step + 1) % max(steps // 4, 1) == 0:
        print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, context: int, batches: int) -> float:
    """Loss on the same parts of the held-out text for every model, in nats per byte."""
    starts = torch.linspace(0, len(data) - context - 2, 8 * batches).long()
    losses = []
    for part in starts.split(8):
        x = torch.stack([data[i : i + context + 1] for i in part.tolist()])
        losses.append(F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item())
    return statistics.fmean(losses)


def train(kind: str, seed: int, train_data: Tensor, test_data: Tensor, options: argparse.Namespace) -> dict:
    """One run: the seed gives the parameters and the batches."""
    torch.manual_seed(seed)
    model = LanguageModel(kind, options.layers, options.width, options.heads, options.gated)
    batches = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    curve, start, loss_sum, count = [], time.perf_counter(), 0.0, 0
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / max(options.steps // 20, 1))
        rate = options.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train_data) - options.context - 1, (options.batch,), generator=batches)
        x = torch.stack([train_data[i : i + options.context + 1] for i in starts.tolist()])
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_sum, count = loss_sum + loss.item(), count + 1
        if (step + 1) % max(options.steps // 40, 1) == 0:
            curve.append((step + 1, loss_sum / count))
            loss_sum, count = 0.0, 0
        progress(f"{kind} seed {seed}", step, options.steps, loss.item(), start)
    seconds = time.perf_counter() - start
    result = {"kind": kind, "seed": seed, "curve": curve, "seconds": seconds}
    result["test"] = evaluate(model, test_data, options.context, options.eval_batches)
    if seed == options.seeds[0]:
        torch.save({"config": model.config, "model": model.state_dict()}, options.out / f"{kind}.pt")
    return result


def state_size(kind: str, options: argparse.Namespace, head_dim: int | None = None) -> int:
    """Bytes that one sequence carries from token to token, all layers, in float32."""
    head_dim = head_dim or options.width // options.heads
    if kind == "softmax":
        return 2 * options.layers * options.heads * head_dim * options.context * 4
    return pa.state_bytes(head_dim, int(kind[1:]), count=options.layers * options.heads)


def human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def plot(results: list[dict], settings: dict, path: pathlib.Path) -> None:
    """Training curves, and test losses of all seeds over the states that the models carry."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, ends) = plt.subplots(1, 2, figsize=(10, 4.2))
    kinds = list(dict.fromkeys(r["kind"] for r in results))
    labels = []
    for i, kind in enumerate(kinds):
        mine = [r for r in results if r["kind"] == kind]
        steps = [s for s, _ in mine[0]["curve"]]
        values = [[r["curve"][j][1] for r in mine] for j in range(len(steps))]
        name = "softmax" if kind == "softmax" else f"p = {kind[1:]}"
        curves.plot(steps, [statistics.fmean(v) for v in values], color=f"C{i}", label=name)
        curves.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.15)
        losses = [r["test"] for r in mine]
        ends.plot([i] * len(losses), losses, "o", color=f"C{i}", alpha=0.6)
        ends.plot([i - 0.2, i + 0.2], [statistics.fmean(losses)] * 2, color=f"C{i}", lw=2)
        labels.append(f"{name}\n{human(state_size(kind, argparse.Namespace(**settings)))}")
    curves.set(xlabel="step", ylabel="nats per byte", title="training loss: mean and range over seeds")
    low = min(min(v for _, v in r["curve"]) for r in results)
    curves.set_ylim(low - 0.05, low + 1.0)  # where the curves differ; all start near ln 256
    curves.legend()
    size = "state of a sequence" + (f", cache at context {settings['context']}" if "softmax" in kinds else "")
    ends.set(xticks=range(len(kinds)), xticklabels=labels, title="test loss of each seed, and mean", xlabel=size)
    ends.set_xlim(-0.5, len(kinds) - 0.5)
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attention", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--text", nargs="+", type=pathlib.Path, default=[], help="files to train on")
    parser.add_argument("--limit", type=int, default=4_000_000, help="bytes of text")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--eval-batches", type=int, default=16)
    parser.add_argument("--gated", action="store_true", help="learned decay in the power layers")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 means all")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("lm"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    text = torch.frombuffer(bytearray(read_text(options.text, options.limit)), dtype=torch.uint8).long()
    split = len(text) * 9 // 10
    train_data, test_data = text[:split], text[split:]
    size = sum(p.numel() for p in LanguageModel("softmax", options.layers, options.width, options.heads).parameters())
    print(f"{len(text)} bytes of text, {size} parameters, context {options.context}, {options.steps} steps")

    results = []
    for seed in options.seeds:
        for kind in options.attention:
            results.append(train(kind, seed, train_data, test_data, options))
            settings = {
                k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(options).items() if k != "text"
            }
            (options.out / "losses.json").write_text(json.dumps({"settings": settings, "results": results}))

    head = ("attention", "test loss", "+-", "state, this model", "d=64, 12 x 12 heads, 2 bytes")
    print("\n{:<10} {:>9} {:>6}   {:>18}  {:>29}".format(*head))
    for kind in options.attention:
        losses = [r["test"] for r in results if r["kind"] == kind]
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        here = human(state_size(kind, options))
        if kind == "softmax":
            here, paper = f"{here} at {options.context}", "grows with the context"
        else:
            paper = human(pa.state_bytes(64, int(kind[1:]), count=144, dtype="bfloat16"))
        print(f"{kind:<10} {statistics.fmean(losses):9.4f} {spread:6.4f}   {here:>18}  {paper:>29}")
    plot(results, vars(options), options.out / "losses.png")
    print(f"\ncurves in {options.out / 'losses.png'}, numbers in {options.out / 'losses.json'}")


if __name__ == "__main__":
    main()
