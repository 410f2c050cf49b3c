"""A classifier of noised images: trained by `dit-jax train`, it leads `dit-jax sample` to the labels."""

import dataclasses

import jax
import numpy as np
import pytest

from dit_jax.checkpoint import Checkpoints
from dit_jax.checkpoint import write_config as write_run_config
from dit_jax.cli.main import main
from dit_jax.cli.plan import abstract_batch, train_program
from dit_jax.config import config_from_dict, config_to_dict, override_config
from dit_jax.evaluation.loaded import load
from dit_jax.metrics.history import read_metrics
from dit_jax.models.build import init_params
from dit_jax.models.cost import describe_cost
from dit_jax.parallel.mesh import make_mesh
from tests.cli.test_main import fail, write_config
from tests.tiny import dit_config, make_image_folder


def classifier_config(folder, **training):
    """Returns a classifier of the images and the process of `dit_config`."""
    values = config_to_dict(dit_config(folder, **training))
    values["dit"]["class_conditional"] = False
    return config_from_dict(values | {"stage": "classifier", "sampling": None})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A trained classifier, and a denoiser of two steps that reads no labels."""
    root = tmp_path_factory.mktemp("classifier")
    folder = make_image_folder(root / "images", num_images=60)
    training = {"num_train_steps": 300, "eval_every_steps": 300, "checkpoint_every_steps": 300, "log_every_steps": 50}
    config = classifier_config(folder, **training, global_batch_size=16, num_eval_examples=18, ema_decay=0.9)
    denoiser = config_to_dict(dit_config(folder, num_train_steps=2))
    denoiser["dit"]["class_conditional"], denoiser["sampling"]["cfg_scale"] = False, 1.0
    denoiser["sampling"]["x_0_limit"] = 1.0
    for name, each in (("classifier", config), ("denoiser", config_from_dict(denoiser))):
        main(["train", f"--config={write_config(root / f'{name}.py', each)}", f"--workdir={root / name}"])
    return root


def test_classifier_learns_labels_of_noised_images(root):
    """A third is chance; of an image drowned in noise it stays that, so that not all can be right."""
    held_out = [row for row in read_metrics(root / "classifier") if row["split"] == "eval"]
    assert held_out[-1]["accuracy"] > 0.5 and held_out[-1]["loss"] < np.log(3)


def test_samples_that_it_leads_are_what_it_takes_for_the_label(root, tmp_path, capsys):
    classifier, denoiser = load(root / "classifier"), load(root / "denoiser")
    labels = np.arange(24) % 3

    def recognised(images):
        logits = classifier.classify(images[..., :1] / 127.5 - 1, np.zeros(len(images)))
        return (np.argmax(logits, axis=-1) == labels).mean()

    led = denoiser.sample(labels, 20, classifier=classifier, classifier_scale=5.0)
    assert recognised(led) > recognised(denoiser.sample(labels, 20)) + 0.2
    flags = [f"--workdir={root / 'denoiser'}", f"--output={tmp_path}", "--num_samples=24", "--steps=20"]
    main(["sample", *flags, f"--classifier={root / 'classifier'}", "--classifier_scale=5"])
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_0"], led)
    main(["sample", *flags, f"--classifier={root / 'classifier'}", "--classifier_scale=0", "--overwrite"])
    unled = np.load(tmp_path / "samples.npz")["arr_0"].astype(int)
    np.testing.assert_allclose(unled, denoiser.sample(labels, 20).astype(int), atol=1)  # the last bit of sums, a level


def test_what_is_no_classifier_of_this_process_is_one_line(root, capsys):
    flags = ["sample", f"--workdir={root / 'denoiser'}", f"--output={root / 'bad'}"]
    assert "is a run of stage 'diffusion'" in fail(capsys, *flags, f"--classifier={root / 'denoiser'}")
    other = override_config(classifier_config(root / "images"), [("diffusion.schedule", "cosine")])
    (root / "cosine").mkdir()
    write_run_config(root / "cosine", other)
    with Checkpoints(root / "cosine", max_to_keep=1) as checkpoints:
        checkpoints.save(0, {"params": init_params(other, jax.random.key(0))}, other)
    error = fail(capsys, *flags, f"--classifier={root / 'cosine'}")
    assert "must see what the denoiser does: diffusion.schedule is 'cosine', not 'linear'" in error
    assert not (root / "bad").exists()
    assert "is a classifier's run" in fail(capsys, "evaluate", f"--workdir={root / 'classifier'}")
    assert "give a diffusion run's" in fail(capsys, "sample", f"--workdir={root / 'classifier'}")
    with pytest.raises(ValueError, match="the label is what it predicts"):
        values = config_to_dict(classifier_config(root / "images"))
        values["dit"]["class_conditional"] = True
        config_from_dict(values)


def test_new_classifier_knows_nothing_and_is_planned_as_it_is_trained(root):
    config = classifier_config(root / "images")
    params = init_params(config, jax.random.key(0))
    model = dataclasses.replace(load(root / "classifier"), params=params)
    np.testing.assert_array_equal(model.classify(np.ones((2, 8, 8, 1)), [0, 999]), 0.0)
    assert describe_cost(config)["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    program = train_program(config, make_mesh(config.mesh))
    state, batch, _ = program.args
    assert batch.keys() == abstract_batch(config, make_mesh(config.mesh)).keys()
    assert jax.eval_shape(program.function, *program.args)[1]["accuracy"].shape == ()
