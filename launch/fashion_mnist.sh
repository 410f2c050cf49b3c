#!/usr/bin/env bash
# Fashion-MNIST from Debian's and Ubuntu's package of it, 30 MB, where there is one and it may be installed. Without it
# `dit-jax` looks elsewhere, so nothing here is an error. Does nothing where the data set is there.
set -euo pipefail

if (($#)); then
  echo "Usage: launch/fashion_mnist.sh" >&2
  exit 2
fi
package=dataset-fashion-mnist
for folder in /usr/share/datasets/fashion-mnist "${TFDS_DATA_DIR:-$HOME/tensorflow_datasets}/fashion_mnist"; do
  if [[ -d $folder ]]; then
    echo "found in $folder"
    exit
  fi
done
command -v apt-get >/dev/null || exit 0
apt=(env DEBIAN_FRONTEND=noninteractive timeout 120 apt-get -qq -y --no-install-recommends
  -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
if ((EUID != 0)); then
  sudo -n true 2>/dev/null || exit 0
  apt=(sudo -n "${apt[@]}")
fi
echo "installing the Debian package $package (30 MB)"
# The time limit is for the download: once that is there, installing takes a second and is not cut short.
{
  "${apt[@]}" install --download-only "$package" ||
    { "${apt[@]}" update && "${apt[@]}" install --download-only "$package"; }
} </dev/null >/dev/null 2>&1 && "${apt[@]}" install "$package" </dev/null >/dev/null ||
  echo "it could not be installed; the program looks for the data elsewhere"
