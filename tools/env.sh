#!/bin/sh
# Makes .venv/ with the pinned packages and this package in editable mode, or
# leaves it alone when it is current. Needs Python 3.11 or newer, nothing else.
#   PYTHON=/path/to/python sh tools/env.sh      use this interpreter
set -eu
cd "$(dirname "$0")/.."

# True when "$1" runs, is new enough and can make a virtual environment: a name
# on PATH may be a version manager's stub, or a Debian Python without venv.
usable() {
  "$1" -c 'import sys, ensurepip, venv
sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
  set -- "$PYTHON"
else
  set -- python3.13 python3.12 python3.11 python3
fi

find_python() {
  for candidate in "$@"; do
    if usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "No usable Python among: $*. Needed: 3.11 or newer with the venv" \
    "module (on Debian and Ubuntu: apt install python3 python3-venv)." \
    "To name one: make PYTHON=/path/to/python" >&2
  exit 1
}

# A moved virtual environment is broken, so the place is a part of the stamp;
# `made` says where and with which interpreter, `installed` with which pins.
made="$(pwd) ${PYTHON:-}"
installed=$(cat pyproject.toml requirements.txt | cksum)
works() { .venv/bin/python -c 'import sys' >/dev/null 2>&1; }
same() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

if works && same .venv/made "$made"; then
  if same .venv/installed "$installed"; then
    exit 0
  fi
  echo "Updating .venv to the new pins ..."
else
  python=$(find_python "$@")
  echo "Making .venv with $("$python" -V 2>&1) (about a minute, once) ..."
  rm -rf .venv
  "$python" -m venv .venv
  echo "$made" >.venv/made
fi

rm -f .venv/installed
if ! .venv/bin/python -m pip install --quiet --no-input \
  --disable-pip-version-check --constraint requirements.txt \
  --editable '.[dev,plot]' >.venv/install.log 2>&1; then
  tail -n 25 .venv/install.log >&2
  echo "Installing the packages failed; the log is .venv/install.log" >&2
  exit 1
fi
echo "$installed" >.venv/installed
