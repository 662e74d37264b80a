# Sourced by quickstart.sh and test.sh: makes a virtual environment with maskfeat installed, and sets $venv.
# A second run finds it installed and takes a second.
venv=${MASKFEAT_VENV:-$PWD/.venv}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "maskfeat needs Python 3.10 or later, and $python is $("$python" --version 2>&1): set PYTHON=python3.x" >&2
  exit 1
fi
# None, or one that was made in part: what is installed was made whole, and pip takes a second to answer.
if [ ! -f "$venv/.maskfeat-installed" ] && ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
  echo "== making $venv"
  "$python" -m venv "$venv"
fi
extras=${MASKFEAT_EXTRAS:-dev}
sum=$(cat setup.py pyproject.toml | cksum)
case "$(cat "$venv/.maskfeat-installed" 2>/dev/null || true)" in
  "$extras $sum" | "dev,trackers $sum") ;; # the latter has all that is asked for
  *)
    echo "== installing into $venv (PyTorch is large: a few minutes)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
    echo "$extras $sum" > "$venv/.maskfeat-installed"
    ;;
esac
