# shellcheck shell=bash
# What the launchers share: help, options, messages, and commands that a dry run only prints.
# A script sets its options to their defaults, sources this file and calls `parse`.

dry_run='' program=() # $program: what follows -- on the command line

fail() { # MESSAGE [CODE]
  echo "error: $1" >&2
  exit "${2:-2}"
}

say() { echo "launch: $*" >&2; }

quoted() { # WORD...: the words as a line of a shell
  local word line=''
  for word; do
    [[ $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

run() { # COMMAND...: runs it; a dry run prints it, and leaves that to functions themselves
  if [[ -n $dry_run ]] && ! declare -F "$1" >/dev/null; then quoted "$@"; else "$@"; fi
}

step() { # WHAT COMMAND...: runs it; ends with its code if it fails
  local what=$1 code=0
  shift
  run "$@" || code=$?
  ((code == 0)) || fail "cannot $what: exit code $code, see above" "$code"
}

# parse 'OPTION ...' 'FLAG ...' ARGUMENT...
# --option=value sets $option, --flag sets $flag to yes; what follows -- becomes $program.
parse() {
  local options=" $1 " flags=" $2 dry_run " key
  shift 2
  while (($#)); do
    key=${1%%=*} key=${key#--}
    if [[ $1 == -- ]]; then
      shift
      program=("$@")
      return
    elif [[ $1 == --help || $1 == -h ]]; then
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0" # the comment that the script begins with
      exit 0
    elif [[ $1 == "--$key="?* && $options == *" $key "* ]]; then
      printf -v "$key" %s "${1#*=}"
    elif [[ $1 == "--$key" && $flags == *" $key "* ]]; then
      printf -v "$key" yes
    elif [[ $options == *" $key "* ]]; then
      fail "--$key needs a value: --$key=..."
    elif [[ $flags == *" $key "* ]]; then
      fail "--$key takes no value"
    elif [[ $1 == --config* || $1 == --workdir=* ]]; then
      fail "$1 belongs after -- , with the other options of the program"
    else
      fail "unknown option $1: $0 --help lists them"
    fi
    shift
  done
}

needed() { # OPTION...: fails if one has no value
  local key
  for key; do
    [[ -n ${!key} ]] || fail "--$key=... is missing"
  done
}

natural() { # OPTION...: fails if one is not a number from 1
  local key
  for key; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || fail "--$key=${!key} must be a whole number from 1"
  done
}

seconds() { # OPTION...: fails if one is not a time
  local key
  for key; do
    [[ ${!key} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--$key=${!key} must be a number of seconds"
  done
}

of_program() { # OPTION: its value among the options of the program; fails if it is not there
  local word
  for word in "${program[@]}"; do
    if [[ $word == "--$1="?* ]]; then
      echo "${word#*=}"
      return
    fi
  done
  fail "--$1=... of the program is missing: give it after --"
}
