#!/usr/bin/env bash
# The DiT paper's headline (figures 2 and 8) in small: trains DiTs of several depths, widths and patch sizes on the quick
# start's latents for the same steps, each from two seeds, measures the Frechet distance of 5,000 samples of each, and
# draws it against multiply-adds and against training compute. Needs `launch/quickstart.sh`; takes about a quarter of an
# hour on two CPU cores. Started again, it goes on where it stopped.
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 4 ]]; then
  echo "Usage: launch/scaling.sh [LATENTS [WORKDIR [STEPS [NUM_SAMPLES]]]]" >&2
  echo "  default: runs/quickstart/latents runs/scaling 2000 5000" >&2
  exit 2
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
latents=${1:-runs/quickstart/latents}
workdir=${2:-runs/scaling}
num_steps=${3:-2000}
num_samples=${4:-5000}
require_number STEPS "$num_steps"
require_number NUM_SAMPLES "$num_samples"
if [[ ! -d $latents ]]; then
  echo "error: no latents in $latents; run launch/quickstart.sh first, or name a folder: launch/scaling.sh LATENTS" >&2
  exit 2
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

models=("2 32 7" "2 64 7" "1 32 1" "2 32 1" "2 64 1" "4 64 1") # depth, width, patch
report=(dit-jax report --output="$workdir/report.html" --charts="$workdir/charts")
for seed in 0 1; do
  for model in "${models[@]}"; do
    read -r depth width patch <<<"$model"
    run=$workdir/d$depth-w$width-p$patch-seed$seed
    if [[ ! -d $run/checkpoints/$num_steps ]]; then
      dit-jax train --config=configs/fashion_mnist_dit.py --workdir="$run" --config.latents.path="$latents" \
        --config.seed="$seed" --config.dit.depth="$depth" --config.dit.width="$width" --config.dit.patch_size="$patch" \
        --config.training.num_train_steps="$num_steps" --config.training.eval_every_steps="$num_steps" \
        --config.optimizer.warmup_steps=$((num_steps / 20)) --config.sampling.num_steps=10
    fi
    if [[ ! -f $run/evaluation/evaluation.json ]]; then
      dit-jax evaluate --workdir="$run" --num_samples="$num_samples" --metrics=fd,recognised --features=classifier \
        --sampler=dpm_solver --steps=10 --cfg_scale=1 --batch_size=100
    fi
    report+=(--workdir="$run")
  done
done
"${report[@]}"
