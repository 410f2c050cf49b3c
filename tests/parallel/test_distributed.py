"""What the environment says about the processes of a run."""

import importlib.util

import pytest

from dit_jax.parallel import distributed
from dit_jax.parallel.distributed import explicit_processes, in_slurm_step, on_tpu_pod

EXPLICIT = {"DIT_JAX_COORDINATOR": "host:123", "DIT_JAX_NUM_PROCESSES": "4", "DIT_JAX_PROCESS_ID": "3"}


def test_nothing_is_started_without_a_word_in_the_environment():
    assert explicit_processes({}) is None
    assert not in_slurm_step({}) and not on_tpu_pod({"TPU_SKIP_MDS_QUERY": "1"})


def test_three_variables_name_a_process_and_no_cluster_is_asked():
    assert explicit_processes(EXPLICIT) == {
        "coordinator_address": "host:123",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"DIT_JAX_PROCESS_ID": ""},
            "DIT_JAX_PROCESS_ID must be set where DIT_JAX_COORDINATOR and DIT_JAX_NUM_PROCESSES is",
        ),
        ({"DIT_JAX_COORDINATOR": ""}, "DIT_JAX_COORDINATOR must be set"),
        ({"DIT_JAX_COORDINATOR": "host"}, "must be HOST:PORT"),
        ({"DIT_JAX_NUM_PROCESSES": "four"}, "DIT_JAX_NUM_PROCESSES='four' must be a whole number"),
        ({"DIT_JAX_PROCESS_ID": "4"}, "DIT_JAX_PROCESS_ID=4 must be below DIT_JAX_NUM_PROCESSES=4"),
        ({"DIT_JAX_PROCESS_ID": "-1"}, "must be a whole number"),
    ],
)
def test_half_given_variables_are_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        explicit_processes(EXPLICIT | change)


def test_tasks_of_srun_are_processes_but_not_the_batch_script():
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert not in_slurm_step(batch)
    assert in_slurm_step(batch | {"SLURM_STEP_NODELIST": "node[1-2]"})
    assert not in_slurm_step(batch | {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"})


@pytest.mark.parametrize(
    ("endpoints", "tpu_env", "environment", "expected"),
    [
        ("a:1:10.0.0.1,b:2:10.0.0.2", "", {}, True),
        ("a:1:10.0.0.1", "", {}, False),
        ("a:1:10.0.0.1", "MEGASCALE_NUM_SLICES: '2'", {}, True),
        ("a:1:10.0.0.1,b:2:10.0.0.2", "", {"JAX_PLATFORMS": "cpu"}, False),
        ("a:1:10.0.0.1,b:2:10.0.0.2", "", {"TPU_PROCESS_BOUNDS": "1,1,1"}, False),  # a worker by itself
        (None, None, {"TPU_WORKER_HOSTNAMES": "a,b"}, True),  # on GKE; None: nobody asks for metadata
        (None, None, {"TPU_WORKER_HOSTNAMES": "a"}, False),
        (None, None, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_tpu_slice_of_several_workers_or_several_slices_is_a_pod(
    monkeypatch, endpoints, tpu_env, environment, expected
):
    metadata = {"worker-network-endpoints": endpoints, "tpu-env": tpu_env}
    monkeypatch.setattr(distributed, "_tpu_metadata", metadata.__getitem__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    assert on_tpu_pod(environment) is expected
