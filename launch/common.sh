# shellcheck shell=bash
# Shared by the launchers: help, options, messages, and commands that a dry run only prints.
# A script sets its options to their defaults, sources this file and calls `parse`.

dry_run='' program=() # $program: the words after -- on the command line

fail() { # MESSAGE [CODE]
  echo "error: $1" >&2
  exit "${2:-2}"
}

say() { echo "launch: $*" >&2; }

quoted() { # WORD...: print the words as one command line
  local word line=''
  for word; do
    [[ $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

run() { # COMMAND...: run it; a dry run prints it instead, unless it is a function, which prints for itself
  if [[ -n $dry_run ]] && ! declare -F "$1" >/dev/null; then quoted "$@"; else "$@"; fi
}

step() { # PURPOSE COMMAND...: run it; if it fails, exit with its code
  local purpose=$1 code=0
  shift
  run "$@" || code=$?
  ((code == 0)) || fail "cannot $purpose: exit code $code, see above" "$code"
}

# parse 'OPTION ...' 'FLAG ...' ARGUMENT...
# --option=value sets $option, --flag sets $flag to yes; the words after -- become $program.
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
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0" # the comment at the top of the script
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
      fail "$1 is an option of the program: pass it after --"
    else
      fail "unknown option $1: $0 --help lists them"
    fi
    shift
  done
}

required() { # OPTION...: fail if one has no value
  local key
  for key; do
    [[ -n ${!key} ]] || fail "--$key=... is missing"
  done
}

positive() { # OPTION...: fail if one is not a positive integer
  local key
  for key; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || fail "--$key=${!key} must be a positive integer"
  done
}

seconds() { # OPTION...: fail if one is not a number of seconds
  local key
  for key; do
    [[ ${!key} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--$key=${!key} must be a number of seconds"
  done
}

program_option() { # OPTION: print its value among the options of the program; fail if it is missing
  local word
  for word in "${program[@]}"; do
    if [[ $word == "--$1="?* ]]; then
      echo "${word#*=}"
      return
    fi
  done
  fail "--$1=... of the program is missing: pass it after --"
}
