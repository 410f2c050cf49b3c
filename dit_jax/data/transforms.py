"""From a decoded image to the array a network takes, in NumPy and Pillow; the crop is ADM's (arXiv:2105.05233).

Images are uint8 [H, W, C] in [0, 255] with C = 1 (grey) or 3 (RGB), until `to_float`.
"""

import numpy as np
from PIL import Image

CROP = "adm_center"  # what `center_crop` is called where data is identified


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Returns the image with 1 (grey) or 3 (RGB) channels; grey is the luma of ITU-R 601 (Pillow's "L")."""
    if image.shape[-1] == channels:
        return image
    return _to_array(_to_pillow(image).convert({1: "L", 3: "RGB"}[channels]))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of an image, its short side scaled to `size`.

    A large image is first halved with a box filter (the average of 2 x 2 pixels) until its short side is below twice
    the size; a bicubic filter does the rest. An image of that size already is returned as it is.

    Args:
      image: [H, W, C] uint8.
      size: pixels per side of the result.

    Returns:
      [size, size, C] uint8.

    Raises:
      ValueError: where the image is so narrow that its long side would be scaled beyond what Pillow decodes.
    """
    if image.shape[:2] == (size, size):
        return image
    short, long = sorted(image.shape[:2])
    if long * size**2 > short * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"an image of {long} by {short} pixels is too narrow for {size} by {size}; remove it")
    scaled = _to_pillow(image)
    while min(scaled.size) >= 2 * size:
        scaled = scaled.resize((scaled.width // 2, scaled.height // 2), Image.Resampling.BOX)
    scale = size / min(scaled.size)
    scaled = scaled.resize((round(scaled.width * scale), round(scaled.height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return _to_array(scaled.crop((left, top, left + size, top + size)))


def semantic_map(classes: np.ndarray, size: int, num_classes: int, mirrored: bool) -> np.ndarray:
    """Returns the classes [H, W] uint8 of an image's pixels as `center_crop` cuts the image, [size, size] int32.

    Each pixel takes the class of the nearest one. ValueError where there is a class of `num_classes` or above.
    """
    if classes.max() >= num_classes:
        raise ValueError(
            f"a map has the class {classes.max()}, but config.conditions.spatial.num_classes={num_classes}; mend one"
        )
    if classes.shape != (size, size):
        scale = size / min(classes.shape)
        scaled = Image.fromarray(classes).resize(
            (round(classes.shape[1] * scale), round(classes.shape[0] * scale)), Image.Resampling.NEAREST
        )
        left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
        classes = np.asarray(scaled.crop((left, top, left + size, top + size)))
    return (classes[:, ::-1] if mirrored else classes).astype(np.int32)


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    """Returns the mirror image, left for right."""
    return image[:, ::-1]


def to_float(image: np.ndarray) -> np.ndarray:
    """Returns a uint8 image as float32 in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
