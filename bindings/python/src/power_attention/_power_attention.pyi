# SPDX-License-Identifier: Apache-2.0
# What SWIG generates, as far as the package uses it.
from typing import Any

def __getattr__(name: str) -> Any: ...
