#!/usr/bin/env bash
# Runs a command on GPUs of a SLURM cluster, one process per GPU.
#
#   launch/slurm.sh ACTION --name=NAME [OPTIONS] [-- python -m agrpo_jax.main ...]
#
# Actions:
#   submit   launch/slurm.sbatch with the command
#   status   of the job
#   logs     follow runs/launch/NAME.log
#   delete   cancel the job
#
# Options:
#   --nodes=1
#   --gpus-per-node=8
#   --cpus-per-gpu=8        graders are processes too
#   --time=24:00:00         limit of one start; the job is queued again at its end
#   --partition=P --account=A
#   --dry-run               print the commands instead of running them
#
# The folder must be on a file system that all nodes share; the command runs in
# it, with .venv/bin first on PATH.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

name='' nodes=1 gpus_per_node=8 cpus_per_gpu=8 time=24:00:00 partition='' account=''
parse "submit status logs delete" \
  "name nodes gpus-per-node cpus-per-gpu time partition account" "" "$@"

expect name '[A-Za-z0-9][-A-Za-z0-9_.]*' "a name of letters, digits and - _ ."
expect nodes '[1-9][0-9]*' "a number of nodes"
expect gpus-per-node '[1-9][0-9]*' "a number of GPUs"
expect cpus-per-gpu '[1-9][0-9]*' "a number of CPUs"
expect time '([0-9]+-)?[0-9]+(:[0-9]+){0,2}' "a limit such as 24:00:00 or 2-00:00"
if [[ $action == submit ]]; then
  expect_command
else
  ((${#words[@]} == 0)) || problem "$action takes no command"
fi
check
log=$root/runs/launch/$name.log

case $action in
  submit)
    need sbatch
    run "making a folder" mkdir -p "$root/runs/launch"
    command=(sbatch --job-name="$name" --output="$log"
      --chdir="$root" --nodes="$nodes" --ntasks-per-node="$gpus_per_node"
      --gpus-per-node="$gpus_per_node" --cpus-per-task="$cpus_per_gpu"
      --time="$time")
    if [[ -n $partition ]]; then command+=(--partition="$partition"); fi
    if [[ -n $account ]]; then command+=(--account="$account"); fi
    run "submitting" "${command[@]}" "$root/launch/slurm.sbatch" "${words[@]}"
    ;;
  status)
    need squeue
    run "asking for the state" squeue --me --name="$name"
    ;;
  logs) run "following the output" tail -n +1 -F "$log" ;;
  delete)
    need scancel
    run "cancelling" scancel --me --name="$name"
    ;;
esac
