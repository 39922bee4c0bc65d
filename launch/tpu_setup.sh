#!/usr/bin/env bash
# Sets up one worker of a TPU slice: an environment with jax for TPUs, and the bucket at /mnt/bucket.
#
#   launch/tpu_setup.sh [--dry-run] BUCKET
#
# Runs on the worker; a second time it finds everything done. Python comes by uv, because TPU images carry an older one.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

options "$@"
shift "$options"
bucket=${1:-}
[[ -n $bucket ]] || die "give the name of the bucket"

uv="$HOME/.local/bin/uv"
if $dry_run || [[ ! -x $uv ]]; then
  run env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
fi
if $dry_run || [[ ! -d .venv ]]; then
  run "$uv" venv --python=3.12 .venv
fi
run "$uv" pip install --quiet --python=.venv/bin/python --editable='.[text,tpu,gcs]'

if $dry_run || ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  run sudo curl --silent --show-error --output "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg
  source="deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(. /etc/os-release && echo "$VERSION_CODENAME") main"
  run sudo sh -c "echo '$source' >/etc/apt/sources.list.d/gcsfuse.list"
  apt_get=(sudo apt-get --quiet --quiet --option=DPkg::Lock::Timeout=600) # a fresh machine upgrades itself first
  run "${apt_get[@]}" update
  run "${apt_get[@]}" install --yes gcsfuse
fi
if $dry_run || ! mountpoint --quiet /mnt/bucket; then
  run sudo mkdir -p /mnt/bucket
  run sudo chown "$(id -u):$(id -g)" /mnt/bucket
  # Checkpoints are written under another name and renamed: of a folder, gcsfuse allows that only up to a limit.
  # What other hosts have written since is seen at once: gcsfuse remembers files for a minute, on some TPUs for ever.
  run gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 "$bucket" /mnt/bucket
fi
