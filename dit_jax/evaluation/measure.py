"""Figures of a set of images against a reference, from the features of a network.

A figure's name says what it is: `fid` and `sfid` are of the Inception-v3 of 2015-12-05 alone, another network's Frechet
distance is `fd_NETWORK`, and a figure of fewer than 50,000 images ends in their number, `fd_classifier_5k`: it does not
compare with one of more.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dit_jax.metrics.frechet import Statistics, StatisticsAccumulator, frechet_distance
from dit_jax.metrics.inception_score import inception_score
from dit_jax.metrics.kid import kernel_distance
from dit_jax.metrics.precision_recall import NUM_NEIGHBORS, precision_recall

METRICS = ("fd", "sfid", "kid", "is", "precision", "recall", "recognised")
FULL_COUNT = 50_000  # images of the published figures
IS_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SETTINGS = {
    "kid": {"subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE},
    "is": {"splits": IS_SPLITS},
    "precision": {"neighbors": NUM_NEIGHBORS},
    "recall": {"neighbors": NUM_NEIGHBORS},
}
OF_FEATURES = {"kid", "precision", "recall"}  # metrics that need each image's features, not their statistics alone


class Reference(NamedTuple):
    """What samples are compared with."""

    identity: dict  # for the card: name, hash, size
    statistics: Statistics
    spatial: Statistics | None = None
    features: np.ndarray | None = None  # [M, D] float32 of some of its images, evenly spaced


def outputs_needed(metrics: Sequence[str]) -> tuple[str, ...]:
    """Returns the outputs of a network (`metrics.feature_network`) that metrics take."""
    needed = {"spatial": {"sfid"}, "logits": {"is", "recognised"}}
    return ("pool", *(output for output, of in needed.items() if of & set(metrics)))


class Measured(NamedTuple):
    """Figures by name, and what a reader must know of them."""

    values: dict[str, float]
    notes: list[str]


def obstacles(
    num_samples: int, has_labels: bool, outputs: Iterable[str], reference: Reference, of_reference_classes: bool
) -> dict[str, str | None]:
    """Returns every metric with what keeps it from being measured, None where nothing does.

    Args:
      outputs: that the network has; of_reference_classes: whether its logits are of the samples' classes.
    """
    outputs = set(outputs)
    no_features = None if reference.features is not None else "the reference has statistics alone, no images"
    few = f"it needs {KID_SUBSET_SIZE:,} images" if num_samples < KID_SUBSET_SIZE else None
    if few is None and reference.features is not None and len(reference.features) < KID_SUBSET_SIZE:
        few = f"it needs {KID_SUBSET_SIZE:,} reference images"
    neighbors = f"it needs more than {NUM_NEIGHBORS} images" if num_samples <= NUM_NEIGHBORS else None
    spatial = None if "spatial" in outputs else "the network has no spatial features"
    if spatial is None and reference.spatial is None:
        spatial = "the reference has no spatial statistics"
    logits = None if "logits" in outputs else "the network has no logits"
    splits = f"it needs {IS_SPLITS} images" if num_samples < IS_SPLITS else None
    recognised = None if of_reference_classes else "the network does not know the samples' classes"
    return {
        "fd": None if num_samples > 1 else "it needs 2 images",
        "sfid": spatial,
        "kid": no_features or few,
        "is": logits or splits,
        "precision": no_features or neighbors,
        "recall": no_features or neighbors,
        "recognised": recognised or (None if has_labels else "the samples have no labels"),
    }


def measure(
    extracted: Iterable[dict[str, np.ndarray]],
    labels: np.ndarray | None,
    reference: Reference,
    network_key: str,
    metrics: Sequence[str],
) -> Measured:
    """Returns the figures of images whose features are `extracted` in their order.

    Args:
      labels: [N] that the images were drawn for, where "recognised" is among the metrics.
      reference: with what the metrics need (`obstacles`).
    """
    pool, spatial = StatisticsAccumulator(), StatisticsAccumulator()
    kept: dict[str, list[np.ndarray]] = {"features": [], "logits": []}
    for outputs in extracted:
        pool.add(outputs["pool"])
        if "sfid" in metrics:
            spatial.add(outputs["spatial"])
        if OF_FEATURES & set(metrics):
            kept["features"].append(outputs["pool"])
        if {"is", "recognised"} & set(metrics):
            kept["logits"].append(outputs["logits"])
    features, logits = (np.concatenate(parts) if parts else None for parts in kept.values())
    statistics = pool.statistics()
    found: dict[str, float] = {}
    notes: list[str] = []
    for metric, ours, theirs in (("fd", pool, reference.statistics), ("sfid", spatial, reference.spatial)):
        if metric in metrics:
            distance = frechet_distance(statistics if ours is pool else ours.statistics(), theirs)
            found[metric] = distance.value
            notes += [f"{metric}: {note}" for note in distance.notes]
    if "kid" in metrics:
        kid = kernel_distance(features, reference.features, KID_SUBSETS, KID_SUBSET_SIZE)
        found |= {"kid": kid.mean, "kid_std": kid.std}
    if "is" in metrics:
        score = inception_score(logits, IS_SPLITS)
        found |= {"is": score.mean, "is_std": score.std}
    if {"precision", "recall"} & set(metrics):
        shares = precision_recall(features, reference.features)._asdict()
        found |= {name: share for name, share in shares.items() if name in metrics}
    if "recognised" in metrics:
        found["recognised"] = float(np.mean(logits.argmax(axis=-1) == labels))
    return Measured({figure_name(name, network_key, statistics.count): value for name, value in found.items()}, notes)


def figure_name(metric: str, network_key: str, num_samples: int) -> str:
    """Returns the name of a figure, such as `fid`, `fd_classifier_5k` or `recognised`."""
    if metric == "recognised":  # a share, whatever the number of images
        return metric
    name = {"fd": "fid"}.get(metric, metric) if network_key == "inception" else f"{metric}_{network_key}"
    return name + count_suffix(num_samples)


def count_suffix(num_samples: int) -> str:
    """Returns "_5k" for 5,000 images, "_500" for 500, and "" for those of the published figures, 50,000 and more."""
    if num_samples >= FULL_COUNT:
        return ""
    return f"_{num_samples // 1000}k" if num_samples % 1000 == 0 else f"_{num_samples}"
