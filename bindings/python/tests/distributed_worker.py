# SPDX-License-Identifier: Apache-2.0
"""One rank of test_distributed: computes its part and compares with the whole, computed alone."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import power_attention as pa
from power_attention.distributed import context_parallel_attention
from power_attention.torch import State, power_attention

CASES = {
    "plain": {},
    "gated": {"gated": True},
    "gqa, degree 4": {"gated": True, "hk": 1, "degree": 4},
    "odd degree": {"degree": 3, "normalize": False, "gated": True},
    "rope": {"gated": True, "rope": "half"},
    "uneven": {"gated": True, "uneven": True, "rope": "interleaved"},
    "initial state": {"gated": True, "initial": True},
    "final states": {"gated": True, "initial": True, "final": True},
    "packed": {"gated": True, "cu": [0, 3, 3, 17, 18, 29, 32], "rope": "half"},
    "packed, one sequence over all": {"gated": True, "cu": [0, 31]},
    "packed, padding": {"gated": True, "cu": [0, 2, 9], "initial": True},
    "packed, initial and final": {"gated": True, "cu": [0, 10, 10, 11, 30], "initial": True, "final": True},
    "packed, uneven": {"gated": True, "cu": [0, 4, 6, 28], "uneven": True, "rope": "half", "initial": True},
    "reset by the gate": {"gated": True, "reset": True, "initial": True},
}


def run(rank: int, world: int, case: dict, dtype: torch.dtype, device: str) -> None:
    cu, hk, degree = case.get("cu"), case.get("hk", 2), case.get("degree", 2)
    total, h, d, e = 32, 4, 4, 2
    g = torch.Generator().manual_seed(7)
    b, n = (1, len(cu) - 1) if cu else (2, 2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g).to(device, dtype)

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = {} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(actual, expected, **tolerance)

    q, k, v = randn(b, total, h, d), randn(b, total, hk, d), randn(b, total, hk, e)
    log_g = -torch.rand(b, total, hk, dtype=torch.float64, generator=g).to(device, dtype) if case.get("gated") else None
    if case.get("reset"):
        log_g[:, 13] = -torch.inf
    state = None
    if case.get("initial"):
        _, state = power_attention(
            randn(n, 20, hk, d),
            randn(n, 20, hk, d),
            randn(n, 20, hk, e),
            degree=degree,
            return_final_state=True,
        )
    options = {"degree": degree, "normalize": case.get("normalize", True), "rope": case.get("rope"), "eps": 0.1}
    tokens = [total // world] * world
    if case.get("uneven"):
        tokens = {1: [32], 2: [27, 5], 3: [9, 20, 3], 4: [9, 0, 20, 3]}[world]
    start = sum(tokens[:rank])
    mine = slice(start, start + tokens[rank])

    names = ["q", "k", "v"] + (["log_g"] if log_g is not None else []) + (["s", "z"] if state else [])
    full = dict(zip(("q", "k", "v", "log_g", "s", "z"), (q, k, v, log_g, *(state or (None, None))), strict=True))
    whole = {name: full[name].clone().requires_grad_() for name in names}
    y, final = power_attention(
        whole["q"], whole["k"], whole["v"], log_g=whole.get("log_g"), cu_seqlens=cu, return_final_state=True,
        initial_state=State(whole["s"], whole["z"]) if state else None, **options,
    )  # fmt: skip
    dy, ds, dz = randn(*y.shape), randn(*final.s.shape), randn(*final.z.shape)
    loss = (y * dy).sum()
    if case.get("final"):
        loss = loss + (final.s * ds).sum() + (final.z * dz).sum()
    loss.backward()

    part = {name: (full[name] if name in "sz" else full[name][:, mine]).clone().requires_grad_() for name in names}
    yp, fp = context_parallel_attention(
        part["q"], part["k"], part["v"], log_g=part.get("log_g"), cu_seqlens=cu, tokens=tokens,
        return_final_state=True, initial_state=State(part["s"], part["z"]) if state else None, **options,
    )  # fmt: skip
    close(yp, y[:, mine].detach())
    loss = (yp * dy[:, mine]).sum()
    if cu is None:
        ends = [(i, i) for i in range(n)] if rank == world - 1 else []
    else:
        first = next((i for i in range(n) if cu[i + 1] > start or (cu[i] == cu[i + 1] >= start)), n)
        ends = [
            (i - first, i)
            for i in range(first, n)
            if (start < cu[i + 1] <= mine.stop) or (cu[i] == cu[i + 1] and start <= cu[i] < mine.stop)
        ]
    for local, i in ends:
        close(fp.s[local], final.s[i].detach())
        close(fp.z[local], final.z[i].detach())
        if case.get("final"):
            loss = loss + (fp.s[local] * ds[i]).sum() + (fp.z[local] * dz[i]).sum()
    loss.backward()
    for name in names:
        if name in "sz":
            grad = part[name].grad.clone()
            dist.all_reduce(grad)
            close(grad, whole[name].grad)
        else:
            close(part[name].grad, whole[name].grad[:, mine])


def bad_input(rank: int, world: int, device: str) -> None:
    q = torch.randn(1, 4, 2, 3, device=device)
    for options, words in (
        ({"tokens": [3] * world}, "tokens"),
        ({"cu_seqlens": [1, 4]}, "cu_seqlens"),
        ({"cu_seqlens": [0, 4 * world + 1]}, "cu_seqlens"),
    ):
        try:
            context_parallel_attention(q, q, q, **options)
        except pa.InvalidArgumentError as error:
            assert words in str(error)
        else:
            raise AssertionError(f"{options} was accepted")


def main() -> None:
    rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    backend = sys.argv[4] if len(sys.argv) > 4 else "gloo"
    # Exact against one process: in float64 where there is float64.
    dtype, device = (torch.float64, "cpu") if backend == "gloo" else (torch.float32, f"cuda:{rank}")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world)
    narrow = [(name, CASES[name], torch.float32) for name in ("rope", "packed, initial and final")]
    for name, case, kind in [(*item, dtype) for item in CASES.items()] + narrow:
        try:
            run(rank, world, case, kind, device)
        except Exception as error:
            raise AssertionError(f"case {name!r} in {kind}, rank {rank} of {world}") from error
        dist.barrier()
    bad_input(rank, world, device)
    dist.barrier()
    dist.destroy_process_group()
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    main()
