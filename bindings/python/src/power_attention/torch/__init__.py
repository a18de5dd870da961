# SPDX-License-Identifier: Apache-2.0
"""Power attention for PyTorch: the function, states for decoding, and a module."""

from __future__ import annotations

from .._plan import Rope
from .function import State, power_attention
from .layer import PowerAttention, PowerAttentionCache
from .state import PowerAttentionState, step

__all__ = [
    "PowerAttention",
    "PowerAttentionCache",
    "PowerAttentionState",
    "Rope",
    "State",
    "power_attention",
    "step",
]
