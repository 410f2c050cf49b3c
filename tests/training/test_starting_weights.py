"""`config.training.init_from`: weights of another run go on with what they were trained for, or are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import Checkpoints
from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.models.build import abstract_params, build_denoiser, init_params
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.rules import tree_shardings
from dit_jax.pretrained.name_map import flatten
from dit_jax.training.starting_weights import check_starting_weights, starting_params
from tests.tiny import adversarial_config, autoencoder_config, dit_config

LATENTS = {"shape": (8, 8, 1), "scale": 0.5, "autoencoder": "a" * 64}
TRANSFORMER = {"width": 16, "depth": 1, "num_heads": 2, "head_dim": 8}
TEXT = {"max_length": 4, "vocab_size": 9, "transformer": TRANSFORMER, "encoder": "b" * 64}
LAYOUT = {"classes": ("cat", "dog"), "max_objects": 2, "transformer": TRANSFORMER}
UNET = {
    "base_channels": 8,
    "channel_multipliers": (1, 1),
    "attention_levels": (),
    "num_res_blocks": 1,
    "num_heads": 2,
    "num_groups": 4,
    "label": "vector",
}


def edited(config, **changes):
    """Returns a config with values at paths such as `diffusion__prediction`."""
    values = config_to_dict(config)
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = values
        for name in sections:
            section[name] = section[name] or {}
            section = section[name]
        section[key] = value
    return config_from_dict(values)


@pytest.fixture
def dit(tmp_path):
    return dit_config(tmp_path / "images", init_from="source")


@pytest.mark.parametrize(
    ("ours", "theirs", "path"),
    [
        ({"scale": 0.4}, {}, "config.latents.scale is 0.5 there and 0.4 here"),
        ({"shift": 0.3}, {}, "config.latents.shift is 0.0 there and 0.3 here"),
        ({"autoencoder": "c" * 64}, {}, "config.latents.autoencoder is 'aa"),
        ({}, None, "config.latents is 'pixels' there and 'latents' here"),
        ({}, {"diffusion__prediction": "v"}, "config.diffusion.prediction is 'v' there and 'epsilon' here"),
        ({}, {"diffusion__variance": "fixed_small"}, "config.diffusion.variance is 'fixed_small' there"),
        ({}, {"diffusion__schedule": "cosine"}, "config.diffusion.schedule is 'cosine' there and 'linear' here"),
        ({}, {"diffusion__beta_end": 0.01}, "config.diffusion.beta_end is 0.01 there and 0.02 here"),
        ({}, {"diffusion__num_timesteps": 500}, "config.diffusion.num_timesteps is 500 there and 1000 here"),
        ({}, {"dit__num_heads": 4}, "config.dit.num_heads is 4 there and 2 here"),
    ],
)
def test_weights_of_other_latents_or_another_process_are_refused_naming_both(dit, ours, theirs, path):
    config = edited(dit, latents=LATENTS | ours)
    other = dit if theirs is None else edited(dit, latents=LATENTS, **theirs)
    with pytest.raises(ValueError, match="trained for something else") as error:
        check_starting_weights(config, other)
    assert path in str(error.value) and "init_from_any=True" in str(error.value) and "\n" not in str(error.value)
    lines = check_starting_weights(edited(config, training__init_from_any=True), other)
    assert path in lines[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "path"),
    [
        ({"text": TEXT}, {"text": TEXT | {"encoder": "d" * 64}}, "conditions.text.encoder is 'ddd"),
        ({"layout": LAYOUT}, {"layout": LAYOUT | {"classes": ("dog", "cat")}}, "conditions.layout.classes is ('dog'"),
        (
            {"spatial": {"kind": "inpainting"}},
            {"spatial": {"kind": "low_resolution", "factor": 2}},
            "conditions.spatial.kind is 'low_resolution' there and 'inpainting' here",
        ),
    ],
)
def test_weights_of_another_condition_of_a_name_are_refused(dit, ours, theirs, path):
    with pytest.raises(ValueError, match="trained for something else") as error:
        check_starting_weights(edited(dit, conditions=ours), edited(dit, conditions=theirs))
    assert path in str(error.value)


def test_what_is_not_recorded_is_taken_with_a_word_and_rounding_is_no_difference(dit):
    config = edited(dit, latents=LATENTS)
    assert check_starting_weights(config, edited(dit, latents=LATENTS | {"scale": 0.50001})) == []
    lines = check_starting_weights(config, edited(dit, latents=LATENTS | {"scale": None, "autoencoder": None}))
    assert len(lines) == 2 and all("cannot be compared" in line for line in lines)
    unresolved = edited(dit, latents=LATENTS | {"scale": None, "autoencoder": None})
    assert check_starting_weights(unresolved, config) == []  # before the data is found


def test_another_number_of_groups_which_no_shape_tells_is_refused(dit, tmp_path):
    unet = edited(dit, dit=None, unet=UNET)
    with pytest.raises(ValueError, match="config.unet.num_groups is 2 there and 4 here"):
        check_starting_weights(unet, edited(unet, unet__num_groups=2))
    autoencoder = autoencoder_config(tmp_path)
    with pytest.raises(ValueError, match="config.autoencoder.num_groups is 2 there and 4 here"):
        check_starting_weights(autoencoder, edited(autoencoder, autoencoder__num_groups=2))


def test_another_network_or_stage_is_refused(dit, tmp_path):
    with pytest.raises(ValueError, match=r"must be of this config's network, but its blocks_0/.* is \("):
        check_starting_weights(dit, edited(dit, dit__mlp_ratio=2.0))
    with pytest.raises(ValueError, match="its blocks_2/.* is missing"):
        check_starting_weights(edited(dit, dit__depth=3), dit)
    with pytest.raises(ValueError, match="stage 'autoencoder', not 'diffusion'"):
        check_starting_weights(dit, autoencoder_config(tmp_path))
    deeper = edited(dit, dit__depth=3, training__init_from_any=True)
    assert "made anew, at random: blocks_*/" in " ".join(check_starting_weights(deeper, dit))


def saved(config, folder):
    """Writes a checkpoint of random parameters that are nowhere zero; returns them."""
    params = init_params(config, jax.random.key(5))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    with Checkpoints(folder, max_to_keep=1) as checkpoints:
        checkpoints.save(3, {"params": params}, config)
    return dict(flatten(params))


def started(config, folder):
    """Returns the parameters that a run of a config begins with, from the checkpoint in a folder."""
    config, mesh = edited(config, training__init_from=str(folder)), make_mesh(config.mesh)
    shapes = abstract_params(config)
    shardings = tree_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return starting_params(config, mesh, abstract)


@pytest.mark.parametrize(
    ("changes", "anew", "left", "line"),
    [
        (
            {"data__num_classes": 5},
            "y_embedder",
            None,
            "made anew, at random: y_embedder (classes: 3 there and 5 here)",
        ),
        ({"dit__class_conditional": False}, None, "y_embedder", "not read: y_embedder"),
        ({"conditions": {"text": TEXT}}, "text", None, "made anew, at random: text"),
        (
            {"conditions": {"layout": LAYOUT}, "dit__conditioning": ("adaln_zero", "cross_attention")},
            ("layout", "cross", "norm_cross"),
            None,
            "made anew, at random: blocks_*/cross_attn, blocks_*/norm_cross, layout",
        ),
    ],
)
def test_other_classes_and_conditions_are_taken_and_said_in_one_line(dit, tmp_path, changes, anew, left, line):
    sampling = {"sampling__cfg_scale": 1.0}
    config, dit = edited(dit, **changes, **sampling), edited(dit, **sampling)
    lines = check_starting_weights(config, dit)
    assert len(lines) == 1 and line in lines[0]
    theirs = saved(dit, tmp_path / "source")
    ours = dict(flatten(started(config, tmp_path / "source")))
    for path, value in ours.items():
        if anew and any(part.startswith(anew) for part in path.split("/")):
            assert path not in theirs or value.shape != theirs[path].shape
            assert np.isfinite(value).all()
        else:
            np.testing.assert_array_equal(value, theirs[path])
    assert {path.split("/")[0] for path in theirs.keys() - ours.keys()} == ({left} if left else set())


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_a_spatial_condition_that_is_new_changes_nothing_at_first_and_one_that_goes_is_not_read(dit, tmp_path, network):
    plain = dit if network == "dit" else edited(dit, unet=UNET, dit=None)
    masked = edited(plain, conditions={"spatial": {"kind": "inpainting"}})
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([3, 400])
    conditions = {"label": jnp.array([0, 2]), "spatial": jax.random.normal(jax.random.key(1), (2, 8, 8, 2))}

    def output(config, params):
        return build_denoiser(config).apply({"params": params}, x, t, conditions if config.spatial else {
            "label": conditions["label"]
        })  # fmt: skip

    saved(plain, tmp_path / "plain")
    assert "begin at zero" in check_starting_weights(masked, plain)[0]
    before, after = (output(config, started(config, tmp_path / "plain")) for config in (plain, masked))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    saved(masked, tmp_path / "masked")
    assert "are not read" in check_starting_weights(plain, masked)[0]
    conditions["spatial"] *= 0
    with_map, without = (output(config, started(config, tmp_path / "masked")) for config in (masked, plain))
    np.testing.assert_allclose(without, with_map, rtol=1e-4, atol=1e-5)


def test_the_labels_of_another_data_set_and_an_average_of_what_is_new_are_told(dit):
    other = edited(dit, data__name="else/birds")
    assert "begin as those of birds" in check_starting_weights(dit, other)[0]
    config = edited(dit, data__num_classes=5, training__ema_decay=0.9999)
    assert "the average of decay=0.9999 will still be 100%" in check_starting_weights(config, dit)[0]


def test_autoencoders_and_classifiers_are_fine_tuned_too(dit, tmp_path):
    plain = edited(autoencoder_config(tmp_path), training__init_from="source")
    judged = edited(adversarial_config(tmp_path), training__init_from="source")
    assert check_starting_weights(judged, plain) == []
    assert "its discriminator is not read" in check_starting_weights(judged, judged)[0]
    with pytest.raises(ValueError, match="codebook.num_codes is 16 there and None here"):
        check_starting_weights(plain, adversarial_config(tmp_path, {"num_codes": 16}))
    values = config_to_dict(dit) | {"stage": "classifier", "sampling": None}
    values["dit"]["class_conditional"] = False
    classifier = config_from_dict(values)
    assert (
        "final_layer (classes: 3 there"
        in check_starting_weights(edited(classifier, data__num_classes=5), classifier)[0]
    )
    with pytest.raises(ValueError, match="num_timesteps is 1000 there and 500 here"):
        check_starting_weights(edited(classifier, diffusion__num_timesteps=500), classifier)
