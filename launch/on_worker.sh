#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every host of a slice.
#
#   launch/on_worker.sh setup [BUCKET]    install packages, mount the bucket
#   launch/on_worker.sh start COMMAND...  start it, unless it runs, and follow it
#   launch/on_worker.sh follow            its output until it ends, with its exit code
#   launch/on_worker.sh status            running, or how it ended
#   launch/on_worker.sh stop              SIGTERM to the command
#
# Files in runs/worker: command, log, pid, supervisor (its parent), exit.

set -euo pipefail
cd "$(dirname "$0")/.."
folder=runs/worker
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
export AGRPO_DISTRIBUTED=auto # the hosts of a slice find each other

alive() { [[ -s $folder/$1 ]] && kill -0 "$(<"$folder/$1")" 2>/dev/null; }

fail() {
  echo "$(uname -n): $2" >&2
  exit "$1"
}

setup() {
  local fuse=3.12.1
  # The system's Python may be too old; uv brings one.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python=3.12 .venv
  python3 -m uv pip install --quiet --constraint requirements.txt \
    --editable '.[tpu,hub]'
  if (($# == 0)) || mountpoint -q /bucket; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL -o /tmp/gcsfuse.deb "https://github.com/GoogleCloudPlatform/\
gcsfuse/releases/download/v$fuse/gcsfuse_${fuse}_amd64.deb"
    sudo apt-get install -y -q /tmp/gcsfuse.deb
  fi
  sudo mkdir -p /bucket
  sudo chown "$(id -u)" /bucket
  # No caches: a host has to see at once what another one wrote.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 --kernel-list-cache-ttl-secs=0 \
    "$1" /bucket
}

# The parent of the command: it outlives the connection, not the command.
supervise() {
  local code=0
  "$@" &
  echo $! >"$folder/pid"
  wait $! || code=$?
  echo "$code" >"$folder/exit"
}

start() {
  (($#)) || fail 2 "no command to start"
  if alive supervisor && [[ $(<$folder/command) == "${*@Q}" ]]; then
    follow # gcloud says it again when a connection breaks
  elif alive supervisor; then
    fail 2 "process $(<$folder/pid) is still running: follow or stop it first"
  fi
  mkdir -p "$folder"
  rm -f "$folder/pid" "$folder/exit"
  echo "${*@Q}" >"$folder/command"
  : >"$folder/log" # follow may be faster than the command
  setsid bash launch/on_worker.sh supervise "$@" \
    >>"$folder/log" 2>&1 </dev/null &
  echo $! >"$folder/supervisor"
  follow
}

follow() {
  [[ -s $folder/supervisor ]] || fail 2 "nothing was started here"
  tail --pid="$(<$folder/supervisor)" -s 0.2 -n +1 -f "$folder/log"
  [[ -s $folder/exit ]] || fail 1 "the command vanished: did the host restart?"
  exit "$(<$folder/exit)"
}

status() {
  if alive supervisor; then
    echo "$(uname -n): running, process $(<$folder/pid)"
  elif [[ -s $folder/exit ]]; then
    echo "$(uname -n): ended with exit code $(<$folder/exit)"
  else
    echo "$(uname -n): nothing is running"
  fi
}

case ${1:-} in
  setup | supervise | start | follow | status) "$@" ;;
  stop) if alive pid; then kill -TERM "$(<$folder/pid)"; fi ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
