"""One of several processes that save and restore together; `test_meshes.py` starts them and reads what they print.

As `python -m tests.checkpoint.process WORKDIR`, with the variables of `parallel.distributed`; WORKDIR has the
checkpoints of steps 1 and 2.
"""

import errno
import sys

import jax
import numpy as np

from dit_jax.checkpoint import Checkpoints, DamagedCheckpoint, arrays, store
from dit_jax.config import MeshConfig
from dit_jax.parallel.distributed import start_processes
from dit_jax.parallel.mesh import make_mesh
from tests.checkpoint.trees import CONFIG, abstract_on, make_items, shardings_on


def put(items: dict, mesh: jax.sharding.Mesh) -> dict:
    """Returns the items on the mesh, from each process its shards."""
    place = lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda index: np.asarray(x)[index])  # noqa: E731
    return jax.tree.map(place, items, shardings_on(mesh, items))


def assert_shards(found: dict, step: int, abstract: dict) -> None:
    """Asserts that this process's shards are where the mesh wants them, with the bits that were saved."""
    expected = make_items(step)
    for array, wanted, whole in zip(*map(jax.tree.leaves, (found, abstract, expected)), strict=True):
        assert array.sharding == wanted.sharding and len(array.addressable_shards) == 2
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(whole)[shard.index].tobytes()


def main(workdir: str) -> None:
    """Restores, restores where one process finds damage, saves where one's storage fails, saves, and restores that."""
    start_processes()
    process, mesh = jax.process_index(), make_mesh(MeshConfig(data=2, fsdp=4))
    abstract = abstract_on(mesh, make_items(1))
    lines: list[str] = []
    checkpoints = Checkpoints(workdir, max_to_keep=1, log=lines.append)

    step, found = checkpoints.restore_newest_good(abstract)
    assert step == 2 and not lines
    assert_shards(found, 2, abstract)
    kernel = found["params"]["layer"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(4, 24)] * 2  # of (16, 24)

    check = store.check_files

    def find_damage(folder, *others):
        if process == 2 and folder.name == "2":
            raise DamagedCheckpoint("a bit has flipped")
        check(folder, *others)

    store.check_files = find_damage
    step, found = checkpoints.restore_newest_good(abstract)
    assert step == 1 and len(lines) == 1 and "process 2: a bit has flipped" in lines.pop()
    assert_shards(found, 1, abstract)
    store.check_files = check

    write = arrays.start_write

    def fill_disk(folder, tree):
        if process == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, tree)

    arrays.start_write = fill_disk
    checkpoints.save(3, put(make_items(3), mesh), CONFIG)
    try:
        checkpoints.wait()
    except ValueError as error:
        assert "step 3 could not be saved" in str(error) and "process 1: [Errno 28]" in str(error)
    else:
        raise AssertionError("the save must have failed on every process")
    assert len(lines) == 1 and lines.pop().startswith("error: the checkpoint of step 3")
    arrays.start_write = write

    checkpoints.save(4, put(make_items(4), mesh), CONFIG)
    checkpoints.wait()
    assert not lines, lines
    step, found = checkpoints.restore_newest_good(abstract)
    assert step == 4 and checkpoints.all_steps() == [4]  # verified, then the others deleted
    assert_shards(found, 4, abstract)
    print("all as expected", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
