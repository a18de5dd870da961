# SPDX-License-Identifier: Apache-2.0
"""Version of the package, which is the version of the library that it wraps."""

__version__ = "0.1.0"
