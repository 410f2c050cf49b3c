#!/usr/bin/env bash
# The DiT paper's comparison of blocks (figure 5) in small: trains the quick start's DiT with each of the four ways of
# conditioning for the same steps, then prints the held-out losses and draws their curves on one page. Needs the latents
# of `launch/quickstart.sh`; takes a few minutes.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

latents=${1:-runs/quickstart/latents}
workdir=${2:-runs/ablation}
num_steps=${3:-300}
if [[ ! -d $latents ]]; then
  echo "error: no latents in $latents; run launch/quickstart.sh first, or name a folder: launch/ablation.sh LATENTS" >&2
  exit 2
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

report=(dit-jax report --output="$workdir/report.html")
for block in adaln_zero adaln cross_attention in_context; do
  dit-jax train --config=configs/fashion_mnist_dit.py --workdir="$workdir/$block" --config.latents.path="$latents" \
    --config.dit.conditioning="('$block',)" --config.training.num_train_steps="$num_steps" \
    --config.training.ema_decay=0.95 --config.training.eval_every_steps=$((num_steps / 6)) \
    --config.optimizer.warmup_steps=$((num_steps / 10))
  report+=(--workdir="$workdir/$block")
done
"${report[@]}"
