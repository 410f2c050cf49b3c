"""How fast programs run on the devices that are there: rates, model FLOPs utilization, compile time and memory.

A measurement starts after the compilation and a few calls, lets the host run ahead of the devices as in real use, and
ends when the devices have finished everything. Times are wall-clock seconds.

Model FLOPs utilization (MFU; PaLM, arXiv:2204.02311, appendix B): what the network's own multiplications need, 6 x the
multiply-adds of a forward pass for each trained image, over what the chips could do at their vendors' peak.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config
from dit_jax.models.cost import describe_cost
from dit_jax.parallel.chips import CHIPS
from dit_jax.types import Array, Params

CACHE_HIT = "/jax/compilation_cache/cache_hits"  # JAX's event: a program was read, not compiled
MATMUL_ROWS, MATMUL_REPEATS = 8192, 10


def measure(
    call: Callable[[Any], Array],
    batches: Iterator[Any],
    num_calls: int,
    num_before: int = 2,
    profile: str | None = None,
) -> dict:
    """Returns what calls on a row of batches take, the first of which compiles.

    Args:
      call: batch -> arrays, some of which stand for all of the call's work.
      batches: `num_before + num_calls` of them or more.
      num_calls: that are timed; num_before: that are not, the first being the one that compiles.
      profile: a folder for a trace of three more calls, which take three more batches.

    Returns:
      `calls` and the `seconds` of all of them, `data_wait`: the share of these in which the devices waited for a batch,
      `compile_seconds`: to trace and compile or read the program, and `compiled_from_cache`: whether it was read.
    """
    hits: list[str] = []
    listener = lambda event, **_: hits.append(event) if event == CACHE_HIT else None  # noqa: E731
    batch = next(batches)
    jax.monitoring.register_event_listener(listener)
    start = time.perf_counter()
    result = call(batch)  # returns when the program is compiled, and before it has run
    compile_seconds, from_cache = time.perf_counter() - start, bool(hits)
    jax.monitoring.unregister_event_listener(listener)
    for _ in range(num_before - 1):
        result = call(next(batches))
    jax.block_until_ready(result)
    start, waited = time.perf_counter(), 0.0
    for _ in range(num_calls):
        asked = time.perf_counter()
        batch = next(batches)
        if all(x.is_ready() for x in jax.tree.leaves(result)):  # else the devices still work on earlier batches
            waited += time.perf_counter() - asked
        result = call(batch)
    jax.block_until_ready(result)
    seconds = time.perf_counter() - start
    if profile is not None:
        with jax.profiler.trace(profile):
            jax.block_until_ready([call(next(batches)) for _ in range(3)])
    return {
        "calls": num_calls,
        "seconds": seconds,
        "data_wait": waited / seconds,
        "compile_seconds": compile_seconds,
        "compiled_from_cache": from_cache,
    }


def rates(figures: dict, batch_size: int, num_chips: int) -> dict:
    """Returns the figures of `measure` with images a second, of all chips and of one, and batches a second."""
    batches_per_second = figures["calls"] / figures["seconds"]
    return figures | {
        "batch_size": batch_size,
        "batches_per_second": batches_per_second,
        "images_per_second": batches_per_second * batch_size,
        "images_per_second_per_chip": batches_per_second * batch_size / num_chips,
    }


def utilization(config: Config, images_per_second: float, devices: list[jax.Device]) -> dict:
    """Returns the model FLOPs a second of training, and the share that they are of the most that the devices can do.

    That is the vendor's peak of the chips (`mfu`) or, where the table of chips has none, as on CPU, the rate of a
    matmul in float32 that is measured now (`share_of_matmul`).
    """
    flops = 6 * describe_cost(config)["macs"] * images_per_second
    figures = {"model_flops_per_second": flops, "peak_flops": None, "mfu": None}
    if devices[0].device_kind in CHIPS:
        peak = CHIPS[devices[0].device_kind].per_device().peak_flops * len(devices)
        return figures | {"peak_flops": peak, "mfu": flops / peak}
    matmul = matmul_flops(config)
    return figures | {"matmul_flops_per_second": matmul, "share_of_matmul": flops / matmul}


def num_chips(devices: list[jax.Device]) -> int:
    """Returns the chips that the devices are; a chip may be two devices."""
    chip = CHIPS.get(devices[0].device_kind)
    return max(1, len(devices) // (chip.devices if chip else 1))


def matmul_flops(config: Config) -> float:
    """Returns the FLOPs a second of the best of several matmuls in float32, of a transformer's MLP's shape."""
    width = config.dit.width if config.dit else 512
    hidden = int(width * config.dit.mlp_ratio) if config.dit else 4 * width
    x, kernel = (jnp.ones(shape, jnp.float32) for shape in ((MATMUL_ROWS, width), (width, hidden)))
    matmul, best = jax.jit(jnp.dot), np.inf
    jax.block_until_ready(matmul(x, kernel))
    for _ in range(MATMUL_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(matmul(x, kernel))
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_ROWS * width * hidden / best


def peak_memory() -> tuple[int, str]:
    """Returns the most bytes in use so far, and whose: the fullest device's, or the process's where none counts."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if all(peak is not None for peak in peaks):
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def fill(abstract: Params) -> Params:
    """Returns arrays of the shapes and shardings of a tree: small random numbers, for what only speed is asked of."""

    def values(key: Array, x: jax.ShapeDtypeStruct) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return 0.02 * jax.random.normal(key, x.shape, x.dtype)

    leaves, structure = jax.tree.flatten(abstract)
    make = lambda key: [values(k, x) for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)]  # noqa: E731
    if not leaves:
        return abstract
    return structure.unflatten(jax.jit(make, out_shardings=[x.sharding for x in leaves])(jax.random.key(0)))


def synthetic_images(config: Config, num_images: int) -> list[dict]:
    """Returns examples as a data set has them: noise uint8 [S, S, C], and labels."""
    rng, data = np.random.default_rng(0), config.data
    shape = (data.image_size, data.image_size, data.channels)
    images = rng.integers(0, 256, (num_images, *shape), np.uint8)
    labels = rng.integers(0, data.num_classes, num_images)
    fields = synthetic_fields(config)
    return [{"image": image, "label": int(label)} | fields for image, label in zip(images, labels, strict=True)]


def synthetic_fields(config: Config) -> dict:
    """Returns the fields of an example that its conditions are made of: a caption and its states, boxes, classes."""
    text, layout, size, fields = config.conditions and config.conditions.text, config.layout, config.data.image_size, {}
    if text:
        states = np.zeros((text.max_length, text.frozen_width), np.float32)
        fields |= {text.caption_field: text.max_length * "word ", "text": {"states": states, "pooled": states[0]}}
    if layout:
        fields[layout.layout_field] = layout.max_objects * f"{layout.classes[0]} 0 0 1 1;"
    if config.spatial and config.spatial.kind == "semantic":
        fields["map"] = np.zeros((size, size), np.uint8)
    return fields


def synthetic_latents(config: Config, num_images: int) -> list[dict]:
    """Returns examples as a latent cache has them: moments float32 [F, h, w, 2c], and labels."""
    rng, (height, width, channels) = np.random.default_rng(0), config.latents.shape
    shape = (1 + config.data.horizontal_flip, height, width, 2 * channels)
    moments = 0.5 * rng.standard_normal((num_images, *shape), np.float32)
    labels = rng.integers(0, config.data.num_classes, num_images)
    fields = synthetic_fields(config)
    return [{"moments": example, "label": int(label)} | fields for example, label in zip(moments, labels, strict=True)]
