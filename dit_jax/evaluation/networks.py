"""The networks whose features images are measured in, by the name that `--features` has for them."""

import os
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.checkpoint import params_digest
from dit_jax.config import DataConfig, did_you_mean
from dit_jax.evaluation.feature_networks import load_network
from dit_jax.evaluation.trained_classifier import trained_classifier
from dit_jax.metrics.classifier import MAX_SIDE
from dit_jax.metrics.feature_network import FeatureNetwork

CLASSIFIER, INCEPTION = "classifier", "inception"
WEIGHTS = pathlib.Path("weights")  # NAME.safetensors in there is what `dit-jax convert --kind=NAME` is told to write
# The published networks, and how images become their input.
RESIZES = {
    INCEPTION: "TensorFlow 1's bilinear to 299 x 299, without antialiasing",
    "resnet50": "antialiased bilinear to 224 x 224",
    "dinov2": "Pillow's bicubic to 224 x 224, in bytes",
}


class NamedNetwork(NamedTuple):
    """A network and what a card says of it."""

    key: str  # in names of figures: fd_KEY; of "inception" alone fid
    network: FeatureNetwork
    outputs: tuple[str, ...]  # of `FeatureNetwork.apply`
    facts: dict[str, str | float]  # name, hash of the weights, how an image becomes the input, and what else there is


def named_network(features: str, data: DataConfig, cache: str | os.PathLike) -> NamedNetwork:
    """Returns a network.

    Args:
      features: "classifier", trained on `data`; "inception", "resnet50" or "dinov2", in `WEIGHTS`; or a file of one of
        these, as `dit-jax convert` writes it.
      cache: folder where a trained classifier is kept.

    Raises:
      ValueError: where there is no such network.
    """
    if features == CLASSIFIER:
        return _classifier(data, cache)
    path = WEIGHTS / f"{features}.safetensors" if features in RESIZES else pathlib.Path(features)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"--features={features} must be one of {', '.join([CLASSIFIER, *RESIZES])}, or a .safetensors file of "
            f"`dit-jax convert`{did_you_mean(features, [CLASSIFIER, *RESIZES])}"
        )
    if not path.is_file():
        fetch = "./launch/resnet_weights.sh fetches it" if features == "resnet50" else "`dit-jax convert` writes it"
        raise ValueError(f"--features={features} needs {path}; {fetch}")
    network = load_network(path)
    kind = network.distance.removeprefix("FD-").lower()
    key = INCEPTION if network.distance == "FID" else re.sub(r"\W+", "_", kind)
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
    outputs = tuple(jax.eval_shape(network.apply, network.params, image))
    resize = RESIZES[key.partition("_")[0]]
    return NamedNetwork(key, network, outputs, _facts(network, resize))


def default_features() -> str:
    """Returns the network of the published figures, or the nearest to it that is at hand."""
    there = [name for name in (INCEPTION, "resnet50") if (WEIGHTS / f"{name}.safetensors").is_file()]
    return there[0] if there else CLASSIFIER


def _facts(network: FeatureNetwork, resize: str) -> dict[str, str | float]:
    digest = params_digest(network.params)
    return {"name": network.name, "distance": network.distance, "sha256": digest, "resize": resize}


def _classifier(data: DataConfig, cache: str | os.PathLike) -> NamedNetwork:
    trained = trained_classifier(data, cache)
    name = f"{os.path.basename(os.path.normpath(data.name))}-classifier"
    network = FeatureNetwork(
        name, f"FD-{name}", trained.params, lambda params, images: trained.module.apply({"params": params}, images)
    )
    resize = f"antialiased bilinear to {MAX_SIDE} x {MAX_SIDE}" if data.image_size > MAX_SIDE else "none"
    facts = _facts(network, resize) | {"accuracy": trained.accuracy}
    return NamedNetwork(CLASSIFIER, network, ("pool", "logits"), facts)
