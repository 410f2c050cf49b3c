#!/usr/bin/env bash
# Photographs and drawings with captions ("A chimpanzee."): the stamps of Tux Paint, 785 pictures on white squares of at most
# 256 pixels, as an image folder of one class (GPL-2). They come from Debian, in the package tuxpaint-stamps-default
# (161 MB). A tenth of the captions is held out in test/. Does nothing where the folder is there already.
# Then: dit-jax train ... --config.data.name=data/stamps --config.data.num_classes=1
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "Usage: launch/stamps.sh [FOLDER]   (default: data/stamps in the project)" >&2
  exit 2
fi
folder=${1:-}
if [[ -n $folder && $folder != /* ]]; then
  folder=$PWD/$folder
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${folder:-data/stamps}
if [[ -e $folder ]]; then
  echo "found $folder"
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
package=tuxpaint-stamps-default_2022.06.04-1_all.deb
echo "fetching tuxpaint-stamps-default 2022.06.04 (161 MB)"
if command -v apt-get >/dev/null; then
  fetch=(apt-get download -qq -o APT::Sandbox::User=root tuxpaint-stamps-default=2022.06.04-1)
else
  fetch=(curl --fail --location --silent --show-error --connect-timeout 20 --retry 2 --remote-name
    "https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/$package")
fi
(cd "$scratch" && "${fetch[@]}" >/dev/null) || {
  echo "error: ${fetch[0]} could not fetch it (see above); start this script again where there is a network" >&2
  exit 1
}
# The hash is of the file that was looked at.
echo "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34  $scratch/$package" | sha256sum --check --quiet || {
  echo "error: $package is another file than the one that this project knows, and was not read" >&2
  exit 1
}
python - "$scratch/$package" "$folder" <<'PYTHON'
"""Writes an image folder from the Debian package: SPLIT/stamps/NAME.png and SPLIT/metadata.jsonl."""

import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import tarfile

from PIL import Image

STAMPS = "./usr/share/tuxpaint/stamps/"
MAX_SIDE = 256
AR_HEADER = 60  # bytes before each file of a .deb, which is an ar archive; its size is in the ten from the 48th on


def read_member(package, wanted):
    """Returns a file of a .deb."""
    with package.open("rb") as file:
        file.seek(len("!<arch>\n"))
        while header := file.read(AR_HEADER):
            name, size = header[:16].decode().strip(), int(header[48:58])
            if name == wanted:
                return file.read(size)
            file.seek(size + size % 2, os.SEEK_CUR)
    sys.exit(f"error: {package.name} has no {wanted}")


def on_white_square(content):
    """Returns an image with nothing of it cut off, of at most MAX_SIDE pixels a side."""
    with Image.open(io.BytesIO(content)) as image:
        image = image.convert("RGBA")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    side = max(image.size)
    white = Image.new("RGBA", (side, side), "white")
    white.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return white.convert("RGB")


package, folder = map(pathlib.Path, sys.argv[1:])
folder.parent.mkdir(parents=True, exist_ok=True)
temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
with tarfile.open(fileobj=io.BytesIO(read_member(package, "data.tar.xz"))) as archive:
    entries = [entry for entry in archive if entry.isreg() and entry.name.startswith(STAMPS)]
    wanted = [entry for entry in entries if entry.name.endswith((".png", ".txt"))]
    files = {entry.name.removeprefix(STAMPS): archive.extractfile(entry).read() for entry in wanted}
lines = {"train": [], "test": []}
try:
    for name in sorted(name for name in files if name.endswith(".png")):
        texts = files.get(name.removesuffix(".png") + ".txt", b"").decode().splitlines()  # English, then translations
        if not texts:
            continue
        caption = texts[0].strip()
        # By the caption, since several stamps may have the same: a tenth in test.
        split = "test" if hashlib.sha256(caption.encode()).digest()[0] < 26 else "train"
        path = pathlib.Path("stamps", name.replace("/", "_"))
        (temporary / split / path.parent).mkdir(parents=True, exist_ok=True)
        on_white_square(files[name]).save(temporary / split / path)
        line = {"file_name": path.as_posix(), "caption": caption, "category": name.partition("/")[0]}
        lines[split].append(json.dumps(line, ensure_ascii=False) + "\n")
    for split in lines:
        (temporary / split / "metadata.jsonl").write_text("".join(lines[split]), encoding="utf-8")
    os.replace(temporary, folder)
finally:
    shutil.rmtree(temporary, ignore_errors=True)
print(f"wrote {folder}: {len(lines['train'])} + {len(lines['test'])} pictures with captions")
PYTHON
