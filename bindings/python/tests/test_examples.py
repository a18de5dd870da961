# SPDX-License-Identifier: Apache-2.0
"""The examples run, small."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[3] / "examples"


def run(*args, cwd):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / args[0]), *args[1:]], cwd=cwd, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not (EXAMPLES / "train_lm.py").exists(), reason="examples are not in this distribution")
def test_train_then_generate(tmp_path):
    pytest.importorskip("torch")
    small = ("--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--threads", "1")
    out = run(
        "train_lm.py", *small, "--attention", "softmax", "p2", "--seeds", "0", "--steps", "30", "--limit", "100000",
        "--eval-batches", "1", "--gated", cwd=tmp_path,
    )  # fmt: skip
    assert "test loss" in out
    results = json.loads((tmp_path / "lm/losses.json").read_text())["results"]
    for result in results:
        assert result["curve"][-1][1] < result["curve"][0][1] - 0.3, "it did not learn"
    assert (tmp_path / "lm/losses.png").stat().st_size > 5000
    text = run("generate.py", "--checkpoint", "lm/p2.pt", "--prompt", "def ", "--tokens", "20", cwd=tmp_path)
    assert text.startswith("def ")
    measured = run(
        "generate.py", "--measure", "--max-context", "1024", "--repeats", "3", "--layers", "1", "--width", "32",
        "--heads", "2", cwd=tmp_path,
    )  # fmt: skip
    assert "p2" in measured
    rows = json.loads((tmp_path / "lm/generate.json").read_text())
    sizes = {kind: [r["bytes"] for r in rows if r["kind"] == kind] for kind in ("softmax", "p2")}
    assert len(set(sizes["p2"])) == 1
    assert sizes["softmax"][1] > 3 * sizes["softmax"][0]
