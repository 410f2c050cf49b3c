#!/usr/bin/env bash
# LDM's autoencoder losses in small, on real colour images: trains a KL and a VQ autoencoder of CIFAR-10 with LPIPS and a
# discriminator, measures both on the held-out images, and writes a page with their curves and reconstructions. It fetches
# CIFAR-10 and the weights of LPIPS (200 MB) and takes about an hour on two CPU cores. Started again, it goes on where it
# stopped.
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "Usage: launch/autoencoders.sh [WORKDIR]   (default: runs/autoencoders in the project)" >&2
  exit 2
fi
workdir=${1:-}
if [[ -n $workdir && $workdir != /* ]]; then
  workdir=$PWD/$workdir
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
workdir=${workdir:-runs/autoencoders}
# shellcheck source=launch/environment.sh
source launch/environment.sh ""
launch/lpips_weights.sh
launch/cifar10.sh

report=(dit-jax report --output="$workdir/report.html" --charts="$workdir/charts")
for name in kl vq; do
  dit-jax train --config="configs/cifar10_autoencoder.py:$name" --workdir="$workdir/$name" \
    --config.data.raw_dir=data/cifar10_raw
  dit-jax evaluate --workdir="$workdir/$name"
  report+=(--workdir="$workdir/$name")
done
"${report[@]}"
