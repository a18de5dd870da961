# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: 2 and 4 processes against one."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

import power_attention as pa

torch = pytest.importorskip("torch")

from power_attention.distributed import context_parallel_attention, shard_sequences  # noqa: E402


@pytest.mark.parametrize("world", [2, 4])
def test_against_one_process(world, tmp_path):
    worker = pathlib.Path(__file__).with_name("distributed_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(world), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [p.communicate(timeout=150)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * world, "\n".join(o[-3000:] for o in outputs)
    assert all("cases" in o for o in outputs)


def test_shards_cover_every_sequence_once():
    cu, tokens = [0, 3, 3, 17, 18, 29, 32], [9, 0, 20, 3]
    seen = {i: 0 for i in range(6)}
    for rank in range(4):
        shard = shard_sequences(cu, tokens, rank)
        lengths = [b - a for a, b in zip(shard.cu_seqlens, shard.cu_seqlens[1:], strict=False)]
        for i, n, offset in zip(range(*shard.sequences), lengths, shard.offsets, strict=True):
            if n:
                assert offset == seen[i]
            seen[i] += n
    assert [seen[i] for i in range(6)] == [b - a for a, b in zip(cu, cu[1:], strict=False)]


def test_needs_a_process_group():
    q = torch.randn(1, 4, 2, 3)
    with pytest.raises(pa.UnsupportedError, match="init_process_group"):
        context_parallel_attention(q, q, q)
