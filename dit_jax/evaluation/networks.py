"""The networks whose features images are measured in, by the name that `--features` has for them."""

import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.checkpoint import params_digest
from dit_jax.config import DataConfig
from dit_jax.evaluation.feature_networks import load_network
from dit_jax.evaluation.trained_classifier import trained_classifier
from dit_jax.metrics.classifier import MAX_SIDE
from dit_jax.metrics.feature_network import FeatureNetwork

CLASSIFIER, INCEPTION = "classifier", "inception"
# How each network's images become its input, by the name of its distance.
RESIZES = {"FID": "TensorFlow 1's bilinear to 299 x 299, without antialiasing"}


class NamedNetwork(NamedTuple):
    """A network and what a card says of it."""

    key: str  # in names of figures: fd_KEY; of "inception" alone fid
    network: FeatureNetwork
    outputs: tuple[str, ...]  # of `FeatureNetwork.apply`
    facts: dict[str, str | float]  # name, hash of the weights, how an image becomes the input, and what else there is


def named_network(features: str, data: DataConfig, cache: str | os.PathLike) -> NamedNetwork:
    """Returns a network.

    Args:
      features: "classifier", trained on `data`; or a file that `dit-jax convert` wrote, such as
        weights/inception.safetensors.
      cache: folder where a trained classifier is kept.

    Raises:
      ValueError: where there is no such network.
    """
    if features == CLASSIFIER:
        return _classifier(data, cache)
    if not features.endswith(".safetensors"):
        raise ValueError(
            f"--features={features} must be {CLASSIFIER}, or a .safetensors file of `dit-jax convert --kind=inception`"
        )
    network = load_network(features)
    key = INCEPTION if network.distance == "FID" else re.sub(r"\W+", "_", network.name.lower())
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
    outputs = tuple(jax.eval_shape(network.apply, network.params, image))
    resize = RESIZES[network.distance]
    return NamedNetwork(
        key, network, outputs, {"name": network.name, "sha256": params_digest(network.params), "resize": resize}
    )


def _classifier(data: DataConfig, cache: str | os.PathLike) -> NamedNetwork:
    trained = trained_classifier(data, cache)
    name = f"{os.path.basename(os.path.normpath(data.name))}-classifier"
    network = FeatureNetwork(
        name, f"FD-{name}", trained.params, lambda params, images: trained.module.apply({"params": params}, images)
    )
    resize = f"antialiased bilinear to {MAX_SIDE} x {MAX_SIDE}" if data.image_size > MAX_SIDE else "none"
    facts = {"name": name, "sha256": params_digest(trained.params), "resize": resize, "accuracy": trained.accuracy}
    return NamedNetwork(CLASSIFIER, network, ("pool", "logits"), facts)
