#!/usr/bin/env bash
# The lowest versions that setup.py allows, in an environment of their own, and a short tier of tests there.
#   bash tools/test_lowest.sh
#   bash tools/test_lowest.sh --install    only make the environment
#   MASKFEAT_LOWEST_VENV=DIR      where the environment lies (default: .venv-lowest)
#   PYTHON=python3.12             which interpreter makes it
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
  "" | --install) ;;
  *) echo "test_lowest.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
esac
# Each "name>=version" of setup.py as name==version. Their own requirements are as new as pip finds them.
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
# Trackers need newer versions of what others need as well, and are left out.
grep -v '"trackers": ' setup.py | grep -oE '"[A-Za-z][A-Za-z0-9._-]*>=[0-9][^"]*"' | tr -d '"' | sed -E 's/>=/==/; s/,.*//' > "$pins"
export PIP_CONSTRAINT=$pins PIP_NO_COMPILE=1 MASKFEAT_VENV=${MASKFEAT_LOWEST_VENV:-$PWD/.venv-lowest}
. tools/venv.sh
[ "${1:-}" != --install ] || exit 0
echo "== versions"
"$venv/bin/python" - "$pins" << 'EOF'
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

for line in Path(sys.argv[1]).read_text().split():
    name, lowest = line.split("==")
    print(f"{name} {version(name)}")
    assert Version(Version(version(name)).public) == Version(lowest), f"{name} is not the lowest, {lowest}"
EOF
echo "== imports"
"$venv/bin/python" -c '
import importlib, pkgutil, maskfeat
names = [m.name for m in pkgutil.walk_packages(maskfeat.__path__, "maskfeat.")]
for name in names:
    importlib.import_module(name)
print(len(names), "modules")'
echo "== tests"
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "$venv/bin/python" -m pytest -q --durations=5 -n 2 --dist worksteal \
  -m "not full_size and not alone and not slurm" \
  tests/contracts/test_dependencies.py tests/test_file_io.py tests/config/test_files.py tests/config/test_recipes.py \
  tests/checkpoint/test_reading.py tests/data/test_transforms.py tests/data/video/test_decoder.py \
  tests/data/video/test_scaling.py \
  tests/golden/test_hog.py tests/reliability/test_versions.py tests/engine/test_flops.py \
  tests/analysis/test_curves.py tests/analysis/probes/test_linear.py tests/analysis/test_architecture.py \
  tests/engine/test_memory.py tests/engine/test_confusion.py tests/analysis/test_export.py::test_onnx \
  "tests/engine/test_run.py::test_pretrain_finetune_test_in_one_folder" "tests/engine/test_run.py::test_clips_multi_view"
