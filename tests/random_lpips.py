"""LPIPS with random weights, and the same in PyTorch, written from the paper's equation 1 and VGG's table 1."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.perceptual.lpips import abstract_lpips

VGG16 = "64 64 | 128 128 | 256 256 256 | 512 512 512 | 512 512 512"


@functools.lru_cache
def random_lpips():
    """Returns parameters whose features neither vanish nor grow with depth."""
    rng = np.random.default_rng(0)
    params = {}
    for path, leaf in flatten_dict(abstract_lpips()).items():
        values = rng.standard_normal(leaf.shape, np.float32)
        if path[0] != "vgg16":
            values = np.abs(values)  # the weights of channels are not negative
        elif path[-1] == "kernel":
            values *= np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32)
        else:
            values *= np.float32(0.1)
        params[path] = values
    return unflatten_dict(params)


def torch_lpips(params, images, others):
    """Returns the distances in PyTorch, [B], of tensors [B, H, W, 1 or 3] in float32 or float64."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    as_torch = lambda array: torch.from_numpy(np.array(array)).to(images.dtype)  # noqa: E731
    x = torch.cat([images, others])
    x = ((x.expand(*x.shape[:3], 3) - shift.to(x)) / scale.to(x)).permute(0, 3, 1, 2)
    total = 0
    for stage, widths in enumerate(VGG16.split("|")):
        x = F.max_pool2d(x, 2) if stage else x
        for i in range(len(widths.split())):
            layer = params["vgg16"][f"conv{stage + 1}_{i + 1}"]
            x = F.relu(F.conv2d(x, as_torch(layer["kernel"]).permute(3, 2, 0, 1), as_torch(layer["bias"]), padding=1))
        unit = x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)
        one, other = unit.chunk(2)
        weights = as_torch(params[f"lin{stage}"]["kernel"]).permute(3, 2, 0, 1)
        total = total + F.conv2d((one - other) ** 2, weights).mean(dim=(1, 2, 3))
    return total
