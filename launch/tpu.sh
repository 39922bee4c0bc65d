#!/usr/bin/env bash
# Runs rear_jax on a Cloud TPU slice, asked for as a queued resource.
#
#   launch/tpu.sh [--dry-run] --SETTING=VALUE... ACTION [-- ARGUMENTS of rear_jax.main]
#
#   launch/tpu.sh --project=P --zone=Z --bucket=B up -- --config=configs/rear_b.py --workdir=/mnt/bucket/rear_b
#
# Actions
#   up       all of it: create, set up, run; after a preemption again from the start; delete when the run is done
#   create   ask for the slice
#   wait     until it is there
#   setup    copy this checkout's last commit to every worker, install it, mount the bucket at /mnt/bucket
#   run      run on every worker and stream their output; a run that is still going is followed, not doubled
#   logs     follow the log of worker 0
#   status   print the state of the request
#   delete   give the slice back
#
# Settings
#   --project, --zone, --bucket   yours; the slice and the bucket belong into one region
#   --name=rear-jax               of the request and of its node
#   --accelerator=v5litepod-16    type and number of chips
#   --runtime=v2-alpha-tpuv5-lite the software version that goes with it
#   --spot=true                   cheaper, and can be taken away at any time
#   --poll=60                     seconds between two looks at the state
#   --max_failures=3              `up` gives up after so many failures in a row that are no preemption
#
# Cost: a slice costs from ACTIVE until it is deleted, busy or idle. `up` deletes it when the run is done; after
# anything else, `delete` it yourself. Run `up` on a machine that stays on, in tmux or the like.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

project="" zone="" bucket=""
name=rear-jax
accelerator=v5litepod-16
runtime=v2-alpha-tpuv5-lite
spot=true
poll=60
max_failures=3

queue() { # an action on the request
  run gcloud compute tpus queued-resources "$@" --project="$project" --zone="$zone"
}

vm() { # an action on its machines
  run gcloud compute tpus tpu-vm "$@" --project="$project" --zone="$zone"
}

create() {
  local flags=(--node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime")
  if [[ $spot == true ]]; then
    flags+=(--spot)
  fi
  queue create "$name" "${flags[@]}" --scopes=https://www.googleapis.com/auth/cloud-platform
}

delete() {
  queue delete "$name" --force --quiet
}

# ACTIVE, SUSPENDED, ...; ABSENT where there is no such request; UNKNOWN where the question was not answered.
state() {
  local answer
  if answer=$(queue describe "$name" --format="value(state.state)" 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

wait_for_slice() {
  if $dry_run; then
    state
    return
  fi
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    [[ $now != @(ABSENT|FAILED|SUSPENDING|SUSPENDED) ]] || die "the request $name is $now: delete it, create it again"
    echo "$name is $now" >&2
    sleep "$poll"
  done
}

setup() {
  local archive=rear_jax.tar.gz unpack
  unpack="mkdir -p rear_jax && tar -xzf $archive -C rear_jax && bash rear_jax/launch/tpu_setup.sh $(quoted "$bucket")"
  run git archive --format=tar.gz --output="${TMPDIR:-/tmp}/$archive" HEAD &&
    vm scp "${TMPDIR:-/tmp}/$archive" "$name:$archive" --worker=all &&
    vm ssh "$name" --worker=all --command="$unpack"
}

run_on_workers() {
  vm ssh "$name" --worker=all --command="bash rear_jax/launch/tpu_run.sh $(quoted "${arguments[@]}")"
}

up() {
  if $dry_run; then
    create && wait_for_slice && setup && run_on_workers && delete
    return
  fi
  local failures=0 now
  while true; do
    now=$(state)
    echo "$name is $now" >&2
    case $now in
      ABSENT) create ;;
      SUSPENDED) delete ;;
      FAILED)
        failures=$((failures + 1))
        ((failures < max_failures)) || die "the request $name FAILED $failures times: see \`status\`, then \`delete\`"
        delete
        ;;
      ACTIVE)
        if setup && run_on_workers; then
          break
        fi
        sleep "$poll" # a preemption shows after the connection has broken
        if [[ $(state) == ACTIVE ]]; then
          failures=$((failures + 1))
          ((failures < max_failures)) || die "the run failed $failures times; $name is still there, and costs"
        else
          failures=0
        fi
        ;;
    esac
    sleep "$poll"
  done
  delete
}

parse "project zone bucket name accelerator runtime spot poll max_failures" \
  "up create wait setup run logs status delete" "$@"
require project zone
case $action in
  up)
    require bucket
    require_arguments
    up
    ;;
  create) create ;;
  wait) wait_for_slice ;;
  setup)
    require bucket
    setup
    ;;
  run)
    require_arguments
    run_on_workers
    ;;
  logs) vm ssh "$name" --worker=0 --command="tail --lines=100 --follow=name --retry rear_jax.log" ;;
  status) queue describe "$name" ;;
  delete) delete ;;
esac
