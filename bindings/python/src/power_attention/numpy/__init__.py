# SPDX-License-Identifier: Apache-2.0
"""Power attention on NumPy arrays, and on any host array that speaks DLPack.

Inputs are read where they are, with their strides; outputs are new NumPy arrays. Layouts: q ``[b, t, h, d]``,
k ``[b, t, hk, d]``, v ``[b, t, hk, e]``, log_g ``[b, t, hk]``; other orders by transposing views.
"""

from __future__ import annotations

from .._plan import describe, monomial, plan, state_bytes, state_rows
from .operation import Forward, Gradients, backward, forward, power_attention, step
from .segments import Summary, compose, summary, summary_reverse
from .states import State, convert, pack, unpack, zero_state

__all__ = [
    "Forward",
    "Gradients",
    "State",
    "Summary",
    "backward",
    "compose",
    "convert",
    "describe",
    "forward",
    "monomial",
    "pack",
    "plan",
    "power_attention",
    "state_bytes",
    "state_rows",
    "step",
    "summary",
    "summary_reverse",
    "unpack",
    "zero_state",
]
