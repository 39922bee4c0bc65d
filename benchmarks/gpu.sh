#!/usr/bin/env bash
# Measures on one GPU what the issues ask of it, the most wanted first, within a time limit.
#
#   benchmarks/gpu.sh [--minutes=9] [--only=NAME,...] [--out=FOLDER] [--list]
#   benchmarks/gpu.sh --toy    # every command at toy size on the CPU
#
# Tables go to the terminal and to FOLDER/gpu.md as they are measured, what programs complain of to FOLDER/errors.txt.
# A command that fails or takes too long does not stop the next. FOLDER is $OUT, or /tmp/rear_jax_gpu.
#
# Set PYTHON to another Python with rear_jax's requirements and a JAX that sees the GPU. XLA takes 0.9 of the GPU's
# memory at the start (XLA_PYTHON_CLIENT_MEM_FRACTION); what does not fit in it is said in the row.

set -uo pipefail
cd "$(dirname "$0")/.." || exit

minutes=9
only=""
out=${OUT:-${TMPDIR:-/tmp}/rear_jax_gpu}
toy=false
list=false
scratch=DIR
python=${PYTHON:-python3}
names=" "

# What replaces the sizes of a script with --toy.
declare -A small=(
  [attention.py]="--shapes=toy --batch=2 --calls=1 --repeats=1"
  [train_step.py]="--config=tests/toy_config.py --batch=4 --doublings=1 --repeats=1"
  [posttrain_step.py]="--width=32 --layers=2 --heads=2 --codes=4 --codebook=64 --channels=32 --batch=8 --group=2 --repeats=1"
  [sample.py]="--config=tests/toy_config.py --images=24 --batch=8 --repeats=1"
  [decode.py]="--width=32 --layers=2 --heads=2 --codes=16 --codebook=64 --batch=4 --repeats=1"
  [evaluate.py]="--batch=2 --generated=60 --real=50 --repeats=1"
)

# measure NAME SECONDS SCRIPT FLAGS...: runs a script for at most so long, in what is left of the time.
measure() {
  local name=$1 limit=$2 script=$3
  shift 3
  names+="$name "
  [[ -z $only || ,$only, == *",$name,"* ]] || return 0
  if $list; then
    echo "$name: benchmarks/$script $*"
    return 0
  fi
  local left=$((end - SECONDS))
  if ((left < 15)); then
    echo "## $name: skipped, the time is over"
    return 0
  fi
  local flags=("$@") extra=()
  if $toy; then
    read -ra extra <<<"${small[$script]}"
    limit=$left
    [[ " $* " != *" --model=alitok "* ]] || extra+=(--codes=21)
  fi
  local since=$SECONDS status
  echo "## $name"
  echo
  echo "    python benchmarks/$script ${flags[*]} ${extra[*]}"
  echo
  timeout --kill-after=10 $((left < limit ? left : limit)) \
    "$python" "benchmarks/$script" "${flags[@]}" "${extra[@]}" 2>"$scratch/stderr"
  status=$?
  cat "$scratch/stderr" >>"$out/errors.txt"
  echo
  case $status in
    0) ;;
    124 | 137) echo "**stopped at its time limit**" ;;
    *)
      echo "**failed with status $status:**"
      tail -n 5 "$scratch/stderr"
      ;;
  esac
  echo "$((SECONDS - since)) s"
  echo
}

# Everything, in order of value.
measurements() {
  local bf16=(--dtype=bfloat16 --unroll=1) decode=(decode.py --ours)
  local rear_b=(--width=768 --layers=24 --heads=16) rear_l=(--width=1024 --layers=24 --heads=16)
  local alitok_b=(--model=alitok --codes=273 --codebook=4096 --width=768 --layers=24 --heads=16)
  local pixels=(--model=llamagen --codes=576 --codebook=16384 --channels=128 --perceptual=lpips --repeats=3)
  local xl=(--width=1280 --layers=36 --heads=20) xxl=(--width=1536 --layers=48 --heads=24)

  measure attention 180 attention.py --batch=64
  measure train_rear_b 150 train_step.py --config=configs/rear_b.py --batch=64 --doublings=2
  measure posttrain_xl 240 posttrain_step.py "${pixels[@]}" "${xl[@]}" "${bf16[@]}" --batch=16
  measure decode_rear_b_128 200 "${decode[@]}" "${rear_b[@]}" "${bf16[@]}" --batch=128
  measure sample_rear_b 240 sample.py --config=configs/rear_b.py
  measure train_rear_l 150 train_step.py --config=configs/rear_l.py --batch=64 --doublings=1
  measure decode_alitok_b_128 150 "${decode[@]}" "${alitok_b[@]}" "${bf16[@]}" --batch=128
  measure posttrain_xxl 300 posttrain_step.py "${pixels[@]}" "${xxl[@]}" "${bf16[@]}" --batch=16 --remat=full
  measure sample_rear_l 300 sample.py --config=configs/rear_l.py
  measure train_llamagen_xl 150 train_step.py --config=configs/llamagen_xl.py --batch=16 --doublings=3
  measure inception 120 evaluate.py --batch=128 --generated=10000 --real=10000
  measure decode_alitok_b_256 150 "${decode[@]}" "${alitok_b[@]}" "${bf16[@]}" --batch=256
  measure train_rear_s 120 train_step.py --config=configs/rear_s.py --batch=64 --doublings=3
  measure profile_rear_b 120 train_step.py --config=configs/rear_b.py --batch=64 --profile="$scratch/profile_rear_b"
  measure profile_rear_l 120 train_step.py --config=configs/rear_l.py --batch=32 --profile="$scratch/profile_rear_l"
  measure train_rear_b_products 150 train_step.py --config=configs/rear_b.py --remat=products --batch=64 --doublings=3
  measure train_rear_l_products 150 train_step.py --config=configs/rear_l.py --remat=products --batch=64 --doublings=3
  measure train_llamagen_xl_full 150 train_step.py --config=configs/llamagen_xl.py --remat=full --batch=32 --doublings=3
  measure posttrain_xl_recipe 300 posttrain_step.py "${pixels[@]}" "${xl[@]}" "${bf16[@]}" --remat=full \
    --batch=128 --accumulation=8
  measure posttrain_xl_bf16 240 posttrain_step.py "${pixels[@]}" "${xl[@]}" "${bf16[@]}" --batch=16 \
    --tokenizer-dtype=bfloat16
  measure decode_rear_l_128 200 "${decode[@]}" "${rear_l[@]}" "${bf16[@]}" --batch=128
  measure decode_rear_b_256 200 "${decode[@]}" "${rear_b[@]}" "${bf16[@]}" --batch=256
  measure decode_rear_l_256 200 "${decode[@]}" "${rear_l[@]}" "${bf16[@]}" --batch=256
}

# The machine, then everything.
main() {
  echo "# $(date -u +%F)"
  echo
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
  "$python" -c 'import jax; print("jax", jax.__version__, *{d.device_kind for d in jax.devices()}, jax.default_backend())'
  echo
  measurements
}

die() {
  echo "error: $*" >&2
  exit 1
}

while (($#)); do
  case $1 in
    --help | -h)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --minutes=*) minutes=${1#*=} ;;
    --only=*) only=${1#*=} ;;
    --out=*) out=${1#*=} ;;
    --toy) toy=true ;;
    --list) list=true ;;
    *) die "no flag ${1@Q} (see --help)" ;;
  esac
  shift
done
[[ $minutes =~ ^[0-9]+$ ]] || die "--minutes=${minutes@Q} is no whole number"
end=$((minutes * 60))

wanted=$only only="" chosen=$list list=true
measurements >/dev/null # fills `names`
only=$wanted list=$chosen
for name in ${only//,/ }; do
  [[ $names == *" $name "* ]] || die "no measurement $name; there are:$names"
done
if $list; then
  measurements
  exit
fi

mkdir -p "$out"
: >"$out/errors.txt" || die "$out cannot be written"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/compiled} # what was tuned once is not tuned again
if $toy; then
  export JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
  export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" # to compile quickly
else
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
  "$python" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' || die "JAX sees no GPU; try --toy"
fi
main | tee "$out/gpu.md"
