"""Images that cannot be read, in a run: it goes on without them, says so, and ends where they are too many."""

import dataclasses

import pytest

from dit_jax.cli.train import autoencoder_task
from dit_jax.metrics.history import read_metrics
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training import loop
from tests.tiny import autoencoder_config, make_image_folder


@pytest.fixture
def config(tmp_path):
    """A run over all 54 images whose second one of training, and first held-out one, are no images."""
    folder = make_image_folder(tmp_path / "images")
    for name in ("001.png", "009.png"):
        (folder / "class_0" / name).write_bytes(b"not an image")
    return autoencoder_config(folder, num_train_steps=8, eval_every_steps=8, checkpoint_every_steps=8)


def train(config, workdir, max_bad_share):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_share=max_bad_share))
    workdir.mkdir()
    mesh = make_mesh(config.mesh)
    return loop.train(config, workdir, autoencoder_task(config, mesh, workdir), mesh)


def test_a_run_leaves_them_out_counts_them_and_names_each_once(config, tmp_path):
    state = train(config, tmp_path / "run", 0.2)
    assert int(state.step) == 8
    log = (tmp_path / "run" / "log.txt").read_text()
    for split, index, name in (("train", 1, "001.png"), ("test", 0, "009.png")):
        line = f"example {index} of {config.data.name} {split} is left out, another stands in for it: cannot read image"
        assert log.count(line) == 1 and f"class_0/{name}" in log
    rows = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert rows[-1]["bad_examples"] >= 1


def test_more_than_the_share_of_them_end_the_run(config, tmp_path):
    with pytest.raises(
        ValueError, match=r"1 of \d+ examples of .* cannot be read, more than config.data.max_bad_share=0"
    ):
        train(config, tmp_path / "run", 0.001)
