"""A network over a large image in overlapping tiles, one after another, blended: memory as of one tile.

Tiles are squares on the latent's grid. Neighbours overlap by a quarter of a tile or more; in an overlap each weighs
by a linear ramp that falls to its edge, and the weights of all tiles that cover a place sum to one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import MIN_TILE
from dit_jax.types import Array


def apply_by_tiles(function: Callable[[Array], Array], x: Array, tile: int, in_factor: int, out_factor: int) -> Array:
    """Returns `function(x)` put together from tiles, float32; x itself is passed where it is no larger than a tile.

    Equal to the whole where `function` looks at single places. What looks around (convolutions) differs near a tile's
    edges, where its weight is small; what looks everywhere (GroupNorm's statistics, attention) sees the tile alone.

    Args:
      function: [B, in_factor * h, in_factor * w, C] to [B, out_factor * h, out_factor * w, D] for h, w up to `tile`.
      x: [B, in_factor * H, in_factor * W, C].
      tile: the side of a tile, where H and W are the sides of the whole.

    Raises:
      ValueError: where the tile is too small, or in_factor does not divide the sides of x.
    """
    if tile < MIN_TILE:
        raise ValueError(f"{tile=} must be {MIN_TILE} latents a side or more, or None for whole")
    height, width = x.shape[1:3]
    if max(height, width) <= tile * in_factor:
        return function(x)
    if height % in_factor or width % in_factor:
        raise ValueError(f"{height} x {width} must be divisible by {in_factor} to go by tiles; crop it, or set no tile")
    sides = [side // in_factor for side in (height, width)]
    rows, columns = (tile_starts(side, tile) for side in sides)
    tile_height, tile_width = (min(side, tile) for side in sides)
    row_weights, column_weights = (
        blending_weights(starts, side, tile, out_factor) for starts, side in zip((rows, columns), sides, strict=True)
    )
    tile_shape = (len(x), tile_height * in_factor, tile_width * in_factor, x.shape[-1])
    out_shape = jax.eval_shape(function, jax.ShapeDtypeStruct(tile_shape, x.dtype)).shape

    def add_tile(total: Array, index: Array) -> tuple[Array, None]:
        row, column = index
        start = jnp.asarray(rows)[row], jnp.asarray(columns)[column]
        out = function(jax.lax.dynamic_slice(x, (0, *(in_factor * at for at in start), 0), tile_shape))
        weights = jnp.asarray(row_weights)[row][:, None, None] * jnp.asarray(column_weights)[column][:, None]
        corner = (0, *(out_factor * at for at in start), 0)
        so_far = jax.lax.dynamic_slice(total, corner, out_shape)
        return jax.lax.dynamic_update_slice(total, so_far + weights * out.astype(jnp.float32), corner), None

    indices = np.indices((len(rows), len(columns)), dtype=np.int32).reshape(2, -1).T
    zeros = jnp.zeros((len(x), *(out_factor * side for side in sides), out_shape[-1]), jnp.float32)
    return jax.lax.scan(add_tile, zeros, indices)[0]


def tile_starts(size: int, tile: int) -> np.ndarray:
    """Returns where tiles start [n] int32, evenly from 0 to size - tile, as few as overlap by a quarter of a tile."""
    stride = tile - tile // 4
    count = 1 + max(0, -(-(size - tile) // stride))
    return np.linspace(0, max(0, size - tile), count).round().astype(np.int32)


def blending_weights(starts: np.ndarray, size: int, tile: int, factor: int) -> np.ndarray:
    """Returns the tiles' weights along one side [n, min(tile, size) * factor] float32, one in sum at each place."""
    length, ramp = min(tile, size) * factor, tile // 4 * factor
    distance = 1.0 + np.arange(length)  # to what is just outside the tile
    weight = np.minimum(1.0, np.minimum(distance, distance[::-1]) / (ramp + 1))
    places = starts[:, None] * factor + np.arange(length)
    total = np.bincount(places.reshape(-1), np.tile(weight, len(starts)))
    return (weight / total[places]).astype(np.float32)
