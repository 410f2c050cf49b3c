"""The scale and shift of a denoiser's latents, as workdirs, caches and the files of other programs tell them.

A denoiser sees (z - shift) * scale of an autoencoder's latents z. Diffusers writes both beside the autoencoder
(`scaling_factor`, `shift_factor`), LDM the scale beside the U-Net (`scale_factor`); of our own runs the denoiser's
config has them, and of a converted autoencoder its own.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dit_jax.checkpoint import CONFIG_FILE, find_checkpoint, read_config
from dit_jax.config import LatentsConfig
from dit_jax.data.latent_cache import MANIFEST_NAME, read_manifest
from dit_jax.evaluation.loaded import AUTOENCODER_DIR
from dit_jax.files import is_number

DIFFUSERS_DEFAULT = 0.18215  # what diffusers takes where a folder says nothing: Stable Diffusion's f8 (LDM code)
DENOISER_KEY = "_latents"  # of a denoiser's config.json: diffusers passes over what begins with "_"


class LatentScale(NamedTuple):
    """What latents are made of unit variance with."""

    scale: float
    shift: float = 0.0

    def __str__(self) -> str:
        return f"scale {self.scale}" + (f", shift {self.shift}" if self.shift else "")

    def is_close(self, other: "LatentScale") -> bool:
        """Returns whether two are the same but for the last digits that somebody wrote."""
        return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) for a, b in zip(self, other, strict=True))


def scale_of_workdir(workdir: str | os.PathLike) -> LatentScale | None:
    """Returns what an autoencoder's workdir tells: that of the run or the cache it is in, or a converted one's own."""
    workdir = pathlib.Path(os.path.abspath(workdir))
    if workdir.name == AUTOENCODER_DIR:
        around = workdir.parent
        config = read_config(around) if (around / CONFIG_FILE).is_file() else None
        if config is not None and config.latents is not None and config.latents.scale is not None:
            return LatentScale(config.latents.scale, config.latents.shift)
        if (around / MANIFEST_NAME).is_file():
            return LatentScale(read_manifest(around).scale)
    own = find_checkpoint(workdir)[1].autoencoder
    return (
        None if own is None or own.latents_scale is None else LatentScale(own.latents_scale, own.latents_shift or 0.0)
    )


def scale_of_diffusers(values: Mapping[str, Any], name: str | os.PathLike) -> LatentScale | None:
    """Returns what a config of diffusers tells, of an autoencoder or of a denoiser that was exported here.

    name: the config's, for errors.
    """
    told = values.get(DENOISER_KEY)
    told = told if isinstance(told, Mapping) else values
    return read_scale(*((told.get(f"{key}_factor"), f"{name}: {key}_factor") for key in ("scaling", "shift")))


def read_scale(scale: tuple[Any, str], shift: tuple[Any, str] = (None, "shift")) -> LatentScale | None:
    """Returns a scale and a shift of (value, its name) each; None where there is no scale.

    Raises:
      ValueError: where one is no such number.
    """
    if scale[0] is None:
        return None
    for (value, name), what, least in ((scale, "a positive", 0.0), (shift, "a finite", -math.inf)):
        number = 0.0 if value is None else value
        if not (is_number(number) and math.isfinite(number) and number > least):
            raise ValueError(f"{name}={str(value)[:100]} must be {what} number: of what the latents are multiplied by")
    return LatentScale(float(scale[0]), float(shift[0] or 0.0))


def diffusers_values(latents: LatentScale) -> dict[str, float]:
    """Returns a scale and shift as diffusers' configs have them."""
    return {"scaling_factor": latents.scale} | ({"shift_factor": latents.shift} if latents.shift else {})


def resolve_scale(
    given: LatentsConfig, told: Sequence[tuple[str, LatentScale]], default: float
) -> tuple[LatentScale, str]:
    """Returns the scale and shift of a converted denoiser's latents, and a note on who says so.

    Args:
      given: of its config, which decides where it has a scale; told: (who, what) by others; default: where nobody does.

    Raises:
      ValueError: where others contradict each other and the config does not decide.
    """
    if given.scale is not None:
        ours = LatentScale(given.scale, given.shift)
        unlike = [f"; {who} has {theirs}" for who, theirs in told if not ours.is_close(theirs)]
        return ours, f"latents: {ours}, as the config has it{''.join(unlike)}"
    if not told:
        ours = LatentScale(default, given.shift)
        return ours, f"latents: {ours}, the released models', since nothing here says another; else give --autoencoder"
    (who, ours), *others = told
    for other, theirs in others:
        if not ours.is_close(theirs):
            raise ValueError(
                f"the latents must have one scale: {who} has {ours}, {other} has {theirs}; give the right autoencoder, "
                "or --config=FILE with --config.latents.scale"
            )
    if given.shift not in (0.0, ours.shift):
        raise ValueError(f"config.latents.shift={given.shift} must be {ours.shift}, which {who} has; or give the scale")
    return ours, f"latents: {ours}, of {who}"
