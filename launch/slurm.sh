#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process a GPU: submits the run as a batch job that is queued again after a preemption,
# or when the program asks for it. Started again, it names the job that is queued or running already; after that has ended,
# it submits one that goes on where it stopped. Run it on a login node, from a checkout that all nodes see.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/slurm.sh CONFIG WORKDIR [options] [--config.KEY=VALUE ...]
       launch/slurm.sh --cancel WORKDIR_OF_THE_RUN
  WORKDIR          on a disk that all nodes share
  --nodes N        default: 1
  --gpus N         of each node (default: 8)
  --cpus N         CPU cores of each process (default: 12)
  --time T         limit, such as 24:00:00; two minutes before it the program is asked to save and end
  --partition P    --account A    --qos Q    as sbatch takes them
  --cancel WORKDIR cancel the job of a workdir
  --dry-run        print every command and the batch script, run none
TEXT
}

caller=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
nodes=1 gpus=8 cpus=12 time='' partition='' account='' qos='' cancel=''
options=(nodes gpus cpus time partition account qos cancel) switches=(dry-run)
parse_arguments "$@"

# A workdir has one job at a time, whose name tells the workdir; SLURM takes a name apart at commas.
job_name() {
  local sum folder
  sum=$(cksum <<<"$1")
  folder=$(basename "$1")
  echo "dit_jax-${folder//[^A-Za-z0-9._-]/_}-${sum%% *}"
}

if [[ -n $cancel ]]; then
  require_program scancel "run this on a login node of the cluster"
  run scancel --me --name "$(job_name "$(absolute "$cancel" "$caller")")"
  exit
fi

require_config_and_workdir
require_program sbatch "run this on a login node of the cluster"
require_number --nodes "$nodes"
require_number --gpus "$gpus"
require_number --cpus "$cpus"
[[ $workdir != *://* ]] || fail "WORKDIR=$workdir must be a path on a disk that all nodes share"
if [[ -e $caller/${config%%:*} ]]; then config=$caller/$config; fi
workdir=$(absolute "$workdir" "$caller")
name=$(job_name "$workdir")

batch_script() {
  local word command=''
  for word in dit-jax train "--config=$config" "--workdir=$workdir" ${overrides[@]+"${overrides[@]}"}; do
    command+=" ${word@Q}"
  done
  cat <<SCRIPT
#!/usr/bin/env bash
set -euo pipefail
cd -- ${PWD@Q}
source launch/environment.sh gpu
source launch/xla_flags.sh gpu
code=0
trap : TERM # which SLURM may send to this script as well: the tasks save and end
# Tasks that were told to make way end with 75 one after the other; others have a minute to follow one that failed.
# Since SLURM 22.05 a step does not inherit the job's --cpus-per-task.
srun --cpus-per-task=$cpus --kill-on-bad-exit=0 --wait=60 --label$command || code=\$?
if ((code == 75)); then # it was told to make way, has saved, and wants to be started again
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
SCRIPT
}

# A task sees the GPU of its number on the node, which JAX picks; --gpus-per-task would leave it with number 0 alone.
# singleton: never two jobs of a workdir at once, even if two are submitted.
submission=(sbatch --parsable --job-name "$name" --nodes "$nodes" --ntasks-per-node "$gpus" --gpus-per-node "$gpus"
  --cpus-per-task "$cpus" --requeue --open-mode append --signal TERM@120 --dependency singleton
  --output "${workdir//%/%%}/slurm-%j.log")
if [[ -n $time ]]; then submission+=(--time "$time"); fi
if [[ -n $partition ]]; then submission+=(--partition "$partition"); fi
if [[ -n $account ]]; then submission+=(--account "$account"); fi
if [[ -n $qos ]]; then submission+=(--qos "$qos"); fi

if $dry_run; then
  show source launch/environment.sh gpu
  show mkdir -p "$workdir"
  show "${submission[@]}"
  batch_script
  exit
fi

job=$(squeue --me --noheader --name "$name" --format %i | head -n 1)
if [[ -n $job ]]; then
  echo "job $job of $workdir is queued or running already"
else
  # shellcheck source=launch/environment.sh
  source launch/environment.sh gpu # here, since the nodes may have no network
  mkdir -p "$workdir"
  job=$(batch_script | "${submission[@]}")
  job=${job%%;*} # a cluster's name may follow
  echo "submitted job $job"
fi
echo "its output: tail -F $workdir/slurm-$job.log; to end it: launch/slurm.sh --cancel $workdir"
