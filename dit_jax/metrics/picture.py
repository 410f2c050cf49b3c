"""Images for people: the rule from floats to bytes, and many images in one picture."""

import numpy as np

from dit_jax.types import Array

VISIBLE_PIXELS = 96  # make_grid enlarges smaller images up to it


def to_uint8(images: Array | np.ndarray) -> Array | np.ndarray:
    """Returns images in [-1, 1] as bytes: 127.5 x + 128, clipped to [0, 255], truncated (NumPy or JAX, as given).

    This is the rule by which the samples were made that the DiT paper evaluates (sample_ddp.py of its code); another
    rounding would shift FID.
    """
    return (127.5 * images + 128).clip(0, 255).astype("uint8")


def make_grid(images: np.ndarray, columns: int, padding: int = 1, scale: int | None = None) -> np.ndarray:
    """Returns one picture of many images, row by row, with white lines between them.

    Args:
      images: [N, H, W, C] uint8 with C = 1 (grey) or 3 (RGB).
      columns: images in a row; cells that are left over in the last row are white.
      padding: width of the lines, in pixels of the images.
      scale: whole factor of enlargement, by repeating pixels; None enlarges up to 96 pixels a side.

    Returns:
      [H', W', 3] uint8.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be [N, H, W, 1 or 3] uint8, N > 0; got {images.shape} {images.dtype}")
    num, height, width, _ = images.shape
    columns = min(columns, num)
    rows = -(-num // columns)
    scale = max(1, VISIBLE_PIXELS // max(height, width)) if scale is None else scale
    cells = np.full((rows * columns, height + padding, width + padding, 3), 255, np.uint8)
    cells[:num, :height, :width] = images  # grey is broadcast to RGB
    cells = cells.reshape(rows, columns, height + padding, width + padding, 3)
    grid = cells.swapaxes(1, 2).reshape(rows * (height + padding), columns * (width + padding), 3)
    grid = np.pad(grid, ((padding, 0), (padding, 0), (0, 0)), constant_values=255)
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)  # [H', W', 3]
