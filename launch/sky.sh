#!/usr/bin/env bash
# Runs a command as a managed SkyPilot job, which moves on after a preemption.
#
#   launch/sky.sh ACTION --name=NAME [OPTIONS] [-- python -m agrpo_jax.main ...]
#
# Actions:
#   submit   launch/sky.yaml with the command
#   status   of all managed jobs
#   logs     follow the output
#   delete   cancel the job and its machines
#
# Options:
#   --accelerators=tpu-v6e-8     or H100:8, H200:8, A100-80GB:8, ...
#   --bucket=gs://NAME           or s3://NAME; mounted as /bucket on every node
#   --nodes=1                    machines with these accelerators
#   --infra=gcp                  cloud[/region[/zone]]; default: SkyPilot's choice
#   --spot                       cheaper, can be taken away at any time
#   --dry-run                    print the commands instead of running them

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

name='' accelerators='' bucket='' nodes=1 infra='' spot=false
parse "submit status logs delete" "name accelerators bucket nodes infra" \
  "spot" "$@"

if [[ $action != status ]]; then
  expect name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
    "a name of at most 40 lowercase letters, digits and hyphens"
fi
if [[ $action == submit ]]; then
  expect accelerators 'tpu-[a-z0-9]+-[0-9]+|[A-Za-z0-9-]+:[1-9][0-9]*' \
    "accelerators such as tpu-v6e-8 or H100:8"
  expect bucket '(gs|s3)://[a-z0-9][-a-z0-9_.]+[a-z0-9]' \
    "a bucket such as gs://my-bucket"
  expect nodes '[1-9][0-9]*' "a number of nodes"
  if [[ -n $infra ]]; then
    expect infra '[a-z0-9*-]+(/[a-z0-9*-]+){0,2}' "a cloud such as gcp/us-east5"
  fi
  if [[ $accelerators == tpu-* && $nodes != 1 ]]; then
    problem "--nodes=$nodes: several TPU hosts are one slice; ask for a larger one"
  fi
  expect_command
else
  ((${#words[@]} == 0)) || problem "$action takes no command"
fi
check
need sky

case $action in
  submit)
    extra=cuda
    if [[ $accelerators == tpu-* ]]; then extra=tpu; fi
    command=(sky jobs launch --yes --name="$name" --gpus="$accelerators"
      --num-nodes="$nodes")
    if [[ -n $infra ]]; then command+=(--infra="$infra"); fi
    if $spot; then command+=(--use-spot); fi
    cd "$root" # the folder that sky.yaml takes along
    run "submitting" "${command[@]}" --env="BUCKET=$bucket" \
      --env="EXTRA=$extra" --env="RUN=$(quoted "${words[@]}")" launch/sky.yaml
    ;;
  status) run "asking for the state" sky jobs queue ;;
  logs) run "following the output" sky jobs logs --name="$name" --follow ;;
  delete) run "cancelling" sky jobs cancel --yes --name="$name" ;;
esac
