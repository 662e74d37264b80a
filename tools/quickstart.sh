#!/usr/bin/env bash
# From a fresh checkout to a pre-trained, fine-tuned and tested model: makes a virtual environment, installs,
# renders small data, trains, and ends with a table and a picture. A few minutes on two cores after installing.
#   bash tools/quickstart.sh                     everything lands in ./quickstart
#   bash tools/quickstart.sh --output DIR        elsewhere
#   bash tools/quickstart.sh --fresh             start over
#   bash tools/quickstart.sh NUM_GPUS 1          overrides for every run
#   MASKFEAT_VENV=DIR                            where the environment lies (default: .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
. tools/venv.sh
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait leave the cores to the data workers
exec "$venv/bin/python" tools/quickstart.py "$@"
