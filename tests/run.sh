#!/bin/sh
# Sets up .venv with both backends and runs every check: lint, types, import rules, tests.
#
#   sh tests/run.sh [options of pytest]
set -eu
EXTRAS=torch,paddle,test
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/setup.sh"
cd "$root"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/lint-imports"
exec "$VENV/bin/python" -m pytest "$@"
