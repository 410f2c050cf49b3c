#!/usr/bin/env bash
# Pictures with captions: the emoji of Google's Noto with their names, 3,781 pictures of 64 x 64 pixels on white, as an image
# folder (images Apache-2.0). They come from the npm registry, in the package emoji-datasource-google (74 MB). A tenth of the
# names is held out in test/, each with all of its skin tones. Does nothing where the folder is there already.
# Then: dit-jax train ... --config.data.name=data/emoji --config.data.num_classes=9
set -euo pipefail

usage="Usage: launch/emoji.sh [--no-skin-tones] [FOLDER]   (default: data/emoji in the project)
  --no-skin-tones   the 1,906 emoji alone, without those that differ from one of them in skin tones"
skin_tones=true
if [[ ${1:-} == --no-skin-tones ]]; then
  skin_tones=false
  shift
fi
if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "$usage" >&2
  exit 2
fi
folder=${1:-}
if [[ -n $folder && $folder != /* ]]; then
  folder=$PWD/$folder
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${folder:-data/emoji}
if [[ -e $folder ]]; then
  echo "found $folder"
  exit
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
package=emoji-datasource-google-16.0.0.tgz
echo "fetching emoji-datasource-google 16.0.0 (74 MB)"
if command -v npm >/dev/null; then
  fetch=(npm pack --silent --pack-destination "$scratch" emoji-datasource-google@16.0.0)
else
  fetch=(curl --fail --location --silent --show-error --connect-timeout 20 --retry 2 --output "$scratch/$package"
    "https://registry.npmjs.org/emoji-datasource-google/-/$package")
fi
"${fetch[@]}" >/dev/null || {
  echo "error: ${fetch[0]} could not fetch it (see above); start this script again where there is a network" >&2
  exit 1
}
# The hash is of the file that was looked at.
echo "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438  $scratch/$package" | sha256sum --check --quiet || {
  echo "error: $package is another file than the one that this project knows, and was not read" >&2
  exit 1
}
python - "$scratch/$package" "$folder" "$skin_tones" <<'PYTHON'
"""Writes an image folder from the npm package: SPLIT/CATEGORY/CODE.png and SPLIT/metadata.jsonl."""

import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tarfile

from PIL import Image

SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
SWATCHES = "Component"  # a category of five skin tones by themselves, no pictures


def caption_of(emoji):
    """Returns its name in lower case; "Bolivia Flag" reads "flag: bolivia"."""
    name = emoji["name"].lower()
    return f"flag: {name.removesuffix(' flag')}" if emoji["subcategory"] == "country-flag" else name


def split_of(caption):
    """Returns where an emoji is with all of its skin tones, and any other of the same name: a tenth in test."""
    return "test" if hashlib.sha256(caption.encode()).digest()[0] < 26 else "train"


def pictures_of(emoji, skin_tones):
    """Yields (file name, caption, skin tones) of an emoji and, if asked for, of its variants."""
    caption = caption_of(emoji)
    yield emoji["image"], caption, ""
    for code, variant in emoji.get("skin_variations", {}).items() if skin_tones else ():
        tones = ", ".join(SKIN_TONES[tone] for tone in code.split("-"))
        yield variant["image"], f"{caption}: {tones}", tones


package, folder, skin_tones = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "true"
folder.parent.mkdir(parents=True, exist_ok=True)
temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
with tarfile.open(package) as archive:
    wanted = re.compile(r"package/(emoji\.json|img/google/64/[^/]+)")
    files = {entry.name: archive.extractfile(entry).read() for entry in archive if wanted.fullmatch(entry.name)}
lines = {"train": [], "test": []}
try:
    for emoji in json.loads(files["package/emoji.json"]):
        if emoji["category"] == SWATCHES:
            continue
        split = split_of(caption_of(emoji))
        category = "_".join(re.findall("[a-z]+", emoji["category"].lower()))
        (temporary / split / category).mkdir(parents=True, exist_ok=True)
        for name, caption, tones in pictures_of(emoji, skin_tones):
            with Image.open(io.BytesIO(files[f"package/img/google/64/{name}"])) as image:
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image.convert("RGBA"))
            white.convert("RGB").save(temporary / split / category / name)
            line = {"file_name": f"{category}/{name}", "caption": caption, "base": caption_of(emoji)}
            line |= {"skin_tones": tones, "subcategory": emoji["subcategory"]}
            lines[split].append(json.dumps(line, ensure_ascii=False) + "\n")
    for split in lines:
        (temporary / split / "metadata.jsonl").write_text("".join(lines[split]), encoding="utf-8")
    os.replace(temporary, folder)
finally:
    shutil.rmtree(temporary, ignore_errors=True)
print(f"wrote {folder}: {len(lines['train'])} + {len(lines['test'])} pictures with captions, in 9 categories")
PYTHON
