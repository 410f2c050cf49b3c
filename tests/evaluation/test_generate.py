"""Drawing: an image is a function of (seed, its number, its label), whatever is drawn beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import LatentsConfig, MeshConfig
from dit_jax.evaluation.generate import balanced_labels, count_chunks, in_chunks, make_generator
from dit_jax.models.autoencoder import Codec
from dit_jax.models.build import build_autoencoder, init_params
from dit_jax.parallel.mesh import batch_sharding, make_mesh
from dit_jax.parallel.rules import tree_shardings
from tests.tiny import autoencoder_config, dit_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A config, and weights that are not those of initialisation: these would predict zero."""
    config = dit_config(tmp_path_factory.mktemp("unused"))
    params = init_params(config, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = treedef.unflatten([x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    params["y_embedder"]["embedding_table"] *= 30  # else guidance saturates before the label shows
    return config, params


def draw(model, labels, seed=0, **sampling):
    config, params = model
    settings = dataclasses.replace(config.sampling, **sampling)
    return make_generator(config, settings, None, make_mesh(config.mesh))(params, np.array(labels), seed)


@pytest.mark.parametrize(
    "sampling", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ancestral"}], ids=str
)
def test_an_image_does_not_depend_on_how_many_are_drawn(model, sampling):
    labels = balanced_labels(19, 3)
    many = draw(model, labels, **sampling)
    np.testing.assert_array_equal(draw(model, labels[:5], **sampling), many[:5])
    # Another batch size is another compiled program: sums in another order may move a value over a byte's edge.
    other = draw(model, labels, **sampling, batch_size=3)
    assert np.abs(other.astype(int) - many).max() <= 1


@pytest.mark.parametrize("decoded", [False, True])
def test_the_bits_of_an_image_do_not_depend_on_the_number_of_devices(latent_model, decoded):
    """Latents, floats whose last bits show, and the images decoded of them."""
    config, params, codec = latent_model
    params = jax.tree.map(lambda x: x + 0.02, params)  # else it predicts zero
    drawn = [
        make_generator(config, config.sampling, codec if decoded else None, make_mesh(MeshConfig(), jax.devices()[:n]))(
            params, balanced_labels(21, 3), 0
        )
        for n in (1, 2, 8)
    ]
    assert drawn[0].std() > 1
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


def test_seed_label_and_index_each_change_the_image(model):
    images = draw(model, [0, 0, 1])
    assert (images[0] != images[1]).any()
    assert (draw(model, [1, 0, 1])[0] != images[0]).any()
    assert (draw(model, [0, 0, 1], seed=1) != images).any()


def test_guidance_of_scale_1_is_the_conditional_model(model):
    plain = draw(model, [0, 1, 2], cfg_scale=1.0)
    guided = draw(model, [0, 1, 2], cfg_scale=1.0 + 1e-6)
    assert np.abs(plain.astype(int) - guided).max() <= 1


def test_unknown_labels_are_an_error(model):
    with pytest.raises(ValueError, match="labels must be from 0 to 2"):
        draw(model, [4])


def test_weights_are_arguments_not_constants_of_the_compiled_sampler(model):
    config, params = model
    generate = make_generator(config, config.sampling, None, make_mesh(config.mesh))
    first = generate(params, np.array([0]), 0)
    other = generate(jax.tree.map(lambda x: x * jnp.float32(1.5), params), np.array([0]), 0)
    assert (first != other).any()


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """A config of latents, its random weights, and an autoencoder of 8 x 8 latents."""
    folder = tmp_path_factory.mktemp("unused")
    config = dataclasses.replace(dit_config(folder), latents=LatentsConfig(shape=(8, 8, 2), scale=0.5))
    params = init_params(config, jax.random.key(0))
    autoencoder = autoencoder_config(folder)
    module = build_autoencoder(autoencoder.autoencoder, autoencoder.data.channels)
    return config, params, Codec(init_params(autoencoder, jax.random.key(1)), module, 0.5)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=4, fsdp=2)], ids=str)
def test_images_decoded_in_chunks_are_those_decoded_at_once(latent_model, mesh):
    config, params, codec = latent_model

    def images(**sampling):
        settings = dataclasses.replace(config.sampling, batch_size=6, **sampling)
        return make_generator(config, settings, codec, make_mesh(mesh))(params, balanced_labels(40, 3), 0)

    at_once = images(decode_batch_size=6)
    assert at_once.shape == (40, 16, 16, 3) and at_once.std() > 1
    for decode_batch_size in (2, 1):
        # Another compiled program: sums in another order may move a value over a byte's edge.
        chunked = images(decode_batch_size=decode_batch_size)
        assert np.abs(chunked.astype(int) - at_once).max() <= 1


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, sequence=4), MeshConfig(data=1, tensor=2, fsdp=4)]
)
def test_images_do_not_depend_on_the_mesh_that_splits_weights_and_activations(latent_model, mesh):
    config, _, codec = latent_model
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, width=128, num_heads=4))
    params = jax.tree.map(lambda x: x + 0.02, init_params(config, jax.random.key(0)))  # else it predicts zero

    def images(mesh):
        placed = jax.device_put(params, tree_shardings(params, mesh))
        return make_generator(config, config.sampling, codec, mesh)(placed, balanced_labels(8, 3), 0)

    one = images(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert one.std() > 1
    # Sums in another order may move a value over a byte's edge.
    assert np.abs(images(make_mesh(mesh)).astype(int) - one).max() <= 1


def test_tiles_are_used_in_sampling(latent_model):
    config, params, codec = latent_model
    config = dataclasses.replace(config, latents=LatentsConfig(shape=(8, 16, 2), scale=0.5))
    images = [
        make_generator(config, dataclasses.replace(config.sampling, decode_tile=tile), codec, make_mesh(config.mesh))(
            params, [0], 0
        )
        for tile in (None, 8)
    ]
    assert images[0].shape == images[1].shape == (1, 16, 32, 3)
    assert 0 < np.abs(images[0].astype(int) - images[1]).mean() < 20


@pytest.mark.parametrize(("num_rows", "max_rows", "chunks"), [(8, 8, 1), (8, 2, 4), (8, 3, 4), (7, 3, 7), (6, 4, 2)])
def test_chunks_are_the_fewest_that_divide(num_rows, max_rows, chunks):
    assert count_chunks(num_rows, max_rows) == chunks


def test_chunks_keep_the_order_and_split_over_the_devices_without_talk(latent_model):
    *_, codec = latent_model
    sharding = batch_sharding(make_mesh(MeshConfig()))
    x = np.arange(48, dtype=np.float32).reshape(48, 1)
    np.testing.assert_array_equal(in_chunks(lambda x: 2 * x, x, 6), 2 * x)

    def compiled(num_chunks):
        latents = jax.ShapeDtypeStruct((48, 8, 8, 2), jnp.float32, sharding=sharding)
        decode = jax.jit(lambda codec, z: in_chunks(codec.decode, z, num_chunks))
        return decode.lower(codec, latents).compile()

    in_six, at_once = compiled(6), compiled(1)
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in in_six.as_text()
    memory, whole = (each.memory_analysis().temp_size_in_bytes for each in (in_six, at_once))
    assert memory < whole / 3
