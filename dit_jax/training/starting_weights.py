"""The weights of another run that a new one starts with (`config.training.init_from`).

They must have been trained for what they go on with: the same latents, process and conditions. Other classes are taken,
and more or fewer conditions: what such a change adds to the network is made anew, and what it removes is not read.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dit_jax.checkpoint import Checkpoints, read_newest_good, restore_eval_params
from dit_jax.config import Config
from dit_jax.models.averages import MAX_INITIAL_SHARE
from dit_jax.models.build import abstract_params, init_params
from dit_jax.parallel.rules import tree_shardings
from dit_jax.pretrained.name_map import flatten
from dit_jax.types import Array, Params

SCALE_TOLERANCE = 1e-3  # of two scales' ratio: 1 / std of the same latents differs by less between machines
MAX_SHOWN = 4  # differences, or groups of parameters, in a line


def check_starting_weights(config: Config, other: Config) -> list[str]:
    """Returns what a person must know of a run that starts with another run's weights, a line each.

    Args:
      config: of the run; what it records of its latents and texts (scale, digests) is not compared where it is None.
      other: of the run whose weights it starts with.

    Raises:
      ValueError: where the weights were trained for something else, naming it in both; not where
        `config.training.init_from_any` is set, which turns that into a line.
    """
    name = f"config.training.init_from={config.training.init_from!r}"
    if config.stage != other.stage:
        raise ValueError(f"{name} is a run of stage {other.stage!r}, not {config.stage!r}")
    differences, unknown = _compare(config, other)
    taken_anyway = config.training.init_from_any
    if differences and not taken_anyway:
        raise ValueError(
            f"{name} was trained for something else than this run: {_listed(differences)}; change the config or the "
            "workdir, or take the weights as they are with --config.training.init_from_any=True"
        )
    lines = [f"{name} was trained for something else: {_listed(differences)}"] if differences else []
    lines += [f"{name} does not record its {path}: it cannot be compared with this run's" for path in unknown]
    ours = _shapes(config)
    alike = _shapes(other if config.stage == "autoencoder" else _with_conditions_of(config, other))
    path = next((path for path in sorted(ours.keys() | alike.keys()) if ours.get(path) != alike.get(path)), None)
    if path is not None and not taken_anyway:
        raise ValueError(
            f"{name} must be of this config's network, but its {path} is {alike.get(path, 'missing')}, not "
            f"{ours.get(path, 'there')}; change the config or the workdir"
        )
    return lines + _changes(config, other)


def _compare(config: Config, other: Config) -> tuple[list[str], list[str]]:
    """Returns "path is A there and B here" for each difference, and the paths that the other run does not record."""
    differences, unknown = [], []
    facts, theirs = _facts(config), _facts(other)
    for path, ours in facts.items():
        if path not in theirs or theirs[path] == ours:
            continue
        recorded = path.endswith((".scale", ".autoencoder", ".encoder"))
        if ours is None and recorded:
            continue  # it will be known when the data is found
        if theirs[path] is None and recorded:
            unknown.append(path)
        elif not (path.endswith(".scale") and abs(theirs[path] / ours - 1) <= SCALE_TOLERANCE):
            differences.append(f"config.{path} is {theirs[path]!r} there and {ours!r} here")
    return differences, unknown


def _facts(config: Config) -> dict[str, Any]:
    """Returns by path what decides what weights mean, as far as two runs of a stage both have it."""
    if config.stage == "autoencoder":
        codebook = config.autoencoder.codebook
        num_codes = codebook and codebook.num_codes
        facts = {"data.channels": config.data.channels, "autoencoder.codebook.num_codes": num_codes}
        return facts | {"autoencoder.num_groups": config.autoencoder.num_groups}
    diffusion, latents = config.diffusion, config.latents
    names = ["num_timesteps", "schedule"] + ["beta_start", "beta_end"] * (diffusion.schedule != "cosine")
    names += ["prediction", "variance"] * (config.stage == "diffusion")
    facts = {f"diffusion.{name}": getattr(diffusion, name) for name in names}
    # What no array's shape tells.
    for section, names in {"dit": ("num_heads",), "unet": ("num_heads", "head_channels", "num_groups")}.items():
        network = getattr(config, section)
        facts |= {f"{section}.{name}": getattr(network, name) for name in names} if network else {}
    facts["latents"] = "pixels" if latents is None else "latents"
    if latents is None:
        facts["data.channels"] = config.data.channels
    else:
        facts |= {f"latents.{name}": getattr(latents, name) for name in ("scale", "shift", "autoencoder")}
        facts["latents.shape, the channels"] = latents.shape[-1]
    for condition, names in {
        "text": ("encoder",),
        "layout": ("classes", "num_sections"),
        "spatial": ("kind", "factor", "num_classes"),
    }.items():
        section = config.conditions and getattr(config.conditions, condition)
        if section:
            facts |= {f"conditions.{condition}.{name}": getattr(section, name) for name in names}
    return facts


def _with_conditions_of(config: Config, other: Config) -> Config:
    """Returns the other run's config with this run's classes and conditions: its network, had it had these."""
    values: dict[str, Any] = {"data": dataclasses.replace(other.data, num_classes=config.data.num_classes)}
    values["conditions"] = config.conditions
    ours, theirs = config.dit, other.dit
    if ours and theirs:
        changes = {"class_conditional": ours.class_conditional}
        # Tokens are a condition's; how vectors modulate the norms is not.
        if _modulation(ours.conditioning) == _modulation(theirs.conditioning):
            changes["conditioning"] = ours.conditioning
        values["dit"] = dataclasses.replace(theirs, **changes)
    ours, theirs = config.unet, other.unet
    if ours and theirs and ours.context_width == theirs.context_width:
        label = theirs.label if theirs.class_conditional else ours.label
        values["unet"] = dataclasses.replace(theirs, class_conditional=ours.class_conditional, label=label)
    return dataclasses.replace(other, **values)


def _modulation(conditioning: Iterable[str]) -> list[str]:
    return [way for way in conditioning if way.startswith("adaln")]


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in flatten(abstract_params(config))}


def _changes(config: Config, other: Config) -> list[str]:
    """Returns a line on what is made anew and what is not read, none where that is nothing; another on the labels."""
    name, training = f"config.training.init_from={config.training.init_from!r}", config.training
    ours, theirs = _shapes(config), _shapes(other)
    widened = _widened(config, other)
    new = [path for path in ours if ours[path] != theirs.get(path) and path != widened]
    left = [path for path in theirs if path not in ours]
    if len(new) == len(ours):
        raise ValueError(f"{name} has no array that this config's network has; change the config or the workdir")
    parts = []
    if new:
        decay = training.ema_decay
        share = 0.0 if decay is None else decay**training.num_train_steps
        anew = f"made anew, at random: {_groups(new)}"
        if config.data.num_classes != other.data.num_classes:
            anew += f" (classes: {other.data.num_classes} there and {config.data.num_classes} here)"
        if share > MAX_INITIAL_SHARE:
            anew += f", of which the average of {decay=} will still be {share:.0%} after the last step: lower it"
        parts.append(anew)
    if widened:
        fate = "begin at zero" if _spatial_channels(config) > _spatial_channels(other) else "are not read"
        parts.append(f"the spatial condition's channels of {widened} {fate}")
    if left:
        parts.append(f"not read: {_groups(left)}")
    if config.autoencoder and config.autoencoder.discriminator and other.autoencoder.discriminator:
        parts.append("its discriminator is not read: a new one is trained")
    lines = [f"starting with the weights of {training.init_from}; {'; '.join(parts)}"] if parts else []
    reads_labels = config.stage == "classifier" or "label" in _conditions(config) & _conditions(other)
    here, there = (os.path.basename(os.path.normpath(each.data.name)) for each in (config, other))
    if reads_labels and config.data.num_classes == other.data.num_classes and here != there:
        lines.append(f"the labels of {here} begin as those of {there}: class 0 as class 0, and so on")
    return lines


def _conditions(config: Config) -> set[str]:
    return set(config.condition_dropout) if config.stage == "diffusion" else set()


def _widened(config: Config, other: Config) -> str | None:
    """Returns the kernel that reads more or fewer channels of a spatial condition beside those of x_t; None if none."""
    if config.stage != "diffusion" or config.input_shape[-1] != other.input_shape[-1]:
        return None
    if _spatial_channels(config) == _spatial_channels(other):
        return None
    if config.dit and other.dit:
        sizes = {(each.dit.patch_size, each.dit.width) for each in (config, other)}
        return "x_embedder/kernel" if len(sizes) == 1 else None
    if config.unet and other.unet:
        return "conv_in/kernel" if config.unet.base_channels == other.unet.base_channels else None
    return None


def _spatial_channels(config: Config) -> int:
    return config.spatial_shape[-1] if config.spatial else 0


def _listed(items: list[str]) -> str:
    return "; ".join(items[:MAX_SHOWN]) + (f"; and {len(items) - MAX_SHOWN} more" if len(items) > MAX_SHOWN else "")


def _groups(paths: Iterable[str]) -> str:
    """Returns what parameters are called together, such as "y_embedder, blocks_*/cross_attn"."""
    names = {re.sub(r"_\d+", "_*", path) for path in paths}
    groups = sorted({"/".join(name.split("/")[: 2 if "_*" in name.split("/")[0] else 1]) for name in names})
    return ", ".join(groups[:MAX_SHOWN]) + (f" and {len(groups) - MAX_SHOWN} more" if len(groups) > MAX_SHOWN else "")


def starting_params(config: Config, mesh: Mesh, abstract: Params) -> Params:
    """Returns the parameters, placed as `abstract`, that a run of `config.training.init_from` starts with."""
    source = config.training.init_from

    def read(step: int) -> Params:
        other = Checkpoints(source).restore_config(step)
        shapes = abstract_params(other)
        if _shapes(other) == _shapes(config):
            return restore_eval_params(source, step, abstract)
        shardings = tree_shardings(shapes, mesh, config.mesh.rules)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        theirs = dict(flatten(restore_eval_params(source, step, shapes)))
        return _merged(config, abstract, theirs, _widened(config, other))

    return read_newest_good(source, read)[1]


def _merged(config: Config, abstract: Params, theirs: dict[str, Array], widened: str | None) -> Params:
    """Returns the other run's arrays where they fit, and elsewhere new ones."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def merged(key: Array, theirs: dict[str, Array]) -> Params:
        def chosen(path: tuple, new: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            old = theirs.get(name)
            if name == widened:
                return _with_channels(config, old, new.shape)
            return old if old is not None and old.shape == new.shape else new

        return jax.tree_util.tree_map_with_path(chosen, init_params(config, key))

    return jax.jit(merged, out_shardings=shardings)(jax.random.key(config.seed), theirs)


def _with_channels(config: Config, kernel: Array, shape: tuple[int, ...]) -> Array:
    """Returns a kernel that reads x_t, [..., positions * inputs, D], for other inputs: more of them begin at zero.

    The channels of x_t are the first of each position: of a DiT's patch; a convolution has its pixels as axes.
    """
    positions, channels = config.dit.patch_size**2 if config.dit else 1, config.input_shape[-1]
    kernel = kernel.reshape(*kernel.shape[:-2], positions, -1, kernel.shape[-1])[..., :channels, :]
    more = [(0, 0)] * (kernel.ndim - 2) + [(0, shape[-2] // positions - channels), (0, 0)]
    return jnp.pad(kernel, more).reshape(shape)
