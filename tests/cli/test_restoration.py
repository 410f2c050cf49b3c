"""`dit-jax train` and `evaluate` of super-resolution and inpainting: figures of held-out images and their pictures."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

from dit_jax.checkpoint import Checkpoints
from dit_jax.checkpoint import write_config as write_run_config
from dit_jax.cli.main import main
from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.data.pipeline import image_transform, load_examples, spatial_arrays
from dit_jax.data.sources import open_source
from dit_jax.evaluation.loaded import load
from dit_jax.evaluation.restoration import restore_simply
from dit_jax.metrics.reconstruction import psnr
from dit_jax.models.build import init_params
from tests.cli.test_main import fail, write_config
from tests.random_lpips import random_lpips
from tests.tiny import autoencoder_config, dit_config, make_image_folder

KINDS = {"low_resolution": {"factor": 2}, "inpainting": {}}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A config of one kind, and the workdir of its run with an evaluation."""
    root = tmp_path_factory.mktemp(request.param)
    values = config_to_dict(dit_config(make_image_folder(root / "images", size=16)))
    values["data"]["image_size"] = 16
    values["conditions"] = {"spatial": {"kind": request.param} | KINDS[request.param]}
    config = config_from_dict(values)
    main(["train", f"--config={write_config(root / 'config.py', config)}", f"--workdir={root / 'run'}"])
    flags = [f"--output={root / 'evaluation'}", "--num_samples=5"]
    if request.param == "low_resolution":  # once: compiling VGG-16 takes its time
        save_file(flatten_dict(random_lpips(), sep="/"), root / "lpips.safetensors")
        flags.append(f"--lpips={root / 'lpips.safetensors'}")
    main(["evaluate", f"--workdir={root / 'run'}", *flags])
    return config, root


def test_figures_are_of_held_out_images_beside_the_baseline(run):
    config, root = run
    result = json.loads((root / "evaluation" / "restoration.json").read_text())
    name = {"low_resolution": "bicubic", "inpainting": "mean_fill"}[config.spatial.kind]
    source = open_source(config.data, "test")
    transform = image_transform(config.data, False, spatial_arrays(config.data, config.spatial))
    examples = load_examples(source, transform, range(len(source))[:5])
    expected = psnr(examples["image"], restore_simply(config, examples)).mean()
    np.testing.assert_allclose(result[f"{name}_psnr"], expected, rtol=1e-2)
    assert 0 < result["psnr"] < result[f"{name}_psnr"]  # two steps learn nothing
    assert result.get("known_pixels_exact", True) is True
    if config.spatial.kind == "low_resolution":
        assert result["lpips"] > result[f"{name}_lpips"] > 0
    assert result["split"] == "test" and result["step"] == 4


def test_restorations_of_other_settings_are_not_lost_in_silence(run, capsys):
    _, root = run
    before = {path.name: path.read_bytes() for path in (root / "evaluation").iterdir()}
    command = ["evaluate", f"--workdir={root / 'run'}", f"--output={root / 'evaluation'}", "--num_samples=4"]
    assert "samples.num_samples: 5 -> 4" in fail(capsys, *command)
    assert {path.name: path.read_bytes() for path in (root / "evaluation").iterdir()} == before


def test_training_and_evaluation_show_what_was_given_drawn_and_true(run):
    config, root = run
    (picture,) = (root / "run" / "samples").glob("*4*.png")
    columns, rows = 6, 3  # six held-out images: given, drawn, true
    assert np.asarray(Image.open(picture)).shape[:2] >= (rows * 16, columns * 16)
    assert (root / "evaluation" / "restorations.png").exists()


def test_holes_are_filled_with_the_mean_of_what_is_around_them():
    config = config_from_dict(config_to_dict(dit_config("none")) | {"conditions": {"spatial": {"kind": "inpainting"}}})
    image = np.zeros((1, 8, 8, 1), np.float32)
    image[0, :4], image[0, 6:] = 0.5, 1.0
    hole = np.zeros_like(image)
    hole[0, 4:6] = 1.0
    found = restore_simply(config, {"image": image, "hole": hole})
    np.testing.assert_allclose(found[0, 4:6], (4 * 0.5 + 2 * 1.0) / 6, rtol=1e-6)
    np.testing.assert_array_equal(found[hole == 0], image[hole == 0])


@pytest.mark.parametrize("kind", ["inpainting", None])
def test_painting_in_latents_keeps_the_known_pixels_of_the_image(kind, tmp_path):
    """By a model that reads the masked image's latents, and by one that does not: known latents are noised into it."""
    folder = make_image_folder(tmp_path / "images")
    autoencoder = autoencoder_config(folder)
    (tmp_path / "autoencoder").mkdir()
    write_run_config(tmp_path / "autoencoder", autoencoder)
    with Checkpoints(tmp_path / "autoencoder", max_to_keep=1) as checkpoints:
        checkpoints.save(0, {"params": init_params(autoencoder, jax.random.key(0))}, autoencoder)
    values = config_to_dict(dit_config(folder, num_train_steps=2))
    values["latents"] = {"shape": (4, 4, 2), "encode_with": str(tmp_path / "autoencoder"), "scale": 1.0}
    values["conditions"] = {"spatial": {"kind": kind}} if kind else None
    config = write_config(tmp_path / "config.py", config_from_dict(values))
    main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"])
    kernel = load(tmp_path / "run").params["x_embedder"]["kernel"]
    assert kernel.shape[0] == 2 * 2 * (2 + (3 if kind else 0))  # latents, those of the masked image, and the mask
    image = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 1:4] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = [f"--image={tmp_path / 'image.png'}", f"--mask={tmp_path / 'mask.png'}", "--num_samples=3"]
    main(["sample", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'drawn'}", *flags])
    with np.load(tmp_path / "drawn" / "samples.npz") as file:
        images = file["arr_0"]
    assert (images[:, mask == 0] == image[mask == 0][:, None]).all()
    assert len(np.unique(images[:, mask > 0], axis=0)) == 3
    if kind:
        main(["evaluate", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'evaluation'}", "--num_samples=3"])
        assert json.loads((tmp_path / "evaluation" / "restoration.json").read_text())["known_pixels_exact"] is True
