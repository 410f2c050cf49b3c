# shellcheck shell=bash
# To be sourced by the scripts that train: what they all take, and how they show what they would run.
# `parse_arguments "$@"` reads CONFIG WORKDIR [options] [--config.KEY=VALUE ...] into `config`, `workdir` and `overrides`;
# the options that the script lists in `options` (by their names, without dashes) into the variables of these names, "-"
# becoming "_"; those in `switches` into variables that are true or false. `run COMMAND...` runs a command, or prints it
# in a dry run.
#
# What was typed is never evaluated: bash's arithmetic runs the commands in a subscript, so that a number is looked at
# (`require_number`) before it is computed with; names that programs take apart again are plain ones (`require_plain`).

# shellcheck disable=SC2034 # these are what the scripts read
config='' workdir='' overrides=() options=() switches=() dry_run=false

fail() {
  local message="error: $*"
  printf '%s\n' "${message//[[:cntrl:]]/ }" >&2
  exit 2
}

# is_one_of WORD WORDS...: whether it is.
is_one_of() {
  local other
  for other in "${@:2}"; do
    if [[ $1 == "$other" ]]; then return; fi
  done
  return 1
}

parse_arguments() {
  local flag flag_value variable positional=() # no option has these names
  for flag in "$@"; do # in YAML each of these may end a line
    case $flag in
      *[[:cntrl:]]* | *$'\xc2\x85'* | *$'\xe2\x80\xa8'* | *$'\xe2\x80\xa9'*)
        fail "an argument must be one line, without control characters: $flag"
        ;;
    esac
  done
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
    if [[ $1 != *=* ]] && is_one_of "$flag" "${switches[@]}"; then
      printf -v "$variable" true
    elif is_one_of "$flag" "${options[@]}"; then
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

# require_number NAME VALUE: stops unless VALUE is a positive whole number, which arithmetic may then have.
require_number() {
  [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1=$2 must be a positive whole number"
}

# require_plain NAME VALUE: stops unless VALUE is a name without anything that a program may take for more than that.
require_plain() {
  [[ $2 =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] ||
    fail "$1=$2 must be of letters, digits and . _ : / @ -, and begin with a letter or a digit"
}

# require_program NAME REMEDY: stops unless the program can be run; a dry run needs none.
require_program() {
  $dry_run || command -v "$1" >/dev/null || fail "$1 must be on PATH; $2"
}

# absolute PATH FOLDER: prints PATH as it is from FOLDER; "~/" is the home, which a shell puts in at a word's start alone.
absolute() {
  local path=${1/#\~\//$HOME/}
  if [[ $path == /* ]]; then printf '%s\n' "$path"; else printf '%s\n' "$2/$path"; fi
}

# Prints a command so that a shell would read it as it is; words that need no quotes have none.
show() {
  local word line='+'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "$line"
}

run() {
  if $dry_run; then show "$@"; else "$@"; fi
}
