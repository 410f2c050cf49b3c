#!/usr/bin/env bash
# Trains on this machine, with all of its devices in one process; with --processes, as so many processes that find each
# other as those of a pod do, on CPU devices: a rehearsal. A run that is started again goes on where it stopped.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh CONFIG WORKDIR [--processes N] [--devices-per-process M] [--dry-run] [--config.KEY=VALUE ...]
  --processes N            train as N processes on CPU devices; each line of output tells which wrote it
  --devices-per-process M  virtual CPU devices of each process (default: 1 with --processes, else what there is)
  --dry-run                print every command, run none
TEXT
}

GRACE_SECONDS=60  # that processes have to end when asked to, before they are killed
FOLLOW_SECONDS=15 # that the others have to end by themselves after one failed

caller=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
processes=1 devices_per_process='' options=(processes devices-per-process) switches=(dry-run)
parse_arguments "$@"
require_config_and_workdir
require_number --processes "$processes"
[[ -z $devices_per_process ]] || require_number --devices-per-process "$devices_per_process"
if [[ -e $caller/${config%%:*} ]]; then config=$caller/$config; fi
workdir=$(absolute "$workdir" "$caller")

if $dry_run; then
  show source launch/environment.sh ""
else
  # shellcheck source=launch/environment.sh
  source launch/environment.sh ""
fi

# Prints which accelerators this machine has: tpu or gpu, or nothing.
accelerator() {
  if compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    echo tpu
  elif command -v nvidia-smi >/dev/null; then
    echo gpu
  fi
}

settings=()
if ((processes > 1)); then devices_per_process=${devices_per_process:-1}; fi
if [[ -n $devices_per_process ]]; then
  settings+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices_per_process")
else
  platform=$(accelerator)
  if [[ -n $platform ]]; then
    # shellcheck source=launch/xla_flags.sh
    if $dry_run; then show source launch/xla_flags.sh "$platform"; else source launch/xla_flags.sh "$platform"; fi
  fi
fi
command=(dit-jax train "--config=$config" "--workdir=$workdir" ${overrides[@]+"${overrides[@]}"})

scratch='' pids=() printers=() timer='' interrupted=false

# Asks the processes to save and end; after GRACE_SECONDS those that have not are asked to end at once. A second Ctrl-C kills.
interrupt() {
  local signal=TERM
  if $interrupted; then signal=KILL; fi
  interrupted=true
  kill -"$signal" ${pids[@]+"${pids[@]}"} 2>/dev/null || true
  end_after "$GRACE_SECONDS"
}

# end_after SECONDS: asks the processes to end after so long, and kills them GRACE_SECONDS later.
end_after() {
  if [[ -n $timer ]]; then return; fi
  {
    sleep "$1"
    kill -TERM "${pids[@]}"
    sleep "$GRACE_SECONDS"
    kill -KILL "${pids[@]}"
  } >/dev/null 2>&1 &
  timer=$!
}

clean_up() {
  if [[ -n $timer ]]; then
    kill "$timer" 2>/dev/null || true
    timer=''
  fi
  if [[ -n $scratch ]]; then rm -rf "$scratch"; fi
}

free_port() {
  local port
  for ((port = 20000 + RANDOM % 10000; ; port++)); do
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "$port" && return; fi
  done
}

# Runs all processes once; returns the exit code of the first that failed, else 0.
run_processes() {
  local i code first=0 port left
  port=$(free_port)
  pids=() printers=()
  for ((i = 0; i < processes; i++)); do
    local own=("${settings[@]}")
    if ((processes > 1)); then
      own+=("DIT_JAX_COORDINATOR=127.0.0.1:$port" "DIT_JAX_NUM_PROCESSES=$processes" "DIT_JAX_PROCESS_ID=$i")
    fi
    local line=(${own[@]+env "${own[@]}"} "${command[@]}")
    if $dry_run; then
      show "${line[@]}"
    elif ((processes == 1)); then
      "${line[@]}" &
      pids+=($!)
    else
      rm -f "$scratch/$i"
      mkfifo "$scratch/$i"
      sed -u "s/^/[$i] /" <"$scratch/$i" &
      printers+=($!)
      "${line[@]}" >"$scratch/$i" 2>&1 &
      pids+=($!)
    fi
  done
  left=(${pids[@]+"${pids[@]}"})
  while ((${#left[@]})); do
    local still=() pid
    for pid in "${left[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        still+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if ((code && !first)); then
        first=$code
        if ((code == 75)); then # the others save, too
          end_after "$GRACE_SECONDS"
        elif ((${#left[@]} > 1)) && ! $interrupted; then
          echo "error: a process ended with code $code; the others end within $FOLLOW_SECONDS s" >&2
          end_after "$FOLLOW_SECONDS"
        fi
      fi
    done
    left=(${still[@]+"${still[@]}"})
    if ((${#left[@]})); then sleep 0.2 & wait $! || true; fi # in the background, so that Ctrl-C is heard at once
  done
  ((${#printers[@]} == 0)) || wait "${printers[@]}" || true
  return "$first"
}

if ! $dry_run; then
  scratch=$(mktemp -d)
  trap clean_up EXIT
  trap interrupt INT TERM
fi
while true; do
  code=0
  run_processes || code=$?
  if [[ -n $timer ]]; then kill "$timer" 2>/dev/null || true; fi
  timer=''
  # 75: the program was told to make way, has saved, and wants to be started again.
  if ((code != 75)) || $interrupted; then exit "$code"; fi
  echo "the program asks to be started again"
done
