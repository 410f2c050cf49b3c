#!/usr/bin/env bash
# How the condition should reach the network, in small (DiT paper, figure 5), beside the U-Net of LDM: trains on
# Fashion-MNIST in pixels a DiT for each way, one with long skips (U-ViT) and a U-Net, all with the same multiply-adds,
# measures samples of each, and writes a page with table, curves and grids, and grid.png: two rows of each, in the order
# of their names below. Takes three quarters of an hour on two CPU cores. Started again, it goes on where it stopped.
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 3 ]]; then
  echo "Usage: launch/fusion.sh [WORKDIR [TERAMACS [NUM_SAMPLES]]]   (default: runs/fusion 3 2000)" >&2
  echo "  TERAMACS  multiply-adds of the forward passes of a training, in 10^12" >&2
  exit 2
fi
workdir=${1:-}
if [[ -n $workdir && $workdir != /* ]]; then
  workdir=$PWD/$workdir
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${workdir:-runs/fusion}
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
workdir=$folder
teramacs=${2:-3}
num_samples=${3:-2000}
[[ $teramacs =~ ^[0-9]{1,9}(\.[0-9]{1,9})?$ ]] || fail "TERAMACS=$teramacs must be a number, such as 3 or 0.5"
require_number NUM_SAMPLES "$num_samples"
# shellcheck source=launch/environment.sh
source launch/environment.sh ""
./launch/fashion_mnist.sh

report=(dit-jax report --output="$workdir/report.html" --charts="$workdir/charts")
names=(adaln_zero cross_attention in_context mixed long_skips unet)
for name in "${names[@]}"; do
  config=configs/fashion_mnist_pixels.py:$name
  run=$workdir/$name
  macs=$(dit-jax info --config="$config" --json | python -c 'import json, sys; print(json.load(sys.stdin)["macs"])')
  # Of batch 32, as the config has it.
  num_steps=$(python -c 'import sys; print(max(20, int(float(sys.argv[1]) * 1e12 / (int(sys.argv[2]) * 32))))' "$teramacs" "$macs")
  if [[ ! -d $run/checkpoints/$num_steps ]]; then
    dit-jax train --config="$config" --workdir="$run" --config.training.num_train_steps="$num_steps" \
      --config.training.global_batch_size=32 --config.training.eval_every_steps=$((num_steps / 5)) \
      --config.optimizer.warmup_steps=$((num_steps / 20))
  fi
  if [[ ! -f $run/evaluation/evaluation.json ]]; then
    dit-jax evaluate --workdir="$run" --num_samples="$num_samples" --metrics=fd,recognised --features=classifier \
      --batch_size=100
  fi
  report+=(--workdir="$run")
done
"${report[@]}"
python - "$workdir" "${names[@]}" <<'PYTHON'
import pathlib
import sys

from PIL import Image

workdir, *names = sys.argv[1:]
pictures = [Image.open(max((pathlib.Path(workdir) / name / "samples").glob("*.png"))) for name in names]
width, height = pictures[0].width, pictures[0].height * 2 // 5  # two rows of its five
grid = Image.new("RGB", (width, height * len(names)))
for i, picture in enumerate(pictures):
    grid.paste(picture.crop((0, 0, width, height)), (0, i * height))
grid.save(pathlib.Path(workdir) / "grid.png")
PYTHON
