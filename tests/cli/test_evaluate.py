"""`evaluate` of an autoencoder, and what else of that stage goes through the program."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dit_jax.cli.main import main
from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.data.pipeline import image_transform
from dit_jax.data.sources import open_source
from dit_jax.evaluation.loaded import load
from dit_jax.metrics.codebook import code_use
from dit_jax.metrics.reconstruction import psnr, ssim
from dit_jax.models.quantizer import nearest_codes
from dit_jax.perceptual.lpips import lpips
from dit_jax.pretrained.name_map import flatten
from tests.cli.test_main import fail, write_config
from tests.random_lpips import random_lpips
from tests.tiny import adversarial_config, autoencoder_config, make_image_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A VQ autoencoder trained with all losses, LPIPS' included (with random weights)."""
    root = tmp_path_factory.mktemp("evaluate")
    save_file(dict(flatten(random_lpips())), root / "lpips.safetensors")
    values = config_to_dict(adversarial_config(make_image_folder(root / "images", size=16), {"num_codes": 16}))
    values["data"]["image_size"] = 16
    values["autoencoder"] |= {"perceptual_weight": 1.0, "lpips_path": str(root / "lpips.safetensors")}
    config = write_config(root / "vq.py", config_from_dict(values))
    main(["train", f"--config={config}", f"--workdir={root / 'vq'}"])
    return root


def test_figures_are_those_of_every_held_out_image_alone(root, capsys):
    capsys.readouterr()
    main(["evaluate", f"--workdir={root / 'vq'}", "--batch_size=4", "--json"])
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((root / "vq" / "evaluation" / "reconstruction.json").read_text())
    assert (root / "vq" / "evaluation" / "reconstructions.png").stat().st_size > 0
    model = load(root / "vq")
    transform = image_transform(model.config.data, train=False)
    images = np.stack([transform(x, np.random.default_rng(0))["image"] for x in open_source(model.config.data, "test")])
    latents = model.encode(images)
    reconstructions = np.clip(model.decode(latents), -1, 1)
    counts = np.bincount(
        np.asarray(nearest_codes(model.params["quantize"]["embedding"], latents)).ravel(), minlength=16
    )
    expected = {
        "psnr": psnr(images, reconstructions).mean(),
        "ssim": ssim(images, reconstructions).mean(),
        "lpips": lpips(random_lpips(), images, reconstructions).mean(),
        "codes_used": (counts > 0).mean(),
        "perplexity": code_use(counts)["perplexity"],
    }
    assert results["num_images"] == len(images) == 6 and results["left_out"] == {}
    for name, value in expected.items():
        assert results[name] == pytest.approx(float(value), rel=1e-4), name


def test_reconstructions_have_a_distance_to_their_originals_named_after_the_network(root, capsys, tmp_path):
    flags = [f"--output={tmp_path}", f"--cache={tmp_path}", "--metrics=rfd", "--json"]
    capsys.readouterr()
    main(["evaluate", f"--workdir={root / 'vq'}", *flags])
    results = json.loads(capsys.readouterr().out)
    assert results["rfd_classifier_6"] > 0
    assert results["features"]["name"] == "images-classifier" and results["reference"]["num_images"] == 6


def test_what_cannot_be_measured_is_said_and_what_was_asked_for_fails(root, capsys, tmp_path):
    main(
        ["evaluate", f"--workdir={root / 'vq'}", f"--output={tmp_path}", "--metrics=psnr", "--num_samples=2", "--json"]
    )
    results = json.loads(capsys.readouterr().out)
    assert results["num_images"] == 2 and "ssim" not in results
    before = (tmp_path / "reconstruction.json").read_bytes()
    more = ["evaluate", f"--workdir={root / 'vq'}", f"--output={tmp_path}", "--metrics=psnr,ssim", "--num_samples=3"]
    error = fail(capsys, *more)  # of other settings: it is not lost in silence
    assert "num_images: 2 -> 3" in error and "measured: ['psnr'] -> ['psnr', 'ssim']" in error
    assert (tmp_path / "reconstruction.json").read_bytes() == before
    evaluate = ["evaluate", f"--workdir={root / 'vq'}"]
    assert "'fid' must be one of psnr" in fail(capsys, *evaluate, "--metrics=fid")
    assert "no such file; ./launch/lpips_weights.sh" in fail(capsys, *evaluate, "--lpips=nowhere")
    folder = f"--config.data.name={tmp_path}"
    assert "must hold one sub-folder a class" in fail(capsys, *evaluate, folder)


def test_lpips_without_weights_fails_at_start_with_the_command_that_fetches_them(root, capsys, tmp_path):
    missing = f"--config.autoencoder.lpips_path={tmp_path / 'missing.safetensors'}"
    error = fail(capsys, "train", f"--config={root / 'vq.py'}", f"--workdir={tmp_path / 'run'}", missing)
    assert "missing.safetensors" in error and "./launch/lpips_weights.sh" in error


def test_decoder_fine_tuning_starts_from_a_workdir_and_keeps_its_latents(root, capsys, tmp_path):
    source = tmp_path / "source"
    source.symlink_to(root / "vq")
    start = f"--config.training.init_from={source}"
    command = ["train", f"--config={root / 'vq.py'}", f"--workdir={tmp_path / 'tuned'}", start]
    command += ["--config.autoencoder.frozen_encoder=True", "--config.training.num_train_steps=2"]
    main(command)
    before, after = (load(path).params for path in (root / "vq", tmp_path / "tuned"))
    for name in before:
        equal = jax.tree.leaves(jax.tree.map(np.array_equal, before[name], after[name]))
        assert all(equal) if name in ("encoder", "quant_conv", "quantize") else not all(equal)
    source.rename(tmp_path / "gone")
    main(command)  # a run that has begun does not need what it began with
    assert "gone" not in fail(capsys, "train", f"--config={root / 'vq.py'}", f"--workdir={tmp_path / 'new'}", start)
    (tmp_path / "gone").rename(source)
    kl = write_config(tmp_path / "kl.py", autoencoder_config(root / "images"))
    error = fail(capsys, "train", f"--config={kl}", f"--workdir={tmp_path / 'run'}", start)
    assert "was trained for something else than this run: config.autoencoder.codebook.num_codes is 16 there" in error
