#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or on several as one (multislice): queues the slices, installs the project on every worker,
# starts the run on all, shows the first worker's output, starts it anew after a preemption, and deletes the slices when it
# is done. Started again, it goes on where it is: it joins a queued request, or a run that is under way.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh CONFIG WORKDIR --name NAME --zone ZONE --type TYPE [options] [--config.KEY=VALUE ...]
       launch/tpu_pod.sh --delete --name NAME --zone ZONE
  CONFIG          a config of this project, such as configs/dit_imagenet.py:XL/2; this checkout is what is installed
  WORKDIR         gs://BUCKET/FOLDER, which every worker mounts with gcsfuse under ~/gcs/BUCKET; or the path of a disk
                  that all workers have mounted. Overrides that name folders in the bucket start with "~/gcs/BUCKET/".
  --name NAME     of the queued resource, and of its slices
  --zone ZONE     such as us-east5-b
  --type TYPE     accelerator type, such as v5litepod-256 (64 workers) or v5p-128
  --slices N      train on N such slices as one (default: 1)
  --runtime V     of the workers (default: v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e or tpu-ubuntu2204-base,
                  by the type)
  --project P     default: gcloud's own
  --spot          slices that may be preempted, at a lower price
  --reserved      slices of a reservation
  --keep          leave the slices when the run is done
  --delete        delete the slices, whatever they do
  --dry-run       print every command, run none
TEXT
}

POLL_SECONDS=${DIT_JAX_POLL_SECONDS:-30}
MAX_CRASHES=5 # ends by a signal, one after the other, before we give up: a lost worker ends the others so

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
name='' zone='' type='' slices=1 runtime='' project=''
options=(name zone type slices runtime project) switches=(spot reserved keep delete dry-run)
parse_arguments "$@"
[[ -n $name && -n $zone ]] || fail "give --name and --zone; see --help"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name must be lower-case letters, digits and dashes"
for option in zone type runtime project; do
  [[ -z ${!option} ]] || require_plain "--$option" "${!option}"
done

where=(--zone "$zone")
if [[ -n $project ]]; then where+=(--project "$project"); fi

delete_slices() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Prints the state of the request (ACTIVE, SUSPENDED, ...), NONE where there is none.
state_of_request() {
  local state
  state=$(gcloud compute tpus queued-resources list "${where[@]}" --filter="name~(^|/)$name\$" --format='value(state.state)') ||
    return 1
  echo "${state:-NONE}"
}

require_program gcloud "see https://cloud.google.com/sdk/docs/install"
# shellcheck disable=SC2154 # parse_arguments sets the switches
if $delete; then
  if ! $dry_run; then state=$(state_of_request) || fail "gcloud could not look for $name (see above)"; fi
  if [[ ${state:-} == NONE ]]; then
    echo "there is no queued resource $name in $zone"
    exit
  fi
  delete_slices
  exit
fi

require_config_and_workdir
require_number --slices "$slices"
[[ -n $type ]] || fail "give --type, such as v5litepod-256; see --help"
[[ $config != /* && -e ${config%%:*} ]] || fail "CONFIG=$config must be a file of this project: it is copied with it"
if [[ -z $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--type=$type is not one whose software we know; give --runtime" ;;
  esac
fi
bucket=''
case $workdir in
  gs://*/*)
    bucket=${workdir#gs://}
    # shellcheck disable=SC2088 # the worker's home, not ours
    workdir="~/gcs/$bucket" bucket=${bucket%%/*}
    require_plain "WORKDIR's bucket" "$bucket"
    ;;
  /*) ;;
  *) fail "WORKDIR=$workdir must be gs://BUCKET/FOLDER, or an absolute path that all workers share" ;;
esac

create_slices() {
  local shape=(--node-id "$name")
  if ((slices > 1)); then shape=(--node-count "$slices" --node-prefix "$name"); fi
  # shellcheck disable=SC2154
  if $spot; then shape+=(--spot); fi
  # shellcheck disable=SC2154
  if $reserved; then shape+=(--reserved); fi
  # The scope lets the workers mount the bucket.
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --accelerator-type "$type" \
    --runtime-version "$runtime" --scopes https://www.googleapis.com/auth/cloud-platform "${shape[@]}"
}

# Returns when the slices are there; requests them if need be, again if they were preempted.
await_slices() {
  local state told=''
  while true; do
    state=$(state_of_request) || state=UNKNOWN
    # Later the network may be to blame, and it comes back; at first it is what was asked for.
    if [[ $state == UNKNOWN && -z $told ]] && ! $requested; then fail "gcloud could not look for $name (see above)"; fi
    if [[ $state != "$told" ]]; then echo "$(date +%T) $name is $state" && told=$state; fi
    case $state in
      ACTIVE) requested=true && return ;;
      NONE)
        if create_slices; then requested=true && continue; fi
        $requested || fail "gcloud could not request $name (see above)"
        ;;
      FAILED | SUSPENDED) delete_slices || true ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# on_workers COMMAND: runs it on every worker of every slice at once.
on_workers() {
  run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" --node all --worker all --command "$1"
}

# Copies this checkout to the workers, where the run is not under way, and installs it.
install() {
  run gcloud compute tpus queued-resources scp "$archive" "$name:dit_jax.tar.gz" "${where[@]}" --node all --worker all &&
    on_workers "dit_jax/launch/tpu_worker.sh is-running 2>/dev/null || { mkdir -p dit_jax && rm -rf dit_jax/configs dit_jax/dit_jax &&\
 tar -xzf dit_jax.tar.gz -C dit_jax && dit_jax/launch/tpu_worker.sh install $bucket; }"
}

# start VERB: starts the run on all workers; "start" leaves one that is under way, "restart" ends what is left of it.
start() {
  local line="dit_jax/launch/tpu_worker.sh $1" word
  for word in "$config" "$workdir" ${overrides[@]+"${overrides[@]}"}; do line+=" ${word@Q}"; done
  on_workers "$line"
}

# Shows the first worker's output until its process ends; its last line tells how.
follow() {
  run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" --node 0 --worker 0 \
    --command "dit_jax/launch/tpu_worker.sh follow"
}

scratch=''
pack() {
  archive=${TMPDIR:-/tmp}/dit_jax.tar.gz
  if ! $dry_run; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    archive=$scratch/dit_jax.tar.gz
  fi
  run tar -czf "$archive" --exclude=__pycache__ configs dit_jax launch setup.py README.md LICENSE
}

if $dry_run; then
  pack
  create_slices
  install
  start start
  follow
  # shellcheck disable=SC2154
  $keep || delete_slices
  exit
fi

pack
verb=start crashes=0 requested=false
while true; do
  await_slices
  code=''
  if install && start "$verb"; then
    # The exit code comes as the output's last line: a lost connection has none.
    follow | tee "$scratch/output" || true
    code=$(sed -n 's/^dit-jax ended with code \([0-9]*\)$/\1/p' "$scratch/output" | tail -n 1)
  fi
  verb=restart
  case $code in
    '')
      verb=start # the run may be under way yet
      echo "$(date +%T) lost $name"
      ;;
    0) break ;;
    75) echo "$(date +%T) the program asks to be started again" && crashes=0 && continue ;;
    *)
      crashes=$((crashes + 1))
      if ((code < 128 || crashes > MAX_CRASHES)); then
        echo "error: the run ended with code $code; the slices are there yet: mend the cause and start this again, or" \
          "launch/tpu_pod.sh --delete --name $name --zone $zone" >&2
        exit "$code"
      fi
      echo "$(date +%T) the run ended with code $code, as when a worker is lost; starting it again"
      ;;
  esac
  sleep "$POLL_SECONDS"
done
$keep || delete_slices
