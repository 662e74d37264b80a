#!/usr/bin/env bash
# Own virtual environment, install, lint, types, documentation, tests.
#   bash tools/test.sh            everything
#   bash tools/test.sh --quick    without the tests marked slow
#   MASKFEAT_TESTS_AT_ONCE=N      processes that test (default: one more than cores, since many tests wait; at most 8)
#   MASKFEAT_VENV=DIR             where the environment lies (default: .venv)
#   PYTHON=python3.12             which interpreter makes it
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
  --quick) tier="not slow" ;;
  "") tier="slow or not slow" ;;
  *) echo "test.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
esac
MASKFEAT_EXTRAS=dev,trackers
. tools/venv.sh
echo "== lint"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
echo "== types"
"$venv/bin/mypy"
echo "== documentation"
PATH="$venv/bin:$PATH" NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --quiet # any warning is an error
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
failed=0
cores=$(getconf _NPROCESSORS_ONLN)
at_once=${MASKFEAT_TESTS_AT_ONCE:-$((cores < 7 ? cores + 1 : 8))}
echo "== tests, $at_once at a time"
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q --durations=15 -n "$at_once" --dist worksteal \
  -m "($tier) and not (full_size or alone or slurm)" || failed=1
echo "== tests that take every core, or a clock"
"$venv/bin/python" -m pytest -q --durations=5 -m "($tier) and (full_size or alone) and not slurm" || failed=1
exit "$failed"
