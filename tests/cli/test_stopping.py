"""SIGTERM ends what the same command goes on with, and one run trains in a workdir."""

import os
import signal
import time

import numpy as np
import pytest

from dit_jax.cli.main import made_way, main
from dit_jax.cli.train import RUN_LOCK
from dit_jax.config import MeshConfig, config_to_dict
from dit_jax.evaluation import features
from dit_jax.files import only_one
from dit_jax.metrics.feature_network import FeatureNetwork
from dit_jax.parallel import preemption
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.preemption import RESTART, MakeWay, heed, heed_alone
from tests.tiny import dit_config

LIMIT_SECONDS = 120


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not preemption._current._agreed.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("look", [heed, heed_alone])
def test_sigterm_ends_a_verb_at_its_next_batch_with_the_code_that_asks_for_another_start(look, capsys):
    with pytest.raises(SystemExit) as ended, made_way("sample"):
        heed()
        ask()
        look()
    assert ended.value.code == RESTART
    assert capsys.readouterr().err == "dit-jax sample: asked to make way; start it again to go on\n"
    look()  # nothing asks any more


def test_sigterm_is_heard_between_the_batches_of_a_network_of_features():
    network = FeatureNetwork("sum", "FD-sum", {}, lambda params, images: {"pool": images.sum((1, 2)).astype("float32")})
    taken = []

    def images():
        for number in range(99):
            taken.append(number)
            if number == 2:
                ask()
            yield np.zeros((features.DEVICE_ROWS * 8, 4, 4, 3), np.uint8)

    with pytest.raises(MakeWay), made_way("evaluate"):
        list(features.extract_features(network, images(), make_mesh(MeshConfig())))
    assert taken == [0, 1, 2]


def test_a_second_train_in_a_workdir_is_refused_in_a_line_and_writes_nothing(tmp_path, capsys):
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    values = config_to_dict(dit_config(tmp_path / "images"))
    config.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    with only_one(workdir / RUN_LOCK, ""), pytest.raises(SystemExit) as ended:
        main(["train", f"--config={config}", f"--workdir={workdir}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and os.listdir(workdir) == [RUN_LOCK]
    assert f"--workdir={workdir} is being trained: process {os.getpid()} on " in line and " since 2" in line
