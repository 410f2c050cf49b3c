"""Array aliases and the letters of shapes.

    B batch          H, W, C height, width, channels (images and latents are channels-last)
    T tokens         D width of the transformer
    N heads or number of images, as the text says
    t diffusion timestep, int32 in [0, num_timesteps)

Images are float32 in [-1, 1] inside the program and uint8 at its edges; latents have unit variance.
"""

from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
PRNGKey = jax.Array
Params = Any  # nested dict of Arrays
Batch = dict[str, Array]
Conditions = dict[str, Any]  # what images are drawn for, by name, [B, ...] each (`models.conditioners`)
# (x_t [B, H, W, C], t [B] int32, conditions) -> [B, H, W, 2C]: the mean's prediction (epsilon, x_0 or v) and the
# variance's interpolation; [B, H, W, C] where the variance is fixed
ModelFn = Callable[[Array, Array, Conditions], Array]
