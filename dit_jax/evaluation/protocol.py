"""The protocol card: a result with all that it depends on, and whether two results compare.

A card is JSON with these keys:

    values      the figures by name
    notes       what a reader must know of them, such as a singular covariance; left_out: metrics with their obstacles
    subject     what was measured: the checkpoint, or the images alone
    protocol    how: the samples (number, labels, seed, sampler, guidance, decoder, rule to bytes), the features'
                network (hash, resize), the reference (hash, size), the metrics' settings, the software's versions

It holds no time, no path and no machine: the same evaluation again gives the same bytes.
"""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from dit_jax.files import is_number, read_json, to_json, write_text_whole
from dit_jax.metrics.history import check_figure_name

PACKAGES = ("dit_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow")  # that a figure passes through
UINT8_RULE = "127.5 x + 128, clipped to [0, 255], truncated"  # of `metrics.picture.to_uint8`
LABELS = {
    "fd": "Frechet distance",
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "kid_std": "KID, deviation over subsets",
    "is": "inception score",
    "is_std": "inception score, deviation over splits",
    "precision": "precision",
    "recall": "recall",
    "recognised": "share recognised",
}


def make_card(
    values: dict[str, float], notes: Sequence[str], left_out: dict[str, str], subject: dict, protocol: dict
) -> dict[str, Any]:
    """Returns the card of a result."""
    protocol = protocol | {"software": software()}
    card = {"values": values, "notes": list(notes), "left_out": left_out, "subject": subject, "protocol": protocol}
    return json.loads(json.dumps(card))  # as it will be read: tuples are lists


def software() -> dict[str, str]:
    """Returns the versions of what a figure passes through."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def refuse_other(path: pathlib.Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Raises ValueError where a file holds a result of other settings, which the new one would take the place of.

    Args:
      path: of a card, or of another JSON object with settings and figures.
      settings: JSON values by their keys there (of a card in its subject or protocol); others are not compared, nor is
        what the file of an older version has not. overwrite: whether the result may be lost.
    """
    if overwrite or not path.exists():
        return
    remedy = "give --output=DIR for another place, or --overwrite to put the new result in its place"
    try:
        found = read_json(path)
        found = {**found, **found.get("subject", {}), **found.get("protocol", {})}
        if found.keys().isdisjoint(settings):
            raise ValueError("it is no result")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is there and cannot be read ({error}); {remedy}") from error
    settings = json.loads(json.dumps(settings))  # as a file is read: tuples are lists
    pairs = [dict(_leaves({key: each[key] for key in settings if key in found})) for each in (found, settings)]
    keys = {key: None for pair in pairs for key in pair}
    changes = {key: [pair.get(key, "none") for pair in pairs] for key in keys}
    other = [f"{key}: {_short(theirs)} -> {_short(ours)}" for key, (theirs, ours) in changes.items() if theirs != ours]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ValueError(f"{path} is a result of other settings ({'; '.join(other[:3])}{more}); {remedy}")


def write_card(path: str | os.PathLike, card: dict[str, Any]) -> None:
    """Writes a card; the file appears whole, or not at all."""
    write_text_whole(path, to_json(card))


def read_card(path: str | os.PathLike) -> dict[str, Any]:
    """Returns a card; raises ValueError where the file is none."""
    path = pathlib.Path(path)
    try:
        card = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a result of `dit-jax evaluate` ({error})") from error
    if not isinstance(card, dict) or not all(isinstance(card.get(key), dict) for key in ("values", "protocol")):
        raise ValueError(f"{path} is not a result of `dit-jax evaluate`: it has no values with their protocol")
    card = {"notes": [], "left_out": {}, "subject": {}} | card
    try:
        _check_card(card)
    except ValueError as error:
        raise ValueError(f"{path} is not a result of `dit-jax evaluate`: {error}; measure again") from error
    return card


def _check_card(card: dict[str, Any]) -> None:
    """Raises ValueError where a card's parts are not what `make_card` writes, as far as anything here reads them."""
    protocol, values = card["protocol"], card["values"]
    features, samples = (part if isinstance(part, dict) else {} for part in map(protocol.get, ("features", "samples")))
    texts = [features.get("name"), features.get("distance")]
    for name, value in values.items():
        check_figure_name(name)
        _require(is_number(value), f"{name} must be a number")
    _require(bool(values), "it has no figure")
    _require(all(isinstance(text, str) for text in texts), "protocol.features must have a name and a distance")
    count = samples.get("num_samples")
    _require(type(count) is int and 0 < count < 2**53, "protocol.samples.num_samples must be their number")
    notes, left_out, subject = (card[key] for key in ("notes", "left_out", "subject"))
    _require(isinstance(notes, list) and all(isinstance(note, str) for note in notes), "notes must be texts")
    _require(isinstance(left_out, dict), "left_out must be metrics with their reasons")
    _require(
        all(isinstance(reason, str) for reason in left_out.values()), "left_out must be metrics with their reasons"
    )
    _require(isinstance(subject, dict), "subject must be what was measured")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def differences(one: dict[str, Any], other: dict[str, Any], varied: Sequence[str] = ()) -> list[str]:
    """Returns "key: value | value" for all that two cards' protocols differ in; [] if the results compare.

    varied: keys, or beginnings of keys such as "samples", that are meant to differ.
    """
    pairs = dict(_leaves(one["protocol"])), dict(_leaves(other["protocol"]))
    keys = {key: None for pair in pairs for key in pair}  # in order, each once
    unknown = [name for name in varied if not any(_within(key, name) for key in keys)]
    if unknown:
        raise ValueError(f"--varied={unknown[0]} is not a key of these protocols; they have {', '.join(keys)}")
    found = []
    for key in keys:
        ours, theirs = (pair.get(key, "absent") for pair in pairs)
        if ours != theirs and not any(_within(key, name) for name in varied):
            found.append(f"{key}: {ours} | {theirs}")
    return found


def table(card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (what, value) of a card for people: the figures first."""
    for name, value in card["values"].items():
        yield figure_label(name, card), f"{value:.4g}"
    for metric, reason in card.get("left_out", {}).items():
        yield f"{LABELS.get(metric, metric)}: not measured", reason
    for note in card.get("notes", ()):
        yield "note", note
    for section in ("subject", "protocol"):
        yield from ((key, str(value)) for key, value in _leaves(card.get(section, {})) if value not in (None, {}))


def figure_label(name: str, card: dict[str, Any]) -> str:
    """Returns what people call a figure, such as "FD-fashion_mnist-classifier, 5,000 images"."""
    network, distance = (card["protocol"]["features"][key] for key in ("name", "distance"))
    count = card["protocol"]["samples"]["num_samples"]
    metric = next((metric for metric in sorted(LABELS, key=len, reverse=True) if name.startswith(metric)), None)
    if metric is None:
        return name
    if metric == "recognised":
        return f"{LABELS[metric]} by {network}"
    label = distance if metric in ("fd", "fid") else f"{LABELS[metric]}, features of {network}"
    return f"{label}, {count:,} images"


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    """Returns a value for an error; of a hash or a long list the beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")
