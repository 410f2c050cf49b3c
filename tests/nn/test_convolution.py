"""Convolutions of rows that are split over devices, beside axes that split the batch and channels or hold copies."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import MeshConfig
from dit_jax.nn.constraints import HIDDEN_IMAGES, IMAGES, constrain
from dit_jax.nn.convolution import convolve
from dit_jax.parallel.mesh import make_mesh, traced_on

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Of a residual block: its first kernel is split by outputs, its second by inputs. Small kernels are not split.
FIRST = (IMAGES, HIDDEN_IMAGES, (None, None, None, "tensor"))
SECOND = (HIDDEN_IMAGES, IMAGES, (None, None, "tensor", None))
SMALL = (IMAGES, IMAGES, ())


def operands(rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [4, rows, 6, 8] and a kernel [size, size, 8, 8]."""
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=s).astype(np.float32) for s in ((4, rows, 6, 8), (size, size, 8, 8)))


def check(convolution, x, kernel, strides, padding, *layouts):
    """Asserts that a convolution on a mesh and both its gradients are those of one device."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2, sequence=2))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)

    def split(layout, x, kernel):
        into, out_of, kernel_axes = layout
        kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec(*kernel_axes)))
        y = convolution(constrain(x, into), kernel, strides, padding, dimension_numbers=DIMENSIONS)
        return constrain(y, out_of)

    def with_gradients(apply, x, kernel, cotangent):
        y, pull_back = jax.vjp(apply, x, kernel)
        return y, *pull_back(cotangent)

    def on_mesh(*args):
        return [with_gradients(functools.partial(split, layout), *args) for layout in layouts]

    cotangent = np.random.default_rng(1).normal(size=jax.eval_shape(plain, x, kernel).shape).astype(np.float32)
    expected = jax.jit(lambda *args: with_gradients(plain, *args))(x, kernel, cotangent)
    for results in jax.jit(traced_on(mesh, on_mesh))(x, kernel, cotangent):
        for found, other in zip(results, expected, strict=True):
            np.testing.assert_allclose(found, other, atol=2e-6 * abs(other).max())  # sums in another order


@pytest.mark.parametrize(
    ("rows", "size", "strides", "padding"),
    [
        (8, 3, (1, 1), "SAME"),
        (8, 3, (2, 2), ((0, 1), (0, 1))),  # the autoencoder's downsampling
        (8, 4, (2, 2), ((1, 1), (1, 1))),  # the discriminator's
        (7, 3, (1, 1), "SAME"),  # rows that two devices cannot share, here of inputs, there of outputs
        (8, 4, (1, 1), ((1, 1), (1, 1))),
    ],
)
def test_a_convolution_of_split_rows_and_its_gradients_are_those_of_one_device(rows, size, strides, padding):
    check(convolve, *operands(rows, size), strides, padding, FIRST, SECOND, SMALL)


@pytest.mark.xfail(reason="XLA sums the kernel's gradient over the copies along `tensor`, too", raises=AssertionError)
def test_xla_splits_rows_without_help():
    """Why there is `convolve`: where this passes, XLA no longer needs it."""
    check(jax.lax.conv_general_dilated, *operands(8, 3), (1, 1), "SAME", SMALL)


def test_split_rows_exchange_their_edges_alone():
    x, kernel = operands(8, 3)
    mesh = make_mesh(MeshConfig(data=1, sequence=4), jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    function = lambda x: convolve(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)  # noqa: E731
    program = jax.jit(traced_on(mesh, function), in_shardings=rows, out_shardings=rows).lower(x).compile().as_text()
    exchanges = re.findall(r"= (\S+?)\{\S* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", program)
    assert exchanges == 2 * [("f32[4,1,6,8]", "collective-permute")]
