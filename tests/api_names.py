#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares docs/api-names.md with the header and with the sources of the bindings.

Fails when the header has a function that the table lacks (or the reverse), when a name of the table is not
defined in its binding, or when a binding never mentions a C function.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources(*patterns: str) -> str:
    files = [p for pattern in patterns for p in sorted(ROOT.glob(pattern)) if p.is_file()]
    if not files:
        sys.exit(f"no file matches {patterns}")
    return "\n".join(p.read_text(encoding="utf-8") for p in files)


def main() -> int:
    header = (ROOT / "include/power_attention.h").read_text(encoding="utf-8")
    functions = set(re.findall(r"POWERATTN_API[^;(]*?\b(powerattn_\w+)\s*\(", header))
    bindings = {
        "Python": (sources("bindings/python/src/**/*.py"), r"(?:def|class) {0}\b"),
        "Rust": (sources("bindings/rust/powerattn/src/*.rs"), r"(?:fn|struct|enum) {0}\b|impl.* {0} for"),
        "Julia": (sources("bindings/julia/src/*.jl"), r"(?:function|struct) {0}[({{\s]|^{0}\("),
    }
    # SWIG wraps the header whole; the others name each function.
    callers = {
        "Rust": bindings["Rust"][0],
        "Julia": bindings["Julia"][0],
    }
    errors, rows = [], set()
    for line in (ROOT / "docs/api-names.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        match = re.fullmatch(r"`(powerattn_\w+)`", cells[0])
        if not match:
            continue
        rows.add(match[1])
        for (language, (text, pattern)), cell in zip(bindings.items(), cells[1:], strict=True):
            for quoted in re.findall(r"`([^`]+)`", cell):
                name = re.split(r"\.|::| for ", quoted)[-1]
                # Plan.info is a field in Julia and a method elsewhere.
                defined = r"\b{0}\b" if name == "info" else pattern
                if not re.search(defined.format(re.escape(name)), text, re.MULTILINE):
                    errors.append(f"{language}: the table calls {match[1]} {name}, which the binding does not define")
    errors += [f"docs/api-names.md has no row for {name}" for name in sorted(functions - rows)]
    errors += [f"docs/api-names.md has {name}, which the header lacks" for name in sorted(rows - functions)]
    for language, text in callers.items():
        errors += [f"{language} never calls {name}" for name in sorted(functions) if name not in text]
    print("\n".join(errors) or f"{len(functions)} functions, {len(bindings)} bindings: complete")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
