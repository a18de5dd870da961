# SPDX-License-Identifier: Apache-2.0
# The Python package: built as a user installs it, then pytest, ruff and mypy. `python_test` needs no GPU;
# `python_gpu_test` builds with the CUDA backend and needs one.

python_setup() {
  need_build_tools
  need_venv python bindings/python/requirements-test.txt
  # The build environment is the pinned one; the C++ objects come from the compiler cache of earlier builds.
  quietly python-install env PATH="$VENV/bin:$PATH" "$VENV/bin/python" -m pip install --no-build-isolation \
    --no-deps --force-reinstall -C build-dir="$BUILD/python" -C cmake.define.POWERATTN_CUDA="${POWERATTN_CUDA:-OFF}" \
    -C cmake.define.CMAKE_C_COMPILER_LAUNCHER=ccache -C cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache \
    ./bindings/python
}

# From the package's folder, to which the paths in its pyproject.toml are relative.
python_ruff() {
  cd bindings/python
  "$VENV/bin/ruff" check --no-cache src tests bench
  "$VENV/bin/ruff" check --no-cache --config pyproject.toml --ignore D ../../examples # scripts, not an API
  "$VENV/bin/ruff" format --check --no-cache --config pyproject.toml src tests bench ../../examples
}

python_mypy() { (cd bindings/python && "$VENV/bin/mypy" --cache-dir "$BUILD/mypy" src/power_attention); }

python_format() {
  need_venv python bindings/python/requirements-test.txt
  (cd bindings/python && "$VENV/bin/ruff" format --no-cache --config pyproject.toml src tests bench ../../examples)
}

python_lint() {
  need_venv python bindings/python/requirements-test.txt
  (python_ruff)
  python_mypy
}

python_test() {
  check "ruff" python_ruff
  check "mypy" python_mypy
  # Outside the source tree, so that the installed package is what is tested.
  run_counted pytest env -C "$BUILD" POWERATTN_CACHE="$CACHE" "$VENV/bin/python" -m pytest -q \
    -p no:cacheprovider -c "$ROOT/bindings/python/pyproject.toml" --rootdir "$ROOT/bindings/python" \
    --ignore "$ROOT/bindings/python/tests/gpu" "$ROOT/bindings/python/tests"
}

python_gpu_test() {
  need_toolkit
  POWERATTN_CUDA=ON python_setup
  env -C "$BUILD" POWERATTN_CACHE="$CACHE" "$VENV/bin/python" -m pytest -q \
    -p no:cacheprovider -c "$ROOT/bindings/python/pyproject.toml" --rootdir "$ROOT/bindings/python" \
    "$ROOT/bindings/python/tests/gpu"
}
