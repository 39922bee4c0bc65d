#!/usr/bin/env bash
# Runs launch/worker.sh on one worker of a TPU slice, with its output in ~/rear_jax.log, and shows that.
#
#   launch/tpu_run.sh [--dry-run] ARGUMENTS of rear_jax.main
#
# The run outlives a lost connection. Started once more, this waits until the first run has ended and shows its log
# meanwhile; the second run then finds the work done.

set -euo pipefail
trap "" HUP
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

options "$@"
shift "$options"

PATH="$PWD/.venv/bin:$PATH"
command=(flock "$HOME/rear_jax.lock" bash launch/worker.sh "$@")
if $dry_run; then
  run "${command[@]}"
  exit 0
fi
log="$HOME/rear_jax.log"
touch "$log"
seen=$(wc --bytes <"$log")
"${command[@]}" >>"$log" 2>&1 &
child=$!
tail --pid="$child" --bytes=+$((seen + 1)) --follow "$log" || true # its reader may be gone
wait "$child"
