"""Samples to measure that were not drawn now: a file of images, or a folder of pictures."""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.evaluation.reference import FolderImages, image_batches
from dit_jax.metrics.adm_files import SamplesFile


class FolderSamples(FolderImages):
    """The pictures below a folder, in the order of their paths, as `SamplesFile` gives those of a file; no labels."""

    kind = "a folder of images"
    labels = None

    def __init__(self, folder: str | os.PathLike):
        """Opens the folder; raises ValueError where it has no image."""
        super().__init__(folder)
        self.path = pathlib.Path(folder)
        height, width = super().__getitems__([0])[0]["image"].shape[:2]
        self.shape: tuple[int, int, int, int] = (len(self), height, width, 3)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the examples; ValueError where one is not of the first one's size: none is cut to another's."""
        examples = super().__getitems__(indices)
        for index, example in zip(indices, examples, strict=True):
            if example["image"].shape[:2] != self.shape[1:3]:
                sizes = ["{1} x {0}".format(*shape) for shape in (self.shape[1:], example["image"].shape)]
                raise ValueError(
                    f"{self.path} must have images of one size, but {self.paths[0].name} is {sizes[0]} and "
                    f"{self.paths[index].name} is {sizes[1]}; scale them to the size of the reference's"
                )
        return examples

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields the images in order, uint8 [n, H, W, 3], n at most `batch_size`; they are square (`open_samples`)."""
        return image_batches(self, DataConfig(str(self.path), self.shape[1]), batch_size)


def open_samples(path: str) -> SamplesFile | FolderSamples:
    """Returns the images of a file or a folder; raises ValueError where they are not square."""
    samples = FolderSamples(path) if pathlib.Path(path).is_dir() else SamplesFile(path)
    height, width = samples.shape[1:3]
    if height != width:
        raise ValueError(f"--samples={path} has images of {height} x {width}; give square ones")
    return samples
