# SPDX-License-Identifier: Apache-2.0
"""The XLA handlers: compiled once per jaxlib version against the headers that it ships, then cached."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pathlib
import shutil
import subprocess
import sysconfig
import tempfile
from functools import lru_cache
from typing import Any

import jax
import jaxlib.version

from .._errors import UnsupportedError
from .._plan import native

_HERE = pathlib.Path(__file__).parent
_FUNCTIONS = ("plan_create", "plan_destroy", "plan_query", "forward", "backward", "last_error")


def _cache() -> pathlib.Path:
    """Where compiled handlers are kept."""
    root = os.environ.get("POWERATTN_CACHE") or pathlib.Path(
        os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "powerattn"
    )
    return pathlib.Path(root, "xla")


def _compile(source: pathlib.Path, header: pathlib.Path, target: pathlib.Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise UnsupportedError(
            "power_attention.jax needs a C++17 compiler the first time it is used with a version of jaxlib; "
            "none was found (set CXX)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = pathlib.Path(folder, target.name)
        command = [
            *compiler.split(),
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-DNDEBUG",
            f"-I{header}",
            f"-I{jax.ffi.include_dir()}",
            str(source),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise UnsupportedError(
                f"compiling the XLA handlers for jaxlib {jaxlib.version.__version__} failed: {' '.join(command)}\n"
                + "\n".join(errors[:10])
            )
        os.replace(made, target)  # two processes at once: both leave a whole file


@lru_cache(maxsize=1)
def load() -> Any:
    """Loads the handlers and registers them for the CPU, and for CUDA where this build has it."""
    if jax.__version_info__ < (0, 6):  # before it a handler cannot ask which device it runs on
        raise UnsupportedError(f"jax is {jax.__version__}; 0.6 or newer is needed")
    source, header = _HERE / "xla_ffi.cc", _HERE.parent / "include"
    digest = hashlib.sha256(source.read_bytes() + (header / "power_attention.h").read_bytes())
    digest.update(f"{jaxlib.version.__version__} {sysconfig.get_platform()}".encode())
    target = _cache() / f"powerattn_xla-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(source, header, target)
    shim = ctypes.CDLL(str(target))
    library = ctypes.CDLL(native.__file__)  # its dependency libpowerattn is searched with it
    addresses = [ctypes.cast(getattr(library, f"powerattn_{name}"), ctypes.c_void_p) for name in _FUNCTIONS]
    shim.powerattn_xla_init.argtypes = [ctypes.c_void_p] * len(addresses)
    shim.powerattn_xla_init.restype = None
    shim.powerattn_xla_init(*addresses)
    for platform, suffix in (("cpu", "cpu"), ("CUDA", "cuda")):
        for name in ("forward", "backward"):
            handler = getattr(shim, f"powerattn_xla_{name}_{suffix}")
            jax.ffi.register_ffi_target(f"powerattn_{name}", jax.ffi.pycapsule(handler), platform=platform)
    return shim
