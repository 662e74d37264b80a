#!/usr/bin/env bash
# The tests of the fourteen guarantees of docs/reliability.md at full size: about an hour on two cores. Figures are shown
# at the end and left in soak.txt.
#   bash tools/soak.sh [PYTEST OPTIONS]    such as -k kill
#   MASKFEAT_VENV=DIR                      where the environment lies (default: .venv; made where it is missing)
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
. tools/venv.sh
export MASKFEAT_SOAK=1 MASKFEAT_RELIABILITY="$PWD/soak.txt" OMP_NUM_THREADS=1
: > "$MASKFEAT_RELIABILITY"
code=0
"$venv/bin/python" -m pytest -q --durations=10 tests/reliability "$@" || code=$?
echo "== figures, by promise"
sort -n "$MASKFEAT_RELIABILITY"
exit "$code"
