"""Layouts, boxes with classes, as text and as LDM's tokens (arXiv:2112.10752, section 4.3.1).

The text of a layout names each object's class and its box: "cat 0 0.25 0.5 1; dog 0.5 0.25 1 1", left, top, right and
bottom in fractions of the image (where it is not square, of the square that is cut from its middle).

An object is three tokens: its class, its top left corner and its bottom right one, each corner a place of a grid of
`num_sections` x `num_sections` places. A start stands before all objects and an end behind them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dit_jax.config import LayoutConfig
from dit_jax.files import normalised


class Box(NamedTuple):
    """An object: its class by number, and where it is, in fractions of the image."""

    label: int
    left: float
    top: float
    right: float
    bottom: float


@dataclasses.dataclass(frozen=True)
class LayoutTokenizer:
    """Layouts to tokens of a config. Ids are classes first, then corners row by row, then the start and the end."""

    layout: LayoutConfig

    def parse(self, text: str) -> list[Box]:
        """Returns the boxes of a layout's text; ValueError in one line where it cannot be one."""
        classes = self.layout.classes
        known = [normalised(name) for name in classes]
        boxes = []
        for part in filter(None, map(str.strip, normalised(text).split(";"))):
            name, *numbers = part.rsplit(maxsplit=4)
            try:
                sides = [float(number) for number in numbers]
            except ValueError:
                sides = []
            if len(sides) != 4:
                raise ValueError(f"layout: {part[:200]!r} must be a class and four numbers, such as 'cat 0 0.25 0.5 1'")
            if name not in known:
                raise ValueError(
                    f"layout: {name[:200]!r} is no class of the model; its classes are {', '.join(classes)}"
                )
            boxes.append(Box(known.index(name), *sides))
        return boxes

    def tokenize(self, boxes: list[Box], mirrored: bool = False) -> dict[str, np.ndarray]:
        """Returns the tokens of a layout, `ids` [L] int32 and `mask` [L] bool, False behind the end; L is fixed.

        mirrored: of the mirror image. Raises ValueError where a box is not within the image, or there are too many.
        """
        layout, num_classes = self.layout, len(self.layout.classes)
        if len(boxes) > layout.max_objects:
            raise ValueError(
                f"layout: {len(boxes)} boxes are more than the model's {layout.max_objects}; leave some out"
            )
        start = num_classes + layout.num_sections**2
        ids = [start]
        for box in boxes:
            if not (0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1):
                raise ValueError(
                    f"layout: {layout.classes[box.label]!r} has the box {box[1:]}, which must lie within the image: "
                    "0 <= left < right <= 1 and 0 <= top < bottom <= 1"
                )
            left, right = (1 - box.right, 1 - box.left) if mirrored else (box.left, box.right)
            ids += [box.label, self._corner(left, box.top), self._corner(right, box.bottom)]
        ids.append(start + 1)
        mask = np.arange(layout.num_tokens) < len(ids)
        return {"ids": np.pad(np.array(ids, np.int32), (0, len(mask) - len(ids))), "mask": mask}

    def boxes_of(self, ids: np.ndarray, mask: np.ndarray) -> list[Box]:
        """Returns the boxes of tokens [L], their corners as the grid has rounded them."""
        objects = ids[mask][1:-1].reshape(-1, 3)
        num_classes, last = len(self.layout.classes), self.layout.num_sections - 1
        rows, columns = np.divmod(objects[:, 1:] - num_classes, self.layout.num_sections)
        return [
            Box(int(label), *(float(side) / last for side in (x[0], y[0], x[1], y[1])))
            for label, x, y in zip(objects[:, 0], columns, rows, strict=True)
        ]

    def _corner(self, x: float, y: float) -> int:
        column, row = (round(side * (self.layout.num_sections - 1)) for side in (x, y))
        return len(self.layout.classes) + row * self.layout.num_sections + column
