# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the documentation run, and print what is said."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[3]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.M | re.S)


def examples():
    for path in (ROOT / "README.md", ROOT / "bindings/python/README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text() if path.exists() else ""
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], match[2], id=f"{path.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize(("code", "expected"), list(examples()))
def test_example(code, expected):
    if "jax" in code:
        pytest.importorskip("jax")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    if expected is not None:
        assert printed.getvalue() == expected


def test_there_are_examples():
    assert len(list(examples())) >= 8
