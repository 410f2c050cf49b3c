"""A checkpoint is restored on any mesh and any number of processes, bit for bit."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from dit_jax.checkpoint import Checkpoints
from dit_jax.config import MeshConfig
from dit_jax.parallel.mesh import make_mesh
from tests.checkpoint.trees import abstract_on, assert_same_items, make_items, one_device, save_steps

ROOT = pathlib.Path(__file__).parents[2]
NUM_PROCESSES = 4


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on eight devices that split the batch alone, saved after steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("run")
    assert save_steps(workdir, [1, 2], make_mesh(MeshConfig(data=8))) == []
    return workdir


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"fsdp": 8}, None], ids=str)
def test_written_on_data_8_it_is_restored_on_another_mesh(workdir, axes):
    mesh = make_mesh(MeshConfig(**axes)) if axes else one_device()
    abstract = abstract_on(mesh, make_items(2))
    _, found = Checkpoints(workdir).restore_newest_good(abstract)
    assert_same_items(found, make_items(2))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract)
    kernel = found["params"]["layer"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16 // mesh.shape["fsdp"], 24)}


def test_four_processes_restore_it_and_agree_on_damage_and_failures(workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "2",
        "DIT_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "DIT_JAX_NUM_PROCESSES": str(NUM_PROCESSES),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.process", workdir],
            cwd=ROOT,
            env=shared | {"DIT_JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(NUM_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("all as expected" in output for output in outputs), "\n".join(outputs)
    _, found = Checkpoints(workdir).restore_newest_good(abstract_on(one_device(), make_items(4)))
    assert_same_items(found, make_items(4))
