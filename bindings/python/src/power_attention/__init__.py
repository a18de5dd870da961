# SPDX-License-Identifier: Apache-2.0
"""Symmetric power attention for NumPy, PyTorch and JAX.

``import power_attention`` needs none of them: :mod:`power_attention.numpy`, :mod:`power_attention.torch`,
:mod:`power_attention.jax` and :mod:`power_attention.distributed` are loaded when they are first used. The names
``power_attention``, ``PowerAttention``, ``PowerAttentionState``, ``power_retention`` and so on at this level are
the PyTorch ones.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._errors import (
    DeviceError,
    DtypeError,
    InternalError,
    InvalidArgumentError,
    NoDeviceError,
    OutOfMemoryError,
    PowerAttentionError,
    StateTooLargeError,
    StateVersionError,
    UnsupportedError,
    WorkspaceTooSmallError,
)
from ._plan import (
    Plan,
    Rope,
    cuda_available,
    describe,
    device_count,
    library_version,
    monomial,
    plan,
    state_bytes,
    state_rows,
)
from ._version import __version__

if TYPE_CHECKING:
    from . import distributed, jax, numpy, power_full, torch
    from .power_full import power_retention, power_retention_inference
    from .torch import PowerAttention, PowerAttentionCache, PowerAttentionState, power_attention

__all__ = [
    "DeviceError",
    "DtypeError",
    "InternalError",
    "InvalidArgumentError",
    "NoDeviceError",
    "OutOfMemoryError",
    "Plan",
    "PowerAttention",
    "PowerAttentionCache",
    "PowerAttentionError",
    "PowerAttentionState",
    "Rope",
    "StateTooLargeError",
    "StateVersionError",
    "UnsupportedError",
    "WorkspaceTooSmallError",
    "__version__",
    "cuda_available",
    "describe",
    "device_count",
    "distributed",
    "jax",
    "library_version",
    "monomial",
    "numpy",
    "plan",
    "power_attention",
    "power_full",
    "power_retention",
    "power_retention_inference",
    "state_bytes",
    "state_rows",
    "torch",
]

_MODULES = ("distributed", "jax", "numpy", "power_full", "torch")
_NAMES = {
    "PowerAttention": "torch",
    "PowerAttentionCache": "torch",
    "PowerAttentionState": "torch",
    "power_attention": "torch",
    "power_retention": "power_full",
    "power_retention_inference": "power_full",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
