# SPDX-License-Identifier: Apache-2.0
# The Python package: built as a user installs it, then pytest, ruff and mypy. Needs no GPU.

python_setup() {
  need_build_tools
  need_venv python bindings/python/requirements-test.txt
  # The build environment is the pinned one; the C++ objects come from the compiler cache of earlier builds.
  quietly python-install env PATH="$VENV/bin:$PATH" "$VENV/bin/python" -m pip install --no-build-isolation \
    --no-deps --force-reinstall -C build-dir="$BUILD/python" -C cmake.define.POWERATTN_CUDA=OFF \
    -C cmake.define.CMAKE_C_COMPILER_LAUNCHER=ccache -C cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache \
    ./bindings/python
}

python_sources() { git ls-files --cached --others --exclude-standard -- 'bindings/python/*.py' 'examples/*.py'; }

python_ruff() {
  local config=(--config bindings/python/pyproject.toml --no-cache)
  python_sources | grep -v '^examples/' | xargs "$VENV/bin/ruff" check "${config[@]}"
  python_sources | grep '^examples/' | xargs "$VENV/bin/ruff" check "${config[@]}" --ignore D # scripts, not an API
  python_sources | xargs "$VENV/bin/ruff" format --check "${config[@]}"
}

python_mypy() { (cd bindings/python && "$VENV/bin/mypy" --cache-dir "$BUILD/mypy" src/power_attention); }

python_format() {
  need_venv python bindings/python/requirements-test.txt
  python_sources | xargs "$VENV/bin/ruff" format --config bindings/python/pyproject.toml --no-cache
}

python_lint() {
  need_venv python bindings/python/requirements-test.txt
  python_ruff
  python_mypy
}

python_test() {
  check "ruff" python_ruff
  check "mypy" python_mypy
  # Outside the source tree, so that the installed package is what is tested.
  run_counted pytest env -C "$BUILD" POWERATTN_CACHE="$CACHE" "$VENV/bin/python" -m pytest -q \
    -p no:cacheprovider -c "$ROOT/bindings/python/pyproject.toml" --rootdir "$ROOT/bindings/python" \
    "$ROOT/bindings/python/tests"
}
