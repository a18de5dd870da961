#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Cost of the Python layers on the CPU: over the C call, and against the same formula in eager PyTorch.

    python bindings/python/bench/bench.py [--json results.json] [--device cuda]

With a GPU: what a step call costs the host over the C call, since the rest is the GPU's time.

All ratios are of calls that alternate within one run, best of several, so that a busy machine changes both sides.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable

import torch

import power_attention as pa
from power_attention._plan import Options, native
from power_attention.torch import PowerAttentionState, _native, power_attention, step


class Tensor(ctypes.Structure):
    """powerattn_tensor."""

    _fields_ = (("data", ctypes.c_void_p), ("b", ctypes.c_int64), ("t", ctypes.c_int64), ("h", ctypes.c_int64))


class State(ctypes.Structure):
    """powerattn_state."""

    _fields_ = (("s", ctypes.c_void_p), ("z", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("a", "b", "c", "d")))


class StepArgs(ctypes.Structure):
    """powerattn_step_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        *((n, Tensor) for n in ("q", "k", "v", "log_g", "y")),
        ("state", State),
        ("num_slots", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("slots", "lengths", "rope_offset", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


def alternate(
    calls: dict[str, Callable[[], object]], repeats: int, inner: int = 1, settle: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Best seconds of each, the calls taking turns; ``settle`` is called before every turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            settle()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / inner)
    return best


def step_overhead(device: str) -> dict[str, float]:
    """A step through each Python entry against the C function on a prepared struct.

    On a GPU a turn's launches only queue up, and what is timed is the host's part of them.
    """
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 1, 1, 8, device=device) for _ in range(3))
    state = PowerAttentionState(1, 1, 8, device=device)
    plan = _native.get_plan(q, v, 0, True, state._options, 1)
    y = torch.empty_like(q)
    work, _work = _native.workspace(plan.workspace_step, q)
    args = StepArgs(struct_size=ctypes.sizeof(StepArgs), num_slots=1, workspace=work)
    args.workspace_bytes = plan.workspace_step
    for name, x in (("q", q), ("k", k), ("v", v), ("y", y)):
        setattr(args, name, Tensor(*_native.tensor_numbers(x)))
    if device == "cuda":
        args.stream = torch.cuda.current_stream().cuda_stream
    args.state = State(*_native.state_numbers(state.s, state.z))
    function = ctypes.CDLL(native.__file__).powerattn_step
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    address = ctypes.addressof(args)
    with torch.no_grad():
        slots = torch.tensor([0], device=device)
        calls = {
            "c": lambda: function(plan.handle, address),
            "pool": lambda: state.step(q, k, v),
            "pool with slots": lambda: state.step(q, k, v, slots=slots),
            "function": lambda: step(q, k, v, (state.s, state.z)),
        }
        settle = torch.cuda.synchronize if device == "cuda" else lambda: None
        return alternate(calls, 2000, 20, settle)  # short turns: a busy machine leaves some of them alone


def against_c(t: int, threads: int) -> dict[str, float]:
    """power_attention on torch tensors against the C call into prepared outputs."""
    torch.set_num_threads(threads)
    q, k, v = (torch.randn(1, t, 8, 64) for _ in range(3))
    plan = _native.get_plan(q, v, 0, False, Options())
    y, norm = torch.empty_like(q), torch.empty(1, t, 8)
    work, _work = _native.workspace(plan.workspace_forward, q)
    numbers = _native.tensor_numbers
    args = (
        plan.handle, *numbers(q), *numbers(k), *numbers(v), 0, 0, 0, 0, *numbers(y), *numbers(norm),
        *(0,) * 12, 0, 0, 0, 0, work, plan.workspace_forward, 0,
    )  # fmt: skip
    calls = {"c": lambda: native.forward(*args), "python": lambda: power_attention(q, k, v)}
    best = alternate(calls, 9)
    return {**best, "ratio": best["python"] / best["c"]}


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, degree: int) -> torch.Tensor:
    """The formula, as one writes it in PyTorch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    total = g.cumsum(1).transpose(1, 2)
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~mask, float("-inf")).exp()
    w = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5) ** degree * decay
    return ((w @ v) / w.sum(-1, keepdim=True)).transpose(1, 2)


def against_eager(t: int, degree: int, threads: int) -> dict[str, float]:
    """Forward, and forward with backward."""
    torch.set_num_threads(threads)
    q, k, v = (torch.randn(1, t, 4, 64, requires_grad=True) for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(1, t, 4) + 4).requires_grad_()
    dy = torch.randn(1, t, 4, 64)

    def train(function: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(function(q, k, v), (q, k, v, g), dy)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return power_attention(q, k, v, log_g=g, degree=degree)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return eager(q, k, v, g, degree)

    error = (ours(q, k, v) - theirs(q, k, v)).abs().max().item()
    with torch.no_grad():
        forward = alternate({"ours": lambda: ours(q, k, v), "eager": lambda: theirs(q, k, v)}, 5)
    both = alternate({"ours": lambda: train(ours), "eager": lambda: train(theirs)}, 4)
    return {
        "difference": error,
        "forward_ours": forward["ours"],
        "forward_eager": forward["eager"],
        "forward_ratio": forward["eager"] / forward["ours"],
        "train_ours": both["ours"],
        "train_eager": both["eager"],
        "train_ratio": both["eager"] / both["ours"],
        "backward_ratio": (both["eager"] - forward["eager"]) / (both["ours"] - forward["ours"]),
    }


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    results: dict[str, object] = {
        "version": pa.__version__, "torch": torch.__version__, "machine": platform.machine(),
        "cpu": cpu_name(), "cores": os.cpu_count(),
        "threads": options.threads, "load": os.getloadavg()[0],
    }  # fmt: skip
    if options.device == "cuda":
        results["gpu"] = torch.cuda.get_device_name()
    results["step"] = row = step_overhead(options.device)
    over = ", ".join(f"{name} {1e6 * (row[name] - row['c']):.2f} us" for name in row if name != "c")
    print(f"step: C {1e6 * row['c']:.2f} us; over C: {over}")
    for t in (4096, 16384) if options.device == "cpu" else ():
        results[f"c_{t}"] = row = against_c(t, options.threads)
        print(f"t={t} p=2: C {1e3 * row['c']:.1f} ms, PyTorch front / C = {row['ratio']:.3f}")
    for t, degree in ((2048, 2), (2048, 4), (4096, 2)) if options.device == "cpu" else ():
        results[f"eager_{t}_p{degree}"] = row = against_eager(t, degree, options.threads)
        print(
            f"t={t} p={degree}: eager / ours: forward {row['forward_ratio']:.1f}, "
            f"backward {row['backward_ratio']:.1f}, both {row['train_ratio']:.1f}  (difference {row['difference']:.1e})"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
