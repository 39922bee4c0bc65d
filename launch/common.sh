# shellcheck shell=bash
# Sourced by the launchers of this folder: --help, --dry-run and settings of the form --name=value.

dry_run=false
action=""
arguments=() # what comes after --

die() {
  echo "error: $*" >&2
  exit 1
}

# The comment at the top of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "SETTINGS" "ACTIONS" "$@": fills the variables named in SETTINGS, `action`, `arguments` and `dry_run`.
parse() {
  local settings=" $1 " actions=" $2 " key
  shift 2
  while (($#)); do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) dry_run=true ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      --*=*)
        key=${1%%=*}
        key=${key#--}
        [[ $settings == *" $key "* ]] || die "no setting --$key; there are:$settings(see --help)"
        printf -v "$key" %s "${1#*=}"
        ;;
      *)
        [[ $actions == *" $1 "* && -z $action ]] || die "unexpected ${1@Q}; actions are:$actions(see --help)"
        action=$1
        ;;
    esac
    shift
  done
  [[ -n $action || -z ${actions// /} ]] || die "say what to do, one of:$actions(see --help)"
}

# options "$@": --help and --dry-run alone, in front; `options` is how many there were.
# shellcheck disable=SC2034 # the callers shift by it
options() {
  options=0
  case ${1:-} in
    --help | -h)
      usage
      exit 0
      ;;
    --dry-run)
      dry_run=true
      options=1
      ;;
  esac
}

# require NAME...: settings that have no default.
require() {
  local key
  for key in "$@"; do
    [[ -n ${!key} ]] || die "--$key=... is needed (see --help)"
  done
}

# The command-line arguments of rear_jax.main: both --config and --workdir.
require_arguments() {
  local given=" ${arguments[*]} "
  [[ $given == *" --config="* && $given == *" --workdir="* ]] ||
    die "give the arguments of rear_jax.main after --, --config=FILE and --workdir=DIR among them"
}

# Words on one line, quoted for a shell where they need it.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Runs a command; with --dry-run prints it instead.
run() {
  if $dry_run; then
    quoted "$@"
  else
    "$@"
  fi
}
