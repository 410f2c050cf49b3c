"""Precision and recall against a float64 implementation, and torch-fidelity's on float64 arrays: to the image."""

import jax
import numpy as np
import pytest
import torch

from dit_jax.metrics import precision_recall as module
from dit_jax.metrics.precision_recall import precision_recall
from tests.speed import sample_metrics


def exact(samples, references, k=3):
    """Returns the definition's shares, all distances in float64."""
    samples, references = samples.astype(np.float64), references.astype(np.float64)
    distances = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(axis=2)  # noqa: E731
    radii = lambda a: np.sort(distances(a, a), axis=1)[:, k]  # noqa: E731
    across = distances(samples, references)
    return (across <= radii(references)).any(1).mean(), (across <= radii(samples)[:, None]).any(0).mean()


def gaussians(num_samples, num_references, dimension):
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((num_samples, dimension))
    references = 1.1 * rng.standard_normal((num_references, dimension)) + 0.1
    return samples.astype(np.float32), references.astype(np.float32)


def lattice(num_samples, num_references, dimension):
    """Returns points of which most occur many times, so that every distance is a tie."""
    rng = np.random.default_rng(0)
    return tuple(
        rng.integers(0, high, (n, dimension)).astype(np.float32) for n, high in ((num_samples, 2), (num_references, 3))
    )


def clusters(num_samples, num_references, dimension):
    """Returns points in clusters so far apart that float32 confuses all within one."""
    shape = num_samples, num_references, dimension
    return tuple(1e5 * points + noise for points, noise in zip(lattice(*shape), gaussians(*shape), strict=True))


def copies(num_samples, num_references, dimension):
    """Returns samples that are, half of them, references."""
    samples, references = gaussians(num_samples, num_references, dimension)
    samples[: num_samples // 2] = references[: num_samples // 2]
    return samples, references


@pytest.mark.parametrize("make", [gaussians, lattice, clusters, copies])
@pytest.mark.parametrize("shape", [(600, 450, 5), (300, 500, 64), (4, 5, 3)])
def test_the_shares_are_those_of_float64(make, shape):
    samples, references = make(*shape)
    assert precision_recall(samples, references) == exact(samples, references)


@pytest.mark.parametrize("k", [1, 5])
def test_the_number_of_neighbours_counts(k):
    samples, references = gaussians(500, 400, 8)
    assert precision_recall(samples, references, k) == exact(samples, references, k)


def test_the_shares_equal_torch_fidelitys(fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, references = gaussians(600, 450, 5)
    arrays = (torch.from_numpy(array.astype(np.float64)) for array in (samples, references))
    expected = prc_features_to_metric(*arrays, verbose=False)
    found = precision_recall(samples, references)
    assert 0.3 < found.precision < 0.99 and 0.3 < found.recall < 0.99
    np.testing.assert_allclose(found.precision, expected[fidelity.KEY_METRIC_PRECISION], rtol=1e-6)
    np.testing.assert_allclose(found.recall, expected[fidelity.KEY_METRIC_RECALL], rtol=1e-6)


@pytest.mark.parametrize("blocks", [(64, 50), (599, 1000), (7, 449)])
def test_blocks_and_devices_do_not_matter(blocks, monkeypatch):
    samples, references = gaussians(600, 450, 5)
    expected = precision_recall(samples, references)
    monkeypatch.setattr(module, "BLOCK_QUERIES", blocks[0])
    monkeypatch.setattr(module, "BLOCK_REFERENCES", blocks[1])
    assert precision_recall(samples, references) == expected
    monkeypatch.setattr(module.jax, "local_devices", lambda: jax.devices()[:3])
    assert precision_recall(samples, references) == expected


def test_a_block_takes_the_memory_that_is_stated():
    rows, columns, dimension = module.BLOCK_QUERIES, module.BLOCK_REFERENCES, 2048
    array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    best = array(rows, module.NUM_CANDIDATES), array(rows, module.NUM_CANDIDATES, dtype="int32")
    references = array(columns, dimension), array(columns), array(dtype="int32")
    memory = module._merge.lower(array(rows, dimension), references, best).compile().memory_analysis()
    arguments, used = memory.argument_size_in_bytes, memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert arguments + used + 4 * columns * dimension < module.device_bytes(dimension)
    assert module.device_bytes(dimension) == 192 * 2**20


def test_bad_features_are_named():
    samples, references = gaussians(10, 10, 4)
    with pytest.raises(ValueError, match="references' features must have 4 dimensions, not 3"):
        precision_recall(samples, references[:, :3])
    with pytest.raises(ValueError, match="num_neighbors=3 must be from 1 to 15, and less than 3 images"):
        precision_recall(samples[:3], references)
    samples[4] = np.nan
    with pytest.raises(ValueError, match="samples' features must be finite, but those of image 4"):
        precision_recall(samples, references)


def test_the_command_that_measures_time_and_memory_runs(capsys):
    sample_metrics.main(300, 32)
    printed = capsys.readouterr().out
    assert printed.startswith("300 features of 32") and "PrecisionRecall(" in printed and "residual" in printed
