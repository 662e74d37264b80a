# Sourced by quickstart.sh and test.sh: makes a virtual environment with maskfeat installed, and sets $venv.
# A second run finds it installed and takes a second.
venv=${MASKFEAT_VENV:-$PWD/.venv}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "maskfeat needs Python 3.10 or later, and $python is $("$python" --version 2>&1): set PYTHON=python3.x" >&2
  exit 1
fi
[ -x "$venv/bin/python" ] || { echo "== making $venv"; "$python" -m venv "$venv"; }
wanted=$(cat setup.py pyproject.toml | cksum)
if [ "$(cat "$venv/.maskfeat-installed" 2>/dev/null || true)" != "$wanted" ]; then
  echo "== installing into $venv (PyTorch is large: a few minutes)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
  echo "$wanted" > "$venv/.maskfeat-installed"
fi
