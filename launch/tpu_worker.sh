#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each worker of a TPU slice: `install [BUCKET]`, `start CONFIG WORKDIR [overrides]`,
# `restart` (likewise, but ends first what runs), `follow` and `is-running`. The run outlives the connection; its output and exit
# code are in ~/dit_jax_run. "~/" at the start of the workdir, or of an override's value, is the worker's home.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

state=$HOME/dit_jax_run
GRACE_SECONDS=60 # that a process has to end before it is killed

is_running() {
  [[ -e $state/pid && ! -e $state/code ]] || return 1
  # After the worker was started anew, another program may have the number.
  [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$(<"$state/pid")/cmdline") == *"dit-jax train"* ]]
}

# Whether there is a Python that launch/environment.sh takes: the TPU software on Ubuntu 22.04 comes with 3.10.
has_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null &&
      return
  done
  return 1
}

install_package() {
  sudo apt-get -qq update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$1"
}

# Mounts a bucket under ~/gcs; checkpoints are renamed when complete, hence the limit.
mount_bucket() {
  local folder=$HOME/gcs/$1
  if mountpoint -q "$folder"; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    install_package gcsfuse
  fi
  mkdir -p "$folder"
  gcsfuse --implicit-dirs --rename-dir-limit 100000 "$1" "$folder"
}

start() {
  local words=() word
  for word in "$@"; do
    word=${word/#\~\//"$HOME/"}
    words+=("${word/=\~\//"=$HOME/"}")
  done
  mkdir -p "$state"
  rm -f "$state/code" "$state/pid"
  # A session of its own: it goes on when the connection ends.
  # shellcheck disable=SC2016 # expanded in there
  setsid bash -c '
    state=$1 config=$2 workdir=$3
    shift 3
    echo $$ >"$state/pid"
    source launch/environment.sh tpu && source launch/xla_flags.sh tpu || { echo $? >"$state/code" && exit; }
    dit-jax train --config="$config" --workdir="$workdir" "$@" &
    echo $! >"$state/pid"
    code=0
    wait $! || code=$?
    echo "$code" >"$state/code"
  ' bash "$state" "${words[@]}" >"$state/log" 2>&1 </dev/null &
  until [[ -s $state/pid ]]; do sleep 0.1; done
}

stop() {
  local i
  if ! is_running; then return; fi
  kill -TERM "$(<"$state/pid")" 2>/dev/null || true
  for ((i = 0; i < GRACE_SECONDS; i++)); do
    if ! is_running; then return; fi
    sleep 1
  done
  kill -KILL "$(<"$state/pid")" 2>/dev/null || true
}

case ${1:-} in
  install)
    has_python || install_package python3.11-venv
    # shellcheck source=launch/environment.sh
    source launch/environment.sh tpu
    if [[ -n ${2:-} ]]; then mount_bucket "$2"; fi
    ;;
  start) if is_running; then echo "the run is under way"; else start "${@:2}"; fi ;;
  restart) stop && start "${@:2}" ;;
  follow)
    tail -n +1 -F "$state/log" &
    trap 'kill $!' EXIT
    while is_running; do sleep 1; done
    sleep 1 # for the last lines
    echo
    echo "dit-jax ended with code $(cat "$state/code" 2>/dev/null || echo 137)"
    ;;
  is-running) is_running ;;
  *) echo "error: launch/tpu_worker.sh knows install, start, restart, follow and is-running, not '${1:-}'" >&2 && exit 2 ;;
esac
