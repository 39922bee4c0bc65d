#!/usr/bin/env bash
# Prepares ImageNet-1k, or another TFDS data set with image and label, as ArrayRecord files for --job=tokenize.
#
#   launch/prepare_imagenet.sh [--dry-run] --downloads=DIR --data_dir=DIR [--venv=DIR] [--dataset=NAME]
#
# TensorFlow is needed for this step only, and lives in an environment of its own; rear_jax reads the result without.
#
# Settings
#   --downloads              folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as image-net.org gives
#                            them to those who register; for a data set that TFDS downloads itself, leave it out
#   --data_dir               where the prepared set goes: 156 GB for ImageNet, beside the archives' 144 GB
#   --venv=DATA_DIR/venv     the environment with TensorFlow, made where it is missing
#   --tensorflow=tensorflow-cpu   the package; `tensorflow` where there is no other
#   --dataset=imagenet2012

set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$launch/common.sh"

downloads="" data_dir="" venv=""
tensorflow="tensorflow-cpu"
dataset=imagenet2012
parse "downloads data_dir venv tensorflow dataset" "" "$@"
require data_dir
venv=${venv:-$data_dir/venv}
if [[ $dataset == imagenet2012 ]]; then
  require downloads
  for split in train val; do
    archive="$downloads/ILSVRC2012_img_$split.tar"
    $dry_run || [[ -f $archive ]] || die "$archive is missing: get it from image-net.org"
  done
fi

if $dry_run || [[ ! -x $venv/bin/python ]]; then
  run python3 -m venv "$venv"
  run "$venv/bin/pip" install --quiet "$tensorflow" tensorflow-datasets array-record importlib_resources
fi
run env CUDA_VISIBLE_DEVICES= "$venv/bin/python" "$launch/prepare_tfds.py" "$dataset" "$data_dir" "$downloads"
