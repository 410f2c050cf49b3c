# shellcheck shell=bash
# To be sourced by the scripts that train: what they all take, and how they show what they would run.
# `parse_arguments "$@"` reads CONFIG WORKDIR [options] [--config.KEY=VALUE ...] into `config`, `workdir` and `overrides`;
# the options that the script lists in `options` (by their names, without dashes) into the variables of these names, "-"
# becoming "_"; those in `switches` into variables that are true or false. `run COMMAND...` runs a command, or prints it
# in a dry run.

# shellcheck disable=SC2034 # these are what the scripts read
config='' workdir='' overrides=() options=() switches=() dry_run=false

fail() {
  echo "error: $*" >&2
  exit 2
}

parse_arguments() {
  local flag flag_value variable positional=() # no option has these names
  for flag in "${switches[@]}"; do printf -v "${flag//-/_}" false; done
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --config.*=*) overrides+=("$1") && shift && continue ;;
      --config.*) fail "$1 must have its value in the same word: $1=VALUE" ;;
      --*) ;;
      *) positional+=("$1") && shift && continue ;;
    esac
    flag=${1%%=*} flag=${flag#--} variable=${flag//-/_}
    if [[ " ${switches[*]} " == *" $flag "* && $1 != *=* ]]; then
      printf -v "$variable" true
    elif [[ " ${options[*]} " == *" $flag "* ]]; then
      if [[ $1 == *=* ]]; then
        flag_value=${1#*=}
      else
        (($# > 1)) || fail "$1 needs a value"
        flag_value=$2 && shift
      fi
      printf -v "$variable" %s "$flag_value"
    else
      fail "unknown argument $1; see --help"
    fi
    shift
  done
  case ${#positional[@]} in
    0) ;;
    2)
      config=${positional[0]}
      # shellcheck disable=SC2034
      workdir=${positional[1]}
      ;;
    *) fail "give CONFIG and WORKDIR, and nothing else without dashes (got: ${positional[*]}); see --help" ;;
  esac
}

require_config_and_workdir() {
  [[ -n $config ]] || fail "give CONFIG and WORKDIR; see --help"
}

# require_number NAME VALUE: stops unless VALUE is a positive whole number.
require_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--$1=$2 must be a positive whole number"
}

# require_program NAME REMEDY: stops unless the program can be run; a dry run needs none.
require_program() {
  $dry_run || command -v "$1" >/dev/null || fail "$1 must be on PATH; $2"
}

# absolute PATH FOLDER: prints PATH as it is from FOLDER.
absolute() {
  if [[ $1 == /* ]]; then echo "$1"; else echo "$2/$1"; fi
}

# Prints a command so that a shell would read it as it is; words that need no quotes have none.
show() {
  local word line='+'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "$line"
}

run() {
  if $dry_run; then show "$@"; else "$@"; fi
}
