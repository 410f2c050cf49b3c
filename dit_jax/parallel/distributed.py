"""Several processes that train as one: how they find each other, wait for each other and end together.

JAX's own runtime does the work; here is what the environment says about it. The first of these that holds starts it:

- `DIT_JAX_COORDINATOR=HOST:PORT`, `DIT_JAX_NUM_PROCESSES` and `DIT_JAX_PROCESS_ID`, as `launch/local.sh` and
  `launch/gke.sh` set them, or a person;
- a SLURM step of several tasks (`srun`), each with the GPU of its number on the node;
- a Cloud TPU slice of several workers, or several slices.

Otherwise there is a single process, and nothing here does anything.
"""

import contextlib
import importlib.util
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping

import jax
from jax._src import distributed  # jax.distributed has no public access to the service's keys and barriers

from dit_jax.parallel import preemption
from dit_jax.terminal import silence_libtpu, silence_native_output

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "DIT_JAX_COORDINATOR", "DIT_JAX_NUM_PROCESSES", "DIT_JAX_PROCESS_ID"
TPU_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as dead and ends the others; JAX: 100
SHUTDOWN_SECONDS = 120  # that the first to finish waits for the last, which may still write curves; JAX: 300
BARRIER_SECONDS = 3600  # that the others wait for what one process does for all, such as copying weights
POLL_SECONDS = 1.0  # between looks at whether another process has failed
FAREWELL_SECONDS = 10  # that a failed process waits for the others to read why
UNEXPECTED = 1  # exit code of an error that is not a person's mistake
LOST = 134  # exit code where another process was lost: the one by which JAX's service ends a process for that
ERROR = "dit_jax/error"

_ending = threading.Event()


def start_processes() -> None:
    """Joins this process to the others of its run, if it has any; to be called before any device is used.

    Raises:
      ValueError: where the environment is incomplete, or the processes do not find each other.
    """
    if jax.distributed.is_initialized():
        preemption.join()
        return
    explicit = explicit_processes(os.environ)
    if not (explicit or in_slurm_step(os.environ) or on_tpu_pod(os.environ)):
        silence_libtpu()
        return
    silence_native_output()
    # It would swallow SIGTERM, by which a process is asked to end, and nothing here asks it about that.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **(explicit or {}),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        where = distributed.global_state.coordinator_address
        raise ValueError(
            f"the processes could not meet at {where}: {error}; check that the port is free there and open to all hosts"
        ) from error
    threading.Thread(target=_end_with_others, name="end_with_others", daemon=True).start()
    preemption.join()


def explicit_processes(environment: Mapping[str, str]) -> dict | None:
    """Returns what `jax.distributed.initialize` is told by the three variables; None where none of them is set."""
    names = COORDINATOR, NUM_PROCESSES, PROCESS_ID
    values = {name: environment.get(name, "") for name in names}
    if not any(values.values()):
        return None
    missing = [name for name in names if not values[name]]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be set where {_set_names(values)} is; set all three or none")
    if not re.fullmatch(r".+:\d+", values[COORDINATOR]):
        raise ValueError(f"{COORDINATOR}={values[COORDINATOR]!r} must be HOST:PORT; give process 0's")
    for name in (NUM_PROCESSES, PROCESS_ID):
        if not values[name].isdecimal():
            raise ValueError(f"{name}={values[name]!r} must be a whole number; set it to one")
    num_processes, process_id = int(values[NUM_PROCESSES]), int(values[PROCESS_ID])
    if process_id >= num_processes:
        raise ValueError(
            f"{PROCESS_ID}={process_id} must be below {NUM_PROCESSES}={num_processes}; number the processes from 0"
        )
    return {
        "coordinator_address": values[COORDINATOR],
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",  # what a cluster says otherwise does not count
    }


def _set_names(values: Mapping[str, str]) -> str:
    return " and ".join(name for name, value in values.items() if value)


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Returns whether this is one of several tasks of `srun`; the batch script itself is none of them."""
    return "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1


def on_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Returns whether this is one of several workers that share a TPU slice, or several slices."""
    platforms = environment.get("JAX_PLATFORMS", "tpu").split(",")
    # jax sets TPU_SKIP_MDS_QUERY where it finds no TPU chip; nothing asks for metadata there.
    if "tpu" not in platforms or importlib.util.find_spec("libtpu") is None or "TPU_PROCESS_BOUNDS" in environment:
        return False
    if int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return True
    if "TPU_WORKER_HOSTNAMES" in environment:  # on GKE
        return len(environment["TPU_WORKER_HOSTNAMES"].split(",")) > 1
    if "TPU_SKIP_MDS_QUERY" in environment:
        return False
    slices = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _tpu_metadata("tpu-env"))
    return len(_tpu_metadata("worker-network-endpoints").split(",")) * int(slices[1] if slices else 1) > 1


def _tpu_metadata(key: str) -> str:
    request = urllib.request.Request(TPU_METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode()
    except OSError as error:
        raise ValueError(
            f"the TPU's metadata {TPU_METADATA}{key} must be readable, to know how many workers there are: {error}; "
            "for a single worker set TPU_SKIP_MDS_QUERY=1"
        ) from error


def is_first() -> bool:
    """Returns whether this is the process that writes what only one should."""
    return distributed.global_state.process_id == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has called this with this name, each name once in a run."""
    if jax.distributed.is_initialized():
        distributed.global_state.client.wait_at_barrier(f"dit_jax/{name}", BARRIER_SECONDS * 1000)


def end_all(code: int, message: str, report: str) -> None:
    """Prints the report and ends all processes of the run, because this one failed; returns where it is the only one.

    The others print the message. They may wait for this one in a collective, for ever; nothing but this ends them.
    """
    if not jax.distributed.is_initialized():
        return
    if _ending.is_set():  # another process failed, and this error only follows: the thread that knows exits soon
        threading.Event().wait()
    _ending.set()
    print(report, file=sys.stderr, flush=True)
    state = distributed.global_state
    with contextlib.suppress(RuntimeError):  # another process failed first, or the first one is gone
        state.client.key_value_set(ERROR, f"{code} process {state.process_id}: {' '.join(message.split())}")
    leave(code)


def _end_with_others() -> None:
    """Watches, in a thread, whether another process has failed; ends this one with its message and code."""
    while not _ending.wait(POLL_SECONDS):
        client = distributed.global_state.client
        if client is None:  # the run is over
            return
        try:
            code, message = client.key_value_try_get(ERROR).split(" ", 1)
        except RuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service is gone, and JAX ends this process
        if not _ending.is_set():
            _ending.set()
            print(f"dit-jax: error: {message}", file=sys.stderr, flush=True)
            leave(int(code))


def leave(code: int) -> None:
    """Exits as soon as all processes want to, or some seconds later: JAX's shutdown would wait for those that hang."""
    try:
        distributed.global_state.client.wait_at_barrier(ERROR, FAREWELL_SECONDS * 1000)
    except RuntimeError:  # not all of them live to hear of it: an error of a collective came from that
        code = LOST if code == UNEXPECTED else code
    if is_first():
        time.sleep(POLL_SECONDS)  # the service lives here: let the others hear that all have arrived
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
