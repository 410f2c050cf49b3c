"""`dit-jax sample` and `LoadedModel.sample` from images: painting, starting from one, enlarging, maps of classes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.checkpoint import Checkpoints, write_config
from dit_jax.cli.main import main
from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.diffusion.process import add_noise, make_process, respace
from dit_jax.diffusion.samplers.scan import image_noise
from dit_jax.evaluation.given import Given
from dit_jax.evaluation.loaded import load
from dit_jax.metrics.picture import to_uint8
from dit_jax.models.build import init_params
from tests.cli.test_main import fail
from tests.tiny import autoencoder_config, dit_config

SPATIAL = {
    "plain": None,
    "low_resolution": {"kind": "low_resolution", "factor": 2},
    "inpainting": {"kind": "inpainting"},
    "semantic": {"kind": "semantic", "num_classes": 4},
    "layout": None,
    "latent": None,  # without its autoencoder
}
LAYOUT = {"classes": ("cat", "dog"), "max_objects": 2, "transformer": {"width": 16, "depth": 1}}
CAT, DOG = "cat 0 0 0.5 1", "dog 0.5 0.5 1 1"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Workdirs of random weights, by their spatial condition, and an image, a mask and a map, all of 8 x 8 pixels."""
    root = tmp_path_factory.mktemp("tasks")
    for name, spatial in SPATIAL.items():
        values = config_to_dict(dit_config(root / "none"))
        values["conditions"] = {"spatial": spatial, "layout": LAYOUT if name == "layout" else None}
        values["diffusion"]["prediction"] = "x_0"  # of which random weights draw no black and white alone
        values["latents"] = {"shape": (8, 8, 1), "scale": 1.0} if name == "latent" else None
        values["data"]["map_field"] = "map" if name == "semantic" else None
        config = config_from_dict(values)
        params = init_params(config, jax.random.key(0))
        params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
        (root / name).mkdir()
        write_config(root / name, config)
        with Checkpoints(root / name, max_to_keep=1) as checkpoints:
            checkpoints.save(0, {"params": params}, config)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / "image.png")
    Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(root / "small.png")
    Image.fromarray(255 * (np.indices((8, 8)).sum(axis=0) > 8).astype(np.uint8)).save(root / "mask.png")
    Image.fromarray(rng.integers(0, 4, (8, 8), np.uint8)).save(root / "map.png")
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / "faint.png")  # levels 0 and 1, not 0 and 255
    (root / "latin.txt").write_bytes("cät 0 0 1 1".encode("latin-1"))
    return root


def draw(root, name, output, *flags):
    main(["sample", f"--workdir={root / name}", f"--output={output}", "--num_samples=4", *flags])
    with np.load(output / "samples.npz") as file:
        return file["arr_0"]


def pixels(root, name):
    return np.asarray(Image.open(root / name))


@pytest.mark.parametrize("name", ["plain", "inpainting"])
def test_painting_keeps_the_known_pixels_and_paints_the_others(root, name, tmp_path):
    flags = [f"--image={root / 'image.png'}", f"--mask={root / 'mask.png'}"]
    images = draw(root, name, tmp_path, *flags)
    hole, image = pixels(root, "mask.png") == 255, pixels(root, "image.png")
    assert (images[:, ~hole] == image[~hole][:, None]).all()
    assert len(np.unique(images[:, hole], axis=0)) == 4  # each image is painted otherwise
    model = load(root / name)
    in_python = model.sample([0, 1, 2, 0], image=image[..., None], mask=hole)
    np.testing.assert_array_equal(in_python, images)
    before = (tmp_path / "samples.npz").stat().st_mtime_ns
    draw(root, name, tmp_path, *flags)
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == before
    outpainted = model.sample([0, 1, 2, 0], image=image[..., None], mask=~hole)
    assert (outpainted[:, hole] == image[hole][:, None]).all() and (outpainted != images).any()
    other = [f"--image={root / 'mask.png'}", f"--mask={root / 'mask.png'}"]
    draw(root, name, tmp_path, *other, "--overwrite")  # drawn anew


def test_what_is_painted_follows_what_is_known(root):
    model, image = load(root / "plain"), pixels(root, "image.png")
    hole = pixels(root, "mask.png") == 255
    one, other = (model.sample([0], image=each[..., None], mask=hole) for each in (image, 255 - image))
    assert (one[:, hole] != other[:, hole]).any()
    often = model.sample([0], image=image[..., None], mask=hole, num_resamplings=3, jump_length=2)
    assert (often[:, hole] != one[:, hole]).any() and (often[:, ~hole] == one[:, ~hole]).all()


def test_drawing_starts_from_the_noised_image_at_the_strengths_step(root, tmp_path):
    """At a strength of one step of 20 an image is what the network, which predicts x_0, makes of it with that noise."""
    model, image = load(root / "plain"), pixels(root, "image.png")
    flags = ["--steps=20", "--cfg_scale=1", "--strength=0.05", f"--image={root / 'image.png'}"]
    images = draw(root, "plain", tmp_path, *flags)
    process = respace(make_process(model.config.diffusion), 20)
    noise = image_noise(jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(4)), 1, (8, 8, 1))
    x_t = add_noise(process, jnp.asarray(image[None, ..., None] / 127.5 - 1), jnp.zeros(4, jnp.int32), noise)
    expected = to_uint8(model.denoise(x_t, np.full(4, process.timesteps[0]), [0, 1, 2, 0])[..., :1])
    np.testing.assert_allclose(images.astype(int)[..., :1], np.asarray(expected).astype(int), atol=1)
    far = draw(root, "plain", tmp_path / "far", *flags, "--strength=0.9")
    assert (far != images).any()


@pytest.mark.parametrize(("name", "flag", "file"), [("low_resolution", "image", "small"), ("semantic", "map", "map")])
def test_model_draws_from_the_image_that_it_was_trained_to_read(root, name, flag, file, tmp_path):
    images = draw(root, name, tmp_path, f"--{flag}={root / file}.png")
    other = pixels(root, f"{file}.png")[::-1]
    Image.fromarray(other).save(tmp_path / "other.png")
    assert (draw(root, name, tmp_path / "other", f"--{flag}={tmp_path / 'other.png'}") != images).any()
    both = draw(root, name, tmp_path / "both", f"--{flag}={root / file}.png,{tmp_path / 'other.png'}")
    np.testing.assert_array_equal(both[::2], images[::2])  # in turn
    assert (both[1] != images[1]).any()
    given = {"image": other[..., None]} if flag == "image" else {"classes": other}
    np.testing.assert_array_equal(load(root / name).sample([0, 1], **given)[1], both[1])


def test_model_draws_the_boxes_that_it_is_given(root, tmp_path):
    images = draw(root, "layout", tmp_path / "a", f"--layout={CAT}")
    (tmp_path / "layouts.txt").write_text(f"{CAT}\n\n{DOG}; {CAT}\n")
    both = draw(root, "layout", tmp_path / "b", f"--layout={tmp_path / 'layouts.txt'}")
    np.testing.assert_array_equal(both[::2], images[::2])  # in turn
    assert (both[1] != images[1]).any()
    model = load(root / "layout")
    np.testing.assert_array_equal(model.sample([0, 1], layout=[CAT, f"{DOG}; {CAT}"]), both[:2])
    moved = model.sample([0], layout="cat 0.5 0 1 1")
    assert (moved != images[:1]).any()
    null = {"ids": np.zeros((1, 8), np.int32), "mask": np.zeros((1, 8), bool)}
    unguided = model.sample([0], layout=CAT, cfg_scales=(("layout", 0.0),))
    np.testing.assert_array_equal(
        unguided, model.draw({"label": np.array([0]), "layout": null}, model.config.sampling, 0)
    )


@pytest.mark.parametrize("name", ["plain", "layout"])
def test_interpolation_ends_in_the_images_of_both_conditions(root, name, tmp_path):
    """Of a deterministic sampler; what lies between changes little from one image to the next."""
    model, given = load(root / name), {"layout": [CAT, DOG]} if name == "layout" else {}
    ends = model.sample([1, 2], seed=3, **given).astype(int)
    between = model.sample([1, 2], seed=3, interpolate=9, **given).astype(int)
    np.testing.assert_allclose(between[[0, -1]], ends, atol=1)  # two rows of a batch or one: the last bit of sums
    steps = np.abs(np.diff(between, axis=0)).mean(axis=(1, 2, 3))
    assert steps.min() > 0 and steps.max() < 0.5 * np.abs(ends[1] - ends[0]).mean()
    (tmp_path / "layouts.txt").write_text(f"{CAT}\n{DOG}\n")
    flags = [f"--layout={tmp_path / 'layouts.txt'}"] if given else []
    flags += [f"--workdir={root / name}", f"--output={tmp_path}", "--labels=1,2", "--interpolate=9", "--seed=3"]
    main(["sample", *flags])
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], between)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("plain", ["--interpolate=1"], "--interpolate=1 must be 2 or more"),
        ("plain", ["--interpolate=3", "--num_samples=1"], "--num_samples=1 must be 2 or more with --interpolate"),
        ("plain", ["--seed=99999999999"], "seed=99999999999 must be from 0 to"),
        ("plain", ["--classifier_scale=nan"], "--classifier_scale=nan must be a finite number"),
        ("plain", ["--image={root}/image.png", "--mask={root}/faint.png"], "nothing to paint: white is"),
        ("latent", ["--image={root}/image.png", "--mask={root}/mask.png"], "no autoencoder to encode images with"),
        ("plain", ["--mask={root}/mask.png"], "a mask needs the image to paint in; give both"),
        ("plain", ["--image={root}/image.png"], "needs sampling strength below 1, or a mask"),
        ("plain", ["--image={root}/image.png", "--mask={root}/small.png"], "is 4 x 4, but the image is 8 x 8"),
        ("plain", ["--image={root}/none.png", "--strength=0.5"], "cannot read image"),
        ("plain", ["--image={root}/small.png", "--strength=0.5"], "must be of the model's 8 x 8 pixels, not 4 x 4"),
        ("plain", ["--image={root}/small.png", "--mask={root}/small.png"], "must be of the model's 8 x 8 pixels"),
        ("plain", ["--sampler=dpm"], "did you mean dpm_solver"),
        ("plain", ["--strength=0.5"], "needs an image to start from"),
        ("plain", ["--strength=1.5"], "strength=1.5 must be above 0"),
        ("plain", ["--map={root}/map.png"], "of use to a model of semantic synthesis alone"),
        ("low_resolution", [], "give the image"),
        ("low_resolution", ["--image={root}/image.png"], "needs an image of 4 x 4 x 1, uint8, not .8, 8, 1."),
        (
            "low_resolution",
            ["--image={root}/small.png", "--mask={root}/small.png"],
            "of no use to a model of super-res",
        ),
        ("inpainting", ["--image={root}/image.png"], "give the mask"),
        ("semantic", [], "give the map of classes"),
        ("semantic", ["--map={root}/image.png"], "a map's classes must be from 0 to 3"),
        ("plain", [f"--layout={CAT}"], "of no use to this model, which reads no boxes"),
        ("layout", [], "the model draws boxes of cat, dog; give a layout, such as"),
        ("layout", ["--layout=cat 0 0 1.5 1"], "must lie within the image"),
        ("layout", ["--layout={root}/latin.txt"], "latin.txt must be a text file in UTF-8"),
        ("layout", ["--layout=" + "ö" * 300], "must be a class and four numbers"),
        ("layout", ["--layout=cow 0 0 1 1"], "'cow' is no class of the model"),
        ("layout", [f"--layout={CAT};{CAT};{CAT}"], "3 boxes are more than the model's 2"),
        ("plain", ["--sampler=plms", "--config.sampling.num_resamplings=2"], "use ancestral or ddim"),
    ],
)
def test_what_does_not_fit_is_one_line_before_a_device_is_touched(root, name, flags, message, capsys, monkeypatch):
    monkeypatch.setattr("dit_jax.evaluation.loaded.load", lambda *_, **__: pytest.fail("loaded"))
    flags = [flag.format(root=root) for flag in flags]
    error = fail(capsys, "sample", f"--workdir={root / name}", f"--output={root / 'bad'}", *flags)
    assert re.search(message, error), error
    assert not (root / "bad").exists()


def test_what_does_not_fit_is_told_in_python(root):
    model, ends = load(root / "layout"), {"labels": [0, 1], "layout": CAT}
    for given, message in (
        ({"layout": []}, "layout must be a text, or several"),
        ({"layout": [("cat", 0, 0, 1, 1)]}, "layout must be a text, or several"),
        (ends | {"interpolate": 1}, "needs two or more to go between"),
        (ends | {"interpolate": 3, "labels": [0]}, "needs two or more to go between"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(**{"labels": [0]} | given)
    with pytest.raises(ValueError, match=r"raw conditions of 'layout' must be a dict of \['ids', 'mask'\]"):
        model.draw({"label": np.array([0]), "layout": {"ids": np.zeros((1, 8), np.int32)}}, model.config.sampling, 0)


def test_as_many_images_are_drawn_as_are_given(root):
    model, image = load(root / "plain"), pixels(root, "image.png")[..., None]
    config = dataclasses.replace(model.config, dit=dataclasses.replace(model.config.dit, class_conditional=False))
    unconditional, hole = dataclasses.replace(model, config=config), pixels(root, "mask.png")[..., None] == 255
    for images, holes in ((np.stack([image, 255 - image]), hole), (image, np.stack([hole, ~hole]))):
        _, known = unconditional.inputs(None, Given(images, holes), config.sampling)
        assert known.image.shape == known.hole.shape == (2, 8, 8, 1)


def test_conditions_may_be_given_as_the_network_reads_them(root):
    model, classes = load(root / "semantic"), pixels(root, "map.png")
    raw = {"label": np.array([0, 1]), "spatial": np.eye(4, dtype=np.float32)[np.stack([classes] * 2)]}
    np.testing.assert_array_equal(model.sample(raw), model.sample([0, 1], classes=classes))
    painted = model.sample(raw, image=pixels(root, "image.png")[..., None], mask=pixels(root, "mask.png"))
    known = pixels(root, "mask.png") == 0
    assert (painted[:, known] == pixels(root, "image.png")[known][:, None]).all()


def test_unconditional_model_needs_no_labels(root):
    model = load(root / "plain")
    with pytest.raises(ValueError, match="conditioned on 'label', which is missing"):
        model.sample(image=pixels(root, "image.png")[..., None], strength=0.5)
    dit = dataclasses.replace(model.config.dit, class_conditional=False)
    sampling = dataclasses.replace(model.config.sampling, cfg_scale=1.0)
    config = dataclasses.replace(model.config, dit=dit, sampling=sampling)
    params = {name: value for name, value in model.params.items() if name != "y_embedder"}
    unconditional = dataclasses.replace(model, config=config, params=params)
    assert unconditional.sample(num_images=3).shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.denoise(np.zeros((2, 8, 8, 3)), [1, 2], [0, 1]), r"x_t must be \[B, 8, 8, 1\]"),
        (lambda model: model.denoise(np.zeros((2, 8, 8, 1), np.uint8), [1, 2], [0, 1]), "x_t must be floats"),
        (
            lambda model: model.denoise(np.zeros((2, 8, 8, 1)), [1, 1000], [0, 1]),
            "t must be 2 timesteps.* from 0 to 999",
        ),
        (lambda model: model.denoise(np.zeros((2, 8, 8, 1)), [1], [0, 1]), "t must be 2 timesteps"),
        (lambda model: model.denoise(np.zeros((2, 8, 8, 1)), [0.5, 1], [0, 1]), "t must be whole numbers"),
        (lambda model: model.denoise(np.zeros((2, 8, 8, 1)), [1, 2], [0, 4]), "labels must be from 0 to 2"),
        (lambda model: model.denoise(np.zeros((2, 8, 8, 1)), [1, 2], [0]), "as many images as x_t, 2, not 1"),
        (lambda model: model.sample([0.5]), "labels must be whole numbers"),
        (lambda model: model.sample(1), "labels must be whole numbers"),
        (lambda model: model.sample([]), "labels must be one or more"),
        (lambda model: model.sample([0], num_images=0), "num_images=0 must be positive"),
        (
            lambda model: model.sample([0], image=np.zeros((9, 9, 1), np.uint8), strength=0.5),
            "uint8 of the model's 8 x 8",
        ),
        (
            lambda model: model.sample([0], image=np.zeros((8, 8, 1), np.uint8), mask=np.full((8, 8), 0.4)),
            "mask",
        ),
        (lambda model: model.encode(np.zeros((1, 8, 8, 1))), "has no autoencoder"),
    ],
)
def test_wrong_arrays_are_one_line_each_in_python(root, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(load(root / "plain"))
    assert "\n" not in str(error.value)


def test_an_autoencoder_names_the_images_and_latents_that_it_takes(tmp_path):
    config = autoencoder_config(tmp_path)
    write_config(tmp_path, config)
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(0, {"params": init_params(config, jax.random.key(0))}, config)
    model = load(tmp_path)
    assert model.encode(np.zeros((1, 6, 8, 1))).shape == (1, 3, 4, 2)
    for call, message in (
        (
            lambda: model.encode(np.zeros((1, 8, 8, 3))),
            r"images must be \[B, H, W, 1\] in \[-1, 1\].*, not \[1, 8, 8, 3\]",
        ),
        (lambda: model.encode(np.zeros((8, 8, 1))), r"images must be \[B, H, W, 1\]"),
        (lambda: model.encode(np.zeros((1, 8, 8, 1), np.uint8)), "images must be floats in .*, not uint8"),
        (lambda: model.encode(np.zeros((1, 7, 8, 1))), "sides that 2, the autoencoder's downsampling, divides"),
        (lambda: model.encode(np.zeros((1, 8, 8, 1)), tile=3), "tile=3 must be 8"),
        (lambda: model.decode(np.zeros((1, 4, 4, 3))), r"latents must be \[B, H, W, 2\]"),
        (lambda: model.decode(np.zeros((1, 4, 4, 2), int)), "latents must be floats"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_map_of_another_size_is_cut_as_in_training_and_that_is_told(root, tmp_path, capsys):
    Image.fromarray(np.kron(pixels(root, "map.png"), np.ones((2, 2), np.uint8))).save(tmp_path / "large.png")
    images = draw(root, "semantic", tmp_path / "large", f"--map={tmp_path / 'large.png'}")
    assert "is 16 x 16 pixels: cut to the model's 8 x 8" in capsys.readouterr().out
    np.testing.assert_array_equal(images, draw(root, "semantic", tmp_path / "own", f"--map={root / 'map.png'}"))


def test_a_short_runs_average_is_told_when_it_is_loaded(root, tmp_path, capsys):
    config = dataclasses.replace(load(root / "plain").config)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, ema_decay=0.9999))
    params = init_params(config, jax.random.key(0))
    for step, items in ((400, {"params": params, "ema_params": params}), (401, {"params": params})):
        with Checkpoints(tmp_path, max_to_keep=3) as checkpoints:
            checkpoints.save(step, items, config)
    capsys.readouterr()
    model = load(tmp_path, 400)
    (note,) = model.notes
    assert "still 96% the weights from before the first step" in note and note in capsys.readouterr().err
    assert load(tmp_path, 401).notes == ()  # weights as they were converted, or copied
    main(["info", f"--workdir={tmp_path}"])
    assert "still" not in capsys.readouterr().out
