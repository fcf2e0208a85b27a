#!/usr/bin/env bash
# Builds .venv from the lock: python -m venv, uv from the package index, exact pins checked by hash, then this project.
set -euo pipefail
cd "$(dirname "$0")"
PY=${PYTHON:-python3}
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup.sh: Python 3.11 or newer is needed, $("$PY" --version) found; name one with PYTHON=..." >&2; exit 1; }
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$PY" -m venv --clear .venv || { echo "setup.sh: no virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 1; }
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install -q uv==0.13.8
export VIRTUAL_ENV=$PWD/.venv UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1  # compiled once: half of every start
.venv/bin/uv pip sync -q --require-hashes requirements.lock
.venv/bin/uv pip install -q --no-deps --no-build-isolation -e .
