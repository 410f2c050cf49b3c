"""Random but fixed weights for networks whose features are compared."""

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def random_params(abstract, seed=0):
    """Returns parameters of a tree of shapes, with which activations neither vanish nor grow with depth."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, leaf in sorted(flatten_dict(abstract).items()):
        values = rng.standard_normal(leaf.shape, np.float32)
        if path[-1] == "kernel":
            values *= np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32)
        elif path[-1] in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        else:
            values *= np.float32(0.1)
        params[path] = values
    return unflatten_dict(params)
