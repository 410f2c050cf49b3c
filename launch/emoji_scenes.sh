#!/usr/bin/env bash
# Pictures with boxes and maps of classes: one to three emoji of data/emoji on a white canvas of 64 x 64 pixels, 4,000 to train
# with and 400 of held-out emoji. Nobody has annotated them: the boxes and the maps are exact, because the pictures are put
# together here. metadata.jsonl has a layout for each ("flags 0.1 0.2 0.6 0.7; objects ...") and the path of its map,
# whose classes are 0 (white) and then the emoji's categories in alphabetical order. Does nothing where the folder is there.
# Then: dit-jax train --config=configs/emoji_scenes.py:layout ... or :semantic
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 ]]; then
  echo "Usage: launch/emoji_scenes.sh [FOLDER]   (default: data/emoji_scenes in the project)" >&2
  exit 2
fi
folder=${1:-}
if [[ -n $folder && $folder != /* ]]; then
  folder=$PWD/$folder
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${folder:-data/emoji_scenes}
if [[ -e $folder ]]; then
  echo "found $folder"
  exit
fi
./launch/emoji.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh ""

python - data/emoji "$folder" <<'PYTHON'
"""Writes an image folder of scenes: SPLIT/scene/NUMBER.png, maps/SPLIT/NUMBER.png and metadata.jsonl."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
from PIL import Image, ImageDraw

SIZE, COUNTS = 64, {"train": 4000, "test": 400}
MIN_SIDE, MAX_SIDE, MAX_OBJECTS = 22, 38, 3
WHITE, OUTSIDE = (255, 255, 255), (1, 2, 3)  # the second is a colour that no emoji has on its border


def foreground(image):
    """Returns where an emoji is, [H, W] bool: all but the white that reaches the border."""
    framed = Image.new("RGB", (image.width + 2, image.height + 2), WHITE)
    framed.paste(image, (1, 1))
    ImageDraw.floodfill(framed, (0, 0), OUTSIDE, thresh=12)
    return (np.asarray(framed) != OUTSIDE).any(axis=-1)[1:-1, 1:-1]


def place(rng, taken, height, width):
    """Returns the (top, left) of a rectangle that overlaps few of the pixels taken; None where none was found."""
    for _ in range(20):
        top, left = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
        if taken[top : top + height, left : left + width].mean() < 0.05:
            return top, left
    return None


def scene(rng, files, categories):
    """Returns a picture, its map of classes and its layout."""
    canvas, classes, layout = np.full((SIZE, SIZE, 3), 255, np.uint8), np.zeros((SIZE, SIZE), np.uint8), []
    for number in range(rng.integers(1, MAX_OBJECTS + 1)):
        file = files[rng.integers(len(files))]
        side = int(rng.integers(MIN_SIDE, MAX_SIDE + 1))
        with Image.open(file) as opened:
            emoji = opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        there = foreground(emoji)
        rows, columns = (np.flatnonzero(there.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            continue  # a white flag on white
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        pixels, there = np.asarray(emoji)[box], there[box]
        found = place(rng, classes > 0, *there.shape)
        if found is None:
            continue
        (top, left), (height, width) = found, there.shape
        canvas[top : top + height, left : left + width][there] = pixels[there]
        classes[top : top + height, left : left + width][there] = 1 + categories.index(file.parent.name)
        sides = (left / SIZE, top / SIZE, (left + width) / SIZE, (top + height) / SIZE)
        layout.append(" ".join([file.parent.name, *(f"{value:.4g}" for value in sides)]))
    return canvas, classes, "; ".join(layout)


source, folder = map(pathlib.Path, sys.argv[1:])
categories = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
folder.parent.mkdir(parents=True, exist_ok=True)
temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
lines = []
try:
    for split, count in COUNTS.items():
        files = sorted((source / split).glob("*/*.png"))
        (temporary / split / "scene").mkdir(parents=True)
        (temporary / "maps" / split).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng((0 if split == "train" else 1, number))
            canvas, classes, layout = scene(rng, files, categories)
            names = f"{split}/scene/{number:05}.png", f"maps/{split}/{number:05}.png"
            for name, array in zip(names, (canvas, classes), strict=True):
                Image.fromarray(array).save(temporary / name)
            lines.append(json.dumps({"file_name": names[0], "layout": layout, "map": names[1]}) + "\n")
    (temporary / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, folder)
finally:
    shutil.rmtree(temporary, ignore_errors=True)
print(f"wrote {folder}: {COUNTS['train']} + {COUNTS['test']} pictures, boxes of {len(categories)} classes: {', '.join(categories)}")
PYTHON
