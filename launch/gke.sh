#!/usr/bin/env bash
# Runs rear_jax on a TPU slice of a GKE cluster, as the JobSet of launch/gke_jobset.yaml.
#
#   launch/gke.sh [--dry-run] --SETTING=VALUE... ACTION [-- ARGUMENTS of rear_jax.main]
#
#   launch/gke.sh --image=REGION-docker.pkg.dev/P/R/rear-jax --bucket=B --service_account=S \
#       apply -- --config=configs/rear_b.py --workdir=/mnt/bucket/rear_b
#
# The cluster has the JobSet controller, the Cloud Storage FUSE driver and a TPU node pool; kubectl points at it.
#
# Actions
#   image    build launch/Dockerfile from this checkout, and push it
#   apply    start the run; it is restarted after every preemption and failure, up to --restarts times
#   logs     follow the log of worker 0
#   status   describe the JobSet
#   delete   end the run
#
# Settings
#   --image, --bucket, --service_account   yours; the Kubernetes service account may read and write the bucket
#   --name=rear-jax                        of the JobSet
#   --namespace=default
#   --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4
#                                          kind and shape of the slice, its machines, and chips on each of them
#   --spot=true                            nodes that are cheaper, and can be taken away at any time
#   --restarts=100
#
# Cost: nodes cost while they are there; a node pool that scales to zero gives them back after `delete` or the end.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

# shellcheck disable=SC2034 # manifest() reads all of them by name
{
  image="" bucket="" service_account=""
  name=rear-jax
  namespace=default
  accelerator=tpu-v5-lite-podslice
  topology=4x4
  hosts=4
  chips=4
  spot=true
  restarts=100
}

# Words as a JSON list of strings, which is YAML too.
json_list() {
  local word list=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  echo "[$list]"
}

# launch/gke_jobset.yaml with everything in double braces filled in.
# shellcheck disable=SC2034 # spot_label is read by its name
manifest() {
  local text key value spot_label=Exists
  [[ $spot == true ]] || spot_label=DoesNotExist
  text=$(<launch/gke_jobset.yaml)
  for key in name namespace image bucket service_account accelerator topology hosts chips restarts spot_label; do
    text=${text//"{{$key}}"/"${!key}"}
  done
  value=$(json_list "${arguments[@]}")
  text=${text//"{{arguments}}"/"$value"}
  echo "$text"
}

apply() {
  if $dry_run; then
    echo "kubectl apply --filename=- <<'YAML'"
    manifest
    echo "YAML"
  else
    manifest | kubectl apply --filename=-
  fi
}

parse "image bucket service_account name namespace accelerator topology hosts chips spot restarts" \
  "image apply logs status delete" "$@"
case $action in
  image)
    require image
    run docker build --file=launch/Dockerfile --tag="$image" .
    run docker push "$image"
    ;;
  apply)
    require image bucket service_account
    require_arguments
    apply
    ;;
  logs)
    worker="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    run kubectl logs --namespace="$namespace" --selector="$worker" --container=rear-jax --tail=100 --follow
    ;;
  status) run kubectl describe jobset "$name" --namespace="$namespace" ;;
  delete) run kubectl delete jobset "$name" --namespace="$namespace" ;;
esac
