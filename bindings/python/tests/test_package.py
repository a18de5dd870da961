# SPDX-License-Identifier: Apache-2.0
"""The package itself: imports, errors, plans, sizes."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import math
import re
import subprocess
import sys
import threading
import time

import pytest

import power_attention as pa
from power_attention import _plan


def test_import_needs_no_framework():
    code = (
        "import sys, power_attention as pa\n"
        "assert pa.state_rows(64, 2) == 2080\n"
        "loaded = {'torch', 'jax', 'numpy', 'triton'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_wheel_serves_every_python_and_holds_what_it_needs():
    dist = importlib.metadata.distribution("power-attention")
    (tag,) = re.findall(r"^Tag: (.*)$", dist.read_text("WHEEL"), re.M)
    python, abi, platform = tag.split("-")
    assert (python, abi) == ("cp310", "abi3")
    assert platform != "any"
    files = {str(f) for f in dist.files}
    kept = {f for f in files if not f.endswith((".py", ".pyc"))}
    for needed in ("py.typed", "_power_attention.pyi", "_power_attention_c.abi3.so", "include/power_attention.h"):
        assert f"power_attention/{needed}" in kept
    assert [f for f in kept if f.endswith("licenses/LICENSE")]
    libraries = [f for f in kept if "/libpowerattn" in f]
    assert len(libraries) == 1, "one library, under its SONAME"
    assert dist.requires is not None
    assert [r for r in dist.requires if "extra" not in r] == ["numpy>=1.24"]


def test_works_where_no_framework_is_installed():
    code = (
        "import sys\n"
        "for name in ('torch', 'jax', 'ml_dtypes'): sys.modules[name] = None\n"  # what an import of them then raises
        "import numpy as np, power_attention as pa, power_attention.numpy as pn\n"
        "x = np.ones((1, 5, 2, 4)); f = pn.forward(x, x, x)\n"
        "assert np.allclose(pn.backward(f, x).v.sum(), x.sum())\n"
        "try: pa.power_attention\n"
        "except ImportError as error: assert 'torch' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_version_is_the_librarys():
    assert tuple(int(n) for n in pa.__version__.split(".")) == pa.library_version()


@pytest.mark.parametrize(("head_dim", "degree"), [(1, 1), (7, 3), (64, 2), (64, 4), (64, 6), (128, 4)])
def test_state_rows(head_dim, degree):
    assert pa.state_rows(head_dim, degree) == math.comb(head_dim + degree - 1, degree)


def test_sizes_that_the_literature_prints():
    # d = 64, 12 layers x 12 heads, 2-byte elements: 39 MB, 14 GB, 2.2 TB
    sizes = [pa.state_bytes(64, p, count=144, dtype="bfloat16") for p in (2, 4, 6)]
    assert [round(sizes[0] / 1e6), round(sizes[1] / 1e9), round(sizes[2] / 1e12, 1)] == [39, 14, 2.2]


def test_monomials_are_lexicographic():
    order = list(itertools.combinations_with_replacement(range(5), 3))
    assert [pa.monomial(5, 3, row)[0] for row in range(len(order))] == order
    assert pa.monomial(5, 3, 1)[1] == pytest.approx(math.sqrt(3))
    with pytest.raises(pa.InvalidArgumentError, match="row"):
        pa.monomial(5, 3, len(order))


def test_describe_names_form_and_state():
    text = pa.describe(seq_len=64, heads=4, head_dim=16, form="chunked", chunk_size=16)
    assert "chunked" in text
    assert "136 rows" in text


def test_plan_is_cached_and_bounded():
    make = {"heads": 2, "head_dim": 8}
    assert pa.plan(seq_len=10, **make) is pa.plan(seq_len=10, **make)
    for t in range(1, 400):
        pa.plan(seq_len=t, **make)
    assert _plan.cached_plan.cache_info().currsize <= 256


def test_evicted_plan_lives_while_it_is_held():
    held = pa.plan(seq_len=77, heads=1, head_dim=4)
    _plan.cached_plan.cache_clear()
    gc.collect()
    assert "77" in held.describe()


def test_plans_are_made_from_many_threads():
    errors = []

    def work(seed):
        try:
            for i in range(50):
                assert pa.plan(seq_len=1 + (seed * 7 + i) % 60, heads=2, head_dim=8).workspace_forward >= 0
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_gil_is_released():
    import numpy as np

    import power_attention.numpy as pn

    x = np.ones((1, 1500, 2, 32), np.float32)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    calls = 0
    while time.perf_counter() - start < 0.3:
        pn.power_attention(x, x, x, form="attention", num_threads=1)
        calls += 1
    end = time.perf_counter()
    stop.set()
    thread.join()
    inside = [t for t in ticks if start < t < end]
    assert len(inside) > 2 * calls or len(inside) > 50


@pytest.mark.parametrize(
    ("problem", "error", "words"),
    [
        ({"degree": 3}, ValueError, "degree"),
        ({"degree": 9, "normalize": False}, ValueError, "degree"),
        ({"heads": 3, "heads_kv": 2}, ValueError, "heads"),
        ({"head_dim": 0}, ValueError, "head_dim"),
        ({"head_dim": 1000}, ValueError, "head_dim"),
        ({"seq_len": -1}, ValueError, "seq_len"),
        ({"dtype": "int8"}, TypeError, "int8"),
        ({"form": "fast"}, ValueError, "fast"),
        ({"device": "tpu"}, ValueError, "tpu"),
        ({"rope": "spiral"}, ValueError, "spiral"),
        ({"rope": pa.Rope(dim=3)}, ValueError, "rope_dim"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"degree": 6, "head_dim": 128, "use_state": True}, MemoryError, "bytes|B"),
    ],
)
def test_bad_problem_says_what_and_why(problem, error, words):
    with pytest.raises(error, match=words) as caught:
        pa.plan(**{"seq_len": 64, "heads": 4, "head_dim": 16, **problem})
    assert isinstance(caught.value, pa.PowerAttentionError)


def test_message_is_of_its_own_thread():
    seen = {}

    def fail(name, value):
        for _ in range(100):
            try:
                pa.plan(seq_len=4, heads=1, head_dim=value)
            except pa.PowerAttentionError as error:
                seen.setdefault(name, set()).add(str(error))

    threads = [threading.Thread(target=fail, args=(n, 1000 + n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert len(seen[n]) == 1
        assert str(1000 + n) in next(iter(seen[n]))


def test_no_cuda_is_said_by_name():
    if pa.cuda_available():
        assert pa.device_count("cuda") > 0
    else:
        with pytest.raises(pa.NoDeviceError):
            pa.plan(seq_len=4, heads=1, head_dim=8, device="cuda")
