"""Every file in configs/ is a run that can be built, at the size that it promises."""

import pathlib
import re

import jax
import pytest
from jax.sharding import AxisType

from dit_jax.config import config_from_dict, config_to_dict, load_config
from dit_jax.evaluation.generate import check_classifier
from dit_jax.models.build import abstract_inputs, abstract_params, build_model
from dit_jax.models.cost import count_params
from dit_jax.parallel.mesh import check_batch_size, make_mesh
from dit_jax.parallel.rules import describe_shardings, tree_shardings
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.state import abstract_state

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
# Trainable parameters of the papers' models (arXiv:2212.09748, table 4 and its code; arXiv:2112.10752, tables 8, 10 and
# 12; arXiv:2105.05233, table 11). The U-Nets' have a table of 1,001 classes, which LDM does not count: its f4 of 400 M
# logs 400.92 M when it starts.
PAPER_PARAMETERS = {
    "dit_imagenet.py": 674_834_720,
    "dit_imagenet.py:S/2": 32_865_056,
    "dit_imagenet.py:B/4": 130_426_496,
    "dit_imagenet.py:L/8": 458_578_432,
    "dit_imagenet.py:XL/2-512": 674_834_720,
    "autoencoder_kl.py": 83.65,  # in millions
    "autoencoder_kl.py:f4": 55.31,
    "autoencoder_kl.py:f8": 83.65,
    "autoencoder_kl.py:f16": 69.61,
    "autoencoder_kl.py:f32": 103.88,
    "autoencoder_vq.py": 55.32,
    "autoencoder_vq.py:f8": 67.72,
    "autoencoder_vq.py:f8-256": 67.65,
    "autoencoder_vq.py:f16": 69.59,
    "unet_imagenet.py": 400_920_579 + 512_512,
    "unet_imagenet.py:f8": 394_984_196 + 512_512,
    "unet_unconditional.py": 274.06,
    # 1.45 B with 39,100,698 of logits, unread there, and without 1,640,960 of the text's null and projection.
    "unet_text.py": 872_300_484 + 542_895_360 + 1_640_960,
    "adm_imagenet.py": 553.84,  # 554 M
    "adm_imagenet.py:128": 421.53,  # 422 M
    "autoencoder_finetune.py": 83.65,
    "autoencoder_finetune.py:mse": 83.65,
}
OURS = {"emoji_restoration.py:inpainting", "emoji_scenes.py:semantic", "fashion_mnist_pixels.py:unet"}
RUNS = sorted({path.name for path in FILES} | set(PAPER_PARAMETERS) | OURS)


@pytest.fixture(scope="module", params=RUNS)
def built(request):
    """A config file's path with an argument, its config and its abstract parameters."""
    overrides, start = [], None
    if "finetune" in request.param:  # the network is that of the weights: here of Stable Diffusion's f8
        overrides = [("training.init_from", "f8")]
        start = lambda _: load_config(str(FOLDER / "autoencoder_kl.py:f8"))  # noqa: E731
    config = load_config(str(FOLDER / request.param), overrides, start)
    return FOLDER / request.param, config, abstract_params(config)


def test_file_opens_with_its_command_and_builds_without_memory(built):
    path, config, params = built
    file = path.name.partition(":")[0] if path.parent == FOLDER else "dit_imagenet.py"  # S/2 is no folder
    assert re.search(rf"dit-jax train --config=configs/{file}(:\S+)? --workdir=", (FOLDER / file).read_text())
    output = jax.eval_shape(build_model(config).apply, {"params": params}, *abstract_inputs(config, batch_size=2))
    height, width, channels = config.input_shape
    if config.stage == "diffusion":
        outputs = 2 if config.diffusion.variance == "learned_range" else 1
        assert output.shape == (2, height, width, outputs * channels)
    elif config.stage == "classifier":
        assert output.shape == (2, config.data.num_classes)
    else:
        assert output[0].shape == (2, height, width, channels)


def test_model_has_the_papers_parameters(built):
    path, _, params = built
    name = str(path.relative_to(FOLDER))
    if name in PAPER_PARAMETERS:
        count = count_params(params)
        assert PAPER_PARAMETERS[name] in (count, round(count / 1e6, 2))
    else:
        assert name.startswith(
            ("fashion_mnist", "cifar10", "emoji")
        )  # ours; a new config of a paper's model belongs in the table


def test_shardings_resolve_on_one_device_and_on_eight(built):
    _, config, params = built
    axis_types = (AxisType.Auto,) * 2
    one = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=axis_types, devices=jax.devices()[:1])
    eight = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=axis_types)
    for mesh in (one, eight):
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(tree_shardings(params, mesh)), strict=True):
            sharding.shard_shape(leaf.shape)  # raises where a dimension does not divide
    if count_params(params) > 10_000_000:
        assert describe_shardings(params, eight)["split"]


def test_training_state_resolves_on_the_files_own_mesh(built):
    _, config, params = built
    mesh = make_mesh(config.mesh)
    check_batch_size(config.training.global_batch_size, mesh, "config.training.global_batch_size")
    optimizer = make_optimizer(config.optimizer, config.training.num_train_steps)
    state = abstract_state(config, optimizer, mesh)
    assert count_params(state.params) == count_params(params)
    assert (state.ema_params is None) == (config.training.ema_decay is None)


def test_config_survives_its_dict(built):
    _, config, _ = built
    assert config_from_dict(config_to_dict(config)) == config


def test_unknown_name_of_a_paper_model_lists_those_there_are():
    for argument, message in (("dit_imagenet.py:XXL/2", "must be one of S/8, S/4"), ("autoencoder_kl.py:f2", "f4, f8")):
        with pytest.raises(ValueError, match=message):
            load_config(str(FOLDER / argument))


def test_quick_starts_latents_are_those_of_its_autoencoder():
    autoencoder, dit = (
        load_config(str(FILES[0].parent / f"fashion_mnist_{name}.py")) for name in ("autoencoder", "dit")
    )
    check_classifier(dit, load_config(str(FILES[0].parent / "fashion_mnist_classifier.py")))
    model = build_model(autoencoder)
    params, (images, _) = abstract_params(autoencoder), abstract_inputs(autoencoder)
    moments = jax.eval_shape(lambda p, x: model.apply({"params": p}, x, method="encode"), params, images)
    height, width, channels = dit.latents.shape
    assert moments.shape == (1, height, width, 2 * channels)
    for key in ("name", "image_size", "channels", "num_classes", "horizontal_flip"):
        assert getattr(autoencoder.data, key) == getattr(dit.data, key)
