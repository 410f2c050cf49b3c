"""Random masks for training to inpaint: rectangles, brush strokes and half planes, each in a third of the images."""

import numpy as np
from PIL import Image, ImageDraw


def random_hole(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns a mask [size, size, 1] float32: 1 where to paint, 0 where the image is known."""
    draw = (_rectangles, _strokes, _half_plane)[rng.integers(3)]
    return draw(rng, size).astype(np.float32)[..., None]


def _rectangles(rng: np.random.Generator, size: int) -> np.ndarray:
    hole = np.zeros((size, size), bool)
    for _ in range(rng.integers(1, 4)):
        height, width = rng.integers(size // 5, size // 2 + 1, size=2)
        top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
        hole[top : top + height, left : left + width] = True
    return hole


def _strokes(rng: np.random.Generator, size: int) -> np.ndarray:
    image = Image.new("1", (size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        points = [tuple(point) for point in rng.uniform(0, size, (rng.integers(2, 6), 2)).tolist()]
        draw.line(points, fill=1, width=int(rng.integers(max(1, size // 16), max(2, size // 5))), joint="curve")
    return np.asarray(image)


def _half_plane(rng: np.random.Generator, size: int) -> np.ndarray:
    """What lies beyond a line that is within a quarter of the size from the centre."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25) * size
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    return np.cos(angle) * columns + np.sin(angle) * rows > offset
