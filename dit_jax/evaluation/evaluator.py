"""Measures sets of images against one reference in the features of one network."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from dit_jax.config import DataConfig, did_you_mean
from dit_jax.evaluation.features import extract_features
from dit_jax.evaluation.measure import METRICS, SETTINGS, Reference, measure, obstacles, outputs_needed
from dit_jax.evaluation.networks import NamedNetwork, named_network
from dit_jax.evaluation.reference import FolderImages, load_reference
from dit_jax.files import user_path


class Evaluation(NamedTuple):
    """What was measured of a set of images."""

    values: dict[str, float]  # by the names of `measure.figure_name`
    notes: list[str]
    images: str  # SHA-256 of their bytes, in order


class Evaluator(NamedTuple):
    """A network and a reference (`networks.named_network`, `reference.load_reference`), on a mesh."""

    network: NamedNetwork
    reference: Reference
    mesh: Mesh

    def choose(self, asked: Sequence[str] | None, num_samples: int, has_labels: bool) -> tuple[list[str], dict]:
        """Returns the metrics to measure, and what is left out of all (`asked` None) with the reason.

        Raises:
          ValueError: where a metric that was asked for is unknown, or cannot be measured.
        """
        network = self.network
        found = obstacles(num_samples, has_labels, network.outputs, self.reference, network.key == "classifier")
        if asked is None:
            left_out = {name: reason for name, reason in found.items() if reason}
            return [name for name in METRICS if found[name] is None], left_out
        for name in asked:
            if name == "fid" and network.key != "inception":
                name = network.facts["name"]
                raise ValueError(f"--metrics: fid is of Inception's features alone, these are {name}'s; ask for fd")
            if name not in METRICS and name != "fid":
                raise ValueError(
                    f"--metrics: {name!r} must be one of {', '.join(METRICS)}{did_you_mean(name, METRICS)}"
                )
        metrics = ["fd" if name == "fid" else name for name in asked]
        for name in metrics:
            if found[name]:
                raise ValueError(f"--metrics: {name} cannot be measured: {found[name]}")
        return metrics, {}

    def evaluate(self, parts: Iterable[np.ndarray], labels: np.ndarray | None, metrics: Sequence[str]) -> Evaluation:
        """Returns the figures of images that come in parts of any size, uint8 [n, H, W, 3], the same on every process.

        labels: [N] that they were drawn for; needed for "recognised" alone.
        """
        digest = hashlib.sha256()

        def hashed() -> Iterator[np.ndarray]:
            for part in parts:
                digest.update(np.ascontiguousarray(part).tobytes())
                yield part

        network = self.network.network
        extracted = extract_features(network, hashed(), self.mesh, outputs_needed(metrics))
        values, notes = measure(extracted, labels, self.reference, self.network.key, metrics)
        return Evaluation(values, notes, digest.hexdigest())

    def protocol(self, metrics: Sequence[str]) -> dict:
        """Returns what a card says of how images are measured."""
        settings = {name: SETTINGS.get(name, {}) for name in METRICS if name in metrics}
        return {"features": self.network.facts, "reference": self.reference.identity, "metrics": settings}


def make_evaluator(
    reference: str | None, features: str, data: DataConfig, mesh: Mesh, cache: str | os.PathLike
) -> Evaluator:
    """Returns what measures images of a data set's size and channels.

    Args:
      reference: of `load_reference`; None: the data set's training images.
      features: of `named_network`; cache: folder of what is computed once, "~" is the home.
    """
    cache = pathlib.Path(user_path(os.fspath(cache)))
    if reference is not None and pathlib.Path(reference).is_dir():
        FolderImages(reference)  # what is wrong with it is told before a network is trained
    network = named_network(features, data, cache)
    return Evaluator(network, load_reference(reference, data, network, mesh, cache), mesh)
