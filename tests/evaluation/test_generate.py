"""Drawing: an image is a function of (seed, its number, its label), whatever is drawn beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.evaluation.generate import balanced_labels, make_generator
from dit_jax.models.build import init_params
from dit_jax.parallel.mesh import make_mesh
from tests.tiny import dit_config


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
    other = draw(model, labels, **sampling, batch_size=16)
    assert np.abs(other.astype(int) - many).max() <= 1


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
