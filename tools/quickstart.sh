#!/usr/bin/env bash
# From a fresh checkout to a pre-trained, fine-tuned and tested model: makes a virtual environment, installs,
# renders small data, trains, and ends with a table and a picture. A few minutes on two cores after installing.
#   bash tools/quickstart.sh                     everything lands in quickstart/ of the checkout
#   bash tools/quickstart.sh --output DIR        elsewhere, from the folder that you are in
#   bash tools/quickstart.sh --fresh             start over
#   bash tools/quickstart.sh NUM_GPUS 1          overrides for every run
#   MASKFEAT_VENV=DIR                            where the environment lies (default: .venv)
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."
case "${1:-}" in
  -h | --help) sed -n '2,8s/^# \{0,1\}//p' tools/quickstart.sh; exit 0 ;;
esac
. tools/venv.sh
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait leave the cores to the data workers
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$from/$1" ;; esac; }
args=() before=
for word in "$@"; do
  if [ "$from" != "$PWD" ]; then # DIR is in the folder that this was called from, not in the checkout
    case "$before" in --output) word=$(absolute "$word") ;; esac
    case "$word" in --output=*) word=--output=$(absolute "${word#--output=}") ;; esac
  fi
  args+=("$word")
  before=$word
done
exec "$venv/bin/python" tools/quickstart.py ${args[@]+"${args[@]}"}
