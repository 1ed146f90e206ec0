#!/usr/bin/env bash
# Runs a command on all hosts of a Cloud TPU slice, got as a queued resource.
#
#   launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE --project=PROJECT [OPTIONS]
#   launch/tpu_vm.sh run ... -- python -m agrpo_jax.main --config=...
#
# Actions, in the order in which one needs them:
#   create   put a request for the slice into the queue
#   wait     until the slice is there (exit code 1: it never will be, or timeout)
#   copy     this folder to all hosts; install packages; mount the bucket
#   run      start the command on all hosts and show its output until it ends;
#            it goes on if the connection is lost
#   up       create, wait, copy, run
#   logs     show the output again, from its start, until the command ends
#   status   of the request and, while it is ACTIVE, of the command
#   stop     ask the command to end; training saves a checkpoint first
#   delete   the slice and the request: only this ends the bill
#
# Options:
#   --accelerator-type=v6e-16   what to get (create, up); v5litepod-32, v5p-8, ...
#   --runtime-version=VERSION   default: by accelerator type
#   --spot                      cheaper, can be taken away at any time
#   --bucket=NAME               mounted as /bucket on all hosts (copy, up)
#   --timeout=86400             seconds that `wait` waits at most
#   --poll=30                   seconds between its questions
#   --dry-run                   print the commands instead of running them
#
# `copy` leaves out .git, .venv, runs and caches. After a preemption: delete, up;
# the same work directory below /bucket goes on from its last checkpoint.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

name='' zone='' project='' accelerator_type='' runtime_version='' bucket=''
spot=false timeout=86400 poll=30
parse "create wait copy run up logs status stop delete" \
  "name zone project accelerator-type runtime-version bucket timeout poll" \
  "spot" "$@"

expect name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
  "a name of at most 40 lowercase letters, digits and hyphens"
expect zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as europe-west4-a"
expect project '[a-z][-a-z0-9.:]{4,}[a-z0-9]' "a project id"
expect timeout '[0-9]+' "a number of seconds"
expect poll '[1-9][0-9]*' "a number of seconds, at least 1"
if [[ -n $bucket ]]; then
  expect bucket '[a-z0-9][-a-z0-9_.]+[a-z0-9]' "a bucket's name without gs://"
fi
case $action in create | up)
  expect accelerator-type '(v4|v5p|v5litepod|v6e)-[0-9]+' \
    "a type such as v6e-16, v5litepod-32, v5p-8 or v4-8"
  ;;
esac
case $action in run | up) expect_command ;;
  *) ((${#words[@]} == 0)) || problem "$action takes no command" ;;
esac
check
need gcloud

place=(--zone="$zone" --project="$project")
billed="The TPU is billed until: $script delete --name=$name ${place[*]}"

ssh_all() { # WHAT COMMAND, one string for the hosts' shells
  hint=$billed
  run "$1" gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" \
    --worker=all --command="$2"
  hint=''
}

create() {
  if [[ -z $runtime_version ]]; then
    case $accelerator_type in
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      *) runtime_version=tpu-ubuntu2204-base ;;
    esac
  fi
  local command=(gcloud compute tpus queued-resources create "$name"
    --node-id="$name" "${place[@]}" --accelerator-type="$accelerator_type"
    --runtime-version="$runtime_version")
  if $spot; then command+=(--spot); fi
  run "creating the request" "${command[@]}"
}

describe=(gcloud compute tpus queued-resources describe "$name" "${place[@]}"
  --format="value(state.state)")

ask_state() {
  local code=0
  state=$("${describe[@]}") || code=$?
  if ((code)); then
    stop "$code" "asking for the state of $name failed (exit code $code)."
  fi
}

wait_until_active() {
  local last=''
  if $dry_run; then
    echo "# Until it prints ACTIVE, every $poll s for at most $timeout s:"
    show "${describe[@]}"
    return
  fi
  show "${describe[@]}" >&2
  SECONDS=0
  while true; do
    ask_state
    if [[ $state != "$last" ]]; then echo "$name: $state" >&2; fi
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        stop 1 "$name is $state and will not become active. Delete it, then\
 create it again: $script delete --name=$name ${place[*]}"
        ;;
    esac
    if ((SECONDS >= timeout)); then
      stop 1 "$name is still $state after $timeout s; the request stays in\
 the queue. Wait again, or: $script delete --name=$name ${place[*]}"
    fi
    sleep "$poll"
  done
}

copy() {
  local archive=$root/runs/launch/$name.tgz
  run "making a folder" mkdir -p "$root/runs/launch"
  run "packing this folder" tar -czf "$archive" --exclude=./.git \
    --exclude=./.venv --exclude=./runs --exclude=__pycache__ \
    --exclude='./.*_cache' --exclude='*.egg-info' -C "$root" .
  hint=$billed
  run "copying to the hosts" gcloud compute tpus tpu-vm scp "$archive" \
    "$name:agrpo_jax.tgz" "${place[@]}" --worker=all
  ssh_all "setting up the hosts" "mkdir -p agrpo_jax &&\
 tar -xzf agrpo_jax.tgz -C agrpo_jax &&\
 bash agrpo_jax/launch/on_worker.sh setup $(quoted ${bucket:+"$bucket"})"
}

on_worker() { # WHAT ACTION [COMMAND...]
  local what=$1
  shift
  ssh_all "$what" "bash agrpo_jax/launch/on_worker.sh $(quoted "$@")"
}

case $action in
  create) create ;;
  wait) wait_until_active ;;
  copy) copy ;;
  run) on_worker "the command on a host" start "${words[@]}" ;;
  logs) on_worker "the command on a host" follow ;;
  stop) on_worker "stopping the command" stop ;;
  up)
    create
    wait_until_active
    copy
    on_worker "the command on a host" start "${words[@]}"
    ;;
  status)
    state=ACTIVE
    if $dry_run; then
      show "${describe[@]}"
      echo "# If it prints ACTIVE:"
    else
      show "${describe[@]}" >&2
      ask_state
      echo "$name: $state"
    fi
    if [[ $state == ACTIVE ]]; then on_worker "asking the hosts" status; fi
    ;;
  delete)
    run "deleting" gcloud compute tpus queued-resources delete "$name" \
      "${place[@]}" --force --quiet
    ;;
esac
