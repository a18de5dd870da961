#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles and runs the C examples of the documentation.

    doc_examples.py INSTALL-PREFIX BUILD-FOLDER FILE.md...

Every ```c block that holds a main() is compiled as strict C11 (aligned_alloc) against the installed library and run; when a
```text block follows it directly, that is what it must print. A block without main() is compiled as the body of
a function."""
import pathlib
import re
import subprocess
import sys

BLOCK = re.compile(r"^```c\n(.*?)^```\n(?:\s*(?:prints|which prints|Output)?:?\s*^```text\n(.*?)^```\n)?", re.M | re.S | re.I)
FLAGS = "-std=c11 -Wall -Wextra -Wpedantic -Werror -O1".split()


def main() -> int:
    prefix, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    count = failed = 0
    for name in sys.argv[3:]:
        text = pathlib.Path(name).read_text()
        for match in BLOCK.finditer(text):
            code, expected = match[1], match[2]
            line = text[: match.start()].count("\n") + 1
            count += 1
            runs = "main(" in code
            if not runs:
                code = f'#include <power_attention.h>\nvoid example(void);\nvoid example(void) {{\n{code}\n}}\n'
            stem = folder / f"{pathlib.Path(name).stem}_{line}"
            stem.with_suffix(".c").write_text(code)
            libs = ["-L", f"{prefix}/lib", f"-Wl,-rpath,{prefix}/lib", "-lpowerattn", "-lm"]
            link = ["-o", str(stem), f"{stem}.c", *libs] if runs else ["-c", "-o", f"{stem}.o", f"{stem}.c"]
            result = subprocess.run(["cc", *FLAGS, f"-I{prefix}/include", *link], capture_output=True, text=True)
            if result.returncode == 0 and runs:
                result = subprocess.run([str(stem)], capture_output=True, text=True, timeout=60)
            problem = result.stderr + result.stdout if result.returncode else ""
            if not problem and expected is not None and result.stdout != expected:
                problem = f"printed\n{result.stdout}instead of\n{expected}"
            print(f"{name}:{line}: {'FAILED' if problem else 'ok'}")
            if problem:
                failed += 1
                print(problem)
    print(f"{count} examples, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
