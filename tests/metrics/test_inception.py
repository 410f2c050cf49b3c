"""Features of the Inception-v3 of 2015-12-05 equal torch-fidelity's, within 1e-4, with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_networks import random_params

from dit_jax.evaluation.feature_networks import import_network, load_network
from dit_jax.metrics.feature_network import resize_bilinear
from dit_jax.metrics.inception import abstract_inception
from dit_jax.pretrained.inception import port_entries
from dit_jax.pretrained.name_map import to_tensors

ATOL = 1e-4  # both are float32, through 94 convolutions


@functools.lru_cache
def random_inception():
    return random_params(abstract_inception())


def port_state():
    """Returns the PyTorch port's state dict, with the counters that newer files have."""
    tensors = to_tensors(list(port_entries(abstract_inception())), random_inception())
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    assert len(norms) == 94
    return state | {f"{name}num_batches_tracked": torch.tensor(1000) for name in norms}


@pytest.fixture(scope="module")
def port_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("port") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(port_state(), path)
    return path


@pytest.fixture(scope="module")
def converted(port_file):
    output = port_file.with_name("inception.safetensors")
    import_network("inception", port_file, output)
    return load_network(output)


@pytest.fixture(scope="module")
def theirs(port_file, fidelity):
    """Returns their network; it loads the state dict strictly, so that the names are all that there are."""
    network = fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(port_file)
    )
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def outputs(images):
        pool, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
        spatial = seen.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)  # as ADM takes it from the graph, channels last
        return {name: x.numpy() for name, x in (("pool", pool), ("logits", logits), ("spatial", spatial))}

    return outputs


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (256, 256), (299, 299), (512, 512)])
def test_features_equal_torch_fidelitys(size, converted, theirs):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    images[1] = np.linspace(0, 255, size[1])[None, :, None]  # no noise
    expected, found = theirs(images), converted.apply(converted.params, jnp.asarray(images))
    for name, shape in (("pool", 2048), ("logits", 1008), ("spatial", 7 * 17 * 17)):
        assert found[name].shape == (2, shape)
        assert 0.5 < expected[name].std() < 50 and np.abs(expected[name][0] - expected[name][1]).mean() > 0.05
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=ATOL, err_msg=name)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (28, 28), (100, 401), (299, 299), (300, 298)])
def test_images_are_resized_as_tensorflow_1_did(size, fidelity):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(channels_first, size=(299, 299), align_corners=False)
    found = resize_bilinear(jnp.asarray(images), 299, 299)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=2e-5)


def test_its_distance_alone_is_called_fid_and_images_must_be_bytes(converted):
    assert (converted.name, converted.distance) == ("inception-2015-12-05", "FID")
    assert sum(leaf.size for leaf in jax.tree.leaves(converted.params)) == 23_885_392
    for images in (jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 32, 32, 1), jnp.uint8), jnp.zeros((32, 32, 3), jnp.uint8)):
        with pytest.raises(ValueError, match=r"images must be uint8 \[B, H, W, 3\] in \[0, 255\], not"):
            converted.apply(converted.params, images)
