#!/usr/bin/env bash
# Runs rear_jax on GPU nodes of a SLURM cluster, one process per node.
#
#   launch/slurm.sh [--dry-run] --SETTING=VALUE... ACTION [-- ARGUMENTS of rear_jax.main]
#
#   launch/slurm.sh --nodes=2 --gpus=8 submit -- --config=configs/rear_b.py --workdir=/shared/rear_b
#
# Activate the environment that has rear_jax and "jax[cuda12]" first: jobs inherit it. This checkout and the workdir
# lie on a file system that all nodes see.
#
# Actions
#   submit   queue the job; it goes on by itself after a preemption and after each time limit, until the run is done
#   run      inside a job or an salloc: srun on its nodes
#   logs     follow the log
#   status   list the job
#   delete   cancel the job
#
# Settings
#   --name=rear-jax    of the job; its log is NAME.log in the present folder
#   --nodes=1          processes, one on each node
#   --gpus=8           on each node
#   --cpus=32          on each node; reading images is what they do
#   --time=24:00:00    limit of one turn; the run is asked to save five minutes before it ends
#   --partition, --account   where your cluster wants them
#
# Cost: a job occupies all its nodes until it ends; `delete` one that you have no use for.

set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$launch/common.sh"

name=rear-jax
nodes=1
gpus=8
cpus=32
time=24:00:00
partition="" account=""

submit() {
  local flags=(--job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus" --cpus-per-task="$cpus")
  flags+=(--time="$time" --requeue --signal=B:USR1@300 --output="$name.log" --open-mode=append)
  if [[ -n $partition ]]; then
    flags+=(--partition="$partition")
  fi
  if [[ -n $account ]]; then
    flags+=(--account="$account")
  fi
  local job
  job=$(quoted exec bash "$launch/slurm.sh" --nodes="$nodes" --gpus="$gpus" --cpus="$cpus" run -- "${arguments[@]}")
  run sbatch "${flags[@]}" --wrap="$job"
}

# jax gives a SLURM process one GPU unless it is told which: here all of the node's.
run_on_nodes() {
  local devices
  devices=$(seq --separator=, 0 $((gpus - 1)))
  local step=(srun --nodes="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1)
  step+=(env JAX_LOCAL_DEVICE_IDS="$devices" bash "$launch/worker.sh" "${arguments[@]}")
  if $dry_run; then
    run "${step[@]}"
    return
  fi
  "${step[@]}" &
  local child=$! status=0
  # shellcheck disable=SC2064 # the child's number is known now
  trap "requeue $child" USR1
  wait "$child" || status=$?
  return "$status"
}

# The time limit is near: srun passes SIGTERM on, the run saves, and the job goes back to the queue.
requeue() {
  kill -TERM "$1"
  if ! wait "$1"; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit 0
}

parse "name nodes gpus cpus time partition account" "submit run logs status delete" "$@"
case $action in
  submit)
    require_arguments
    submit
    ;;
  run)
    require_arguments
    run_on_nodes
    ;;
  logs) run tail --lines=100 --follow=name --retry "$name.log" ;;
  status) run squeue --me --name="$name" ;;
  delete) run scancel --me --name="$name" ;;
esac
