# shellcheck shell=bash
# What the launchers share. Nothing runs before it is shown: `run` prints each
# command as one could type it, and with --dry-run that is all it does.
set -euo pipefail

# shellcheck disable=SC2034 # the launchers use it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=launch/$(basename "$0")
dry_run=false
problems=()
action=''
words=() # the command after `--`

# The comment at the top of the script.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# stop CODE MESSAGE
stop() {
  printf '%s: %s\n' "$script" "$2" >&2
  exit "$1"
}

problem() { problems+=("$*"); }

# parse "ACTIONS" "VALUES" "SWITCHES" ARGUMENTS...: the first argument is the
# action; --a-name=x sets a_name=x for the names in VALUES, --a-switch sets
# a_switch=true, and what follows -- goes to words.
parse() {
  local actions=": $1" values=" $2 " switches=" $3 dry-run " option
  shift 3
  if [[ ${1:---} == --* && ${1:-} != --help ]]; then
    problem "an action is missing, one of$actions"
  elif [[ ${1:-} != --help ]]; then
    action=$1
    [[ "$actions " == *" $action "* ]] || problem "'$1' is none of$actions"
    shift
  fi
  while (($#)); do
    option=${1%%=*}
    option=${option#--}
    case $1 in
      --help)
        usage
        exit 0
        ;;
      --)
        shift
        words=("$@")
        return
        ;;
      --*=*)
        if [[ $values == *" $option "* ]]; then
          printf -v "${option//-/_}" %s "${1#*=}"
        else
          problem "there is no option --$option=..."
        fi
        ;;
      --*)
        if [[ $switches == *" $option "* ]]; then
          printf -v "${option//-/_}" %s true
        elif [[ $values == *" $option "* ]]; then
          problem "--$option needs a value: --$option=..."
        else
          problem "there is no option --$option"
        fi
        ;;
      *) problem "unexpected '$1'; the command to run goes after --" ;;
    esac
    shift
  done
}

# expect OPTION REGEX MEANING: a problem unless the option's value matches.
expect() {
  local variable=${1//-/_}
  local value=${!variable}
  if [[ -z $value ]]; then
    problem "--$1=... is missing: $3"
  elif [[ ! $value =~ ^($2)$ ]]; then
    problem "--$1=$value is not $3"
  fi
}

expect_command() {
  if ((${#words[@]} == 0)); then
    problem "the command to run is missing: ... -- python -m agrpo_jax.main ..."
  fi
}

# Reports every problem at once and ends with code 2.
check() {
  if ((${#problems[@]})); then
    printf "$script: %s\n" "${problems[@]}" >&2
    echo "$script --help lists the options." >&2
    exit 2
  fi
}

# need PROGRAM: it is on PATH, or this is a dry run.
need() {
  if ! $dry_run && ! command -v "$1" >/dev/null; then
    stop 2 "$1 is not installed or not on PATH (--dry-run needs no program)."
  fi
}

# Words as a shell would read them back, whatever is in them.
quoted() {
  local separator='' word single="'" escaped="'\\''"
  for word in "$@"; do
    if [[ -z $word || $word == *[!A-Za-z0-9_./:=,@%+-]* ]]; then
      word="'${word//$single/$escaped}'"
    fi
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

show() { printf '%s\n' "$(quoted "$@")"; }

# run WHAT COMMAND...: shows the command and runs it. When it fails, this ends
# with its exit code and says that WHAT failed, and $hint when there is one.
hint=''
run() {
  local what=$1 code=0
  shift
  if $dry_run; then
    show "$@"
    return
  fi
  show "$@" >&2
  "$@" || code=$?
  if ((code)); then
    stop "$code" "$what failed (exit code $code).${hint:+ $hint}"
  fi
}
