#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Includes point one way: include <- kernels <- src, and never between the CPU and the CUDA side.

  include/            nothing but the C library
  kernels/common/     include/
  kernels/cpu/        kernels/common/, include/           never kernels/cuda/, never src/
  kernels/cuda/       kernels/common/, include/           never kernels/cpu/, never src/
  src/                include/, kernels/common/, src/     never kernels/cpu/, kernels/cuda/, src/cpu/, src/cuda/
  src/cpu/            as src/, and kernels/cpu/           never anything of cuda
  src/cuda/           as src/, and kernels/cuda/          never anything of cpu
  tests/ oracles      nothing of kernels/ but common      the oracles share nothing with what they judge
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEARCH = [ROOT / "include", ROOT / "src", ROOT / "kernels" / "common", ROOT]
ALLOWED = [  # first match of the including file's path; prefixes that it may include
    ("include/", ["include/"]),
    ("kernels/common/", ["kernels/common/", "include/"]),
    ("kernels/cpu/", ["kernels/cpu/", "kernels/common/", "include/"]),
    ("kernels/cuda/", ["kernels/cuda/", "kernels/common/", "include/"]),
    ("src/cpu/", ["src/cpu/", "src/!", "kernels/cpu/", "kernels/common/", "include/"]),
    ("src/cuda/", ["src/cuda/", "src/!", "kernels/cuda/", "kernels/common/", "include/"]),
    ("src/", ["src/!", "kernels/common/", "include/"]),
    ("tests/oracle", ["tests/", "include/"]),
    ("tests/recurrence", ["tests/", "include/"]),
]  # "src/!" is src/ itself without its folders


def resolve(source: pathlib.Path, name: str) -> str | None:
    for folder in [source.parent, *SEARCH]:
        target = (folder / name).resolve()
        if target.is_file() and target.is_relative_to(ROOT):
            return target.relative_to(ROOT).as_posix()
    return None


def permitted(target: str, prefixes: list[str]) -> bool:
    for prefix in prefixes:
        if prefix.endswith("!"):
            folder = prefix[:-1]
            if target.startswith(folder) and "/" not in target[len(folder):]:
                return True
        elif target.startswith(prefix):
            return True
    return False


def main() -> int:
    files = errors = includes = 0
    for source in sorted(ROOT.glob("*/**/*")):
        path = source.relative_to(ROOT).as_posix()
        if source.suffix not in {".c", ".cpp", ".h", ".cu", ".cuh"}:
            continue
        prefixes = next((allowed for prefix, allowed in ALLOWED if path.startswith(prefix)), None)
        if prefixes is None:
            continue
        files += 1
        for number, line in enumerate(source.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*(["<])([^">]+)[">]', line)
            if not match:
                continue
            includes += 1
            target = resolve(source, match[2])
            if target is None:
                if match[1] == '"':
                    print(f"{path}:{number}: {match[2]} is not in the tree")
                    errors += 1
                elif path.startswith("include/") and match[2] not in {"stddef.h", "stdint.h"}:
                    print(f"{path}:{number}: the public header may need <stddef.h> and <stdint.h> only")
                    errors += 1
            elif not permitted(target, prefixes):
                print(f"{path}:{number}: must not include {target}")
                errors += 1
    if files < 10:
        print(f"only {files} files found: the check looks in the wrong place")
        return 1
    print(f"{includes} includes in {files} files, {errors} wrong")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
