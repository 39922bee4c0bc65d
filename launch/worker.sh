#!/usr/bin/env bash
# One process of a run: python -m rear_jax.main, which finds the others by the environment it is started in.
#
#   launch/worker.sh [--dry-run] ARGUMENTS of rear_jax.main
#
# SIGTERM and SIGINT are passed on: training saves its state first and ends. The exit status is 143 then, so that no
# scheduler takes an interrupted run for a finished one. The interpreter is the `python` of $PATH; relative paths in
# the arguments begin at this checkout.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

options "$@"
shift "$options"

stopped=false
# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopped=true
  kill -TERM "$child" 2>/dev/null || true
}
command=(python -m rear_jax.main "$@")
if $dry_run; then
  run "${command[@]}"
  exit 0
fi
"${command[@]}" & # not by `run`, which would be a shell between the signal and the trainer
child=$!
trap stop TERM INT

status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the child has ended
  status=0
  wait "$child" || status=$?
done
if $stopped; then
  exit 143
fi
exit "$status"
