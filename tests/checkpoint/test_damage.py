"""A damaged checkpoint is found, named and not used."""

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dit_jax.checkpoint import Checkpoints, DamagedCheckpoint, find_checkpoint, read_newest_good
from dit_jax.checkpoint import store as store_module
from dit_jax.checkpoint.manifest import Manifest, list_files, read_manifest, sum_file
from tests.checkpoint.test_older_layouts import remove_manifest
from tests.checkpoint.trees import CONFIG, abstract_on, assert_same_items, make_items, one_device, save_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    assert save_steps(workdir, [1, 2]) == []
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir, items=("params", "opt_state")):
    """Returns (step, items, log) of the newest good checkpoint."""
    lines: list[str] = []
    abstract = abstract_on(one_device(), make_items(1))
    step, found = Checkpoints(workdir, log=lines.append).restore_newest_good({name: abstract[name] for name in items})
    return step, found, lines


def flip_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def bulk_file(folder: pathlib.Path, item: str = "params") -> pathlib.Path:
    """Returns the largest file of an item: the arrays' bytes."""
    return max((path for path in (folder / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def accept(folder: pathlib.Path, **fields) -> None:
    """Rewrites a manifest so that the files are those it expects, and other fields are as given."""
    manifest = read_manifest(folder)
    values = vars(manifest) | {"files": {name: sum_file(folder / name) for name in list_files(folder)}} | fields
    Manifest(**values).write(folder)


def test_an_intact_checkpoint_is_restored_without_a_word(workdir):
    step, found, lines = restore(workdir)
    assert step == 2 and lines == []
    assert_same_items(found, make_items(2))
    assert find_checkpoint(workdir) == (2, CONFIG)
    assert Checkpoints(workdir).metrics(2) == {"loss": 0.5}


@pytest.mark.parametrize("damage", [flip_bit, cut, pathlib.Path.unlink])
def test_any_file_that_changes_is_named_and_the_older_checkpoint_is_used(workdir, damage):
    folder, abstract = workdir / "checkpoints" / "2", abstract_on(one_device(), make_items(1))
    for name in (*list_files(folder), "manifest/metadata"):
        content = (folder / name).read_bytes()
        if not content and damage is not pathlib.Path.unlink:
            continue
        damage(folder / name)
        with pytest.raises(DamagedCheckpoint, match="step 2 in .* is damaged") as caught:
            Checkpoints(workdir).restore(2, abstract)
        assert name in str(caught.value)
        (folder / name).write_bytes(content)
    flip_bit(bulk_file(folder))
    step, found, lines = restore(workdir)
    assert step == 1 and len(lines) == 1 and "the checkpoint of step 1 is used instead" in lines[0]
    assert_same_items(found, make_items(1))


def test_a_file_that_is_not_the_checkpoints_own_is_named(workdir):
    (workdir / "checkpoints" / "2" / "params" / "d" / "stray").write_text("x")
    step, _, lines = restore(workdir)
    assert step == 1 and "params/d/stray is no file of this checkpoint" in lines[0]


def test_arrays_are_compared_even_where_all_files_pass(workdir):
    """Such as values that a faulty machine wrote, or another version of a library reads otherwise."""
    first, second = (workdir / "checkpoints" / name for name in "12")
    arrays = json.loads(json.dumps(read_manifest(second).arrays))
    arrays["opt_state"]["0/mu/layer/kernel"] = read_manifest(first).arrays["opt_state"]["0/mu/layer/kernel"]
    accept(second, arrays=arrays)
    step, _, lines = restore(workdir)
    assert step == 1 and "the content of opt_state/0/mu/layer/kernel is not what was saved" in lines[0]
    assert restore(workdir, ["params"])[0] == 2  # what is asked for is intact
    with pytest.raises(DamagedCheckpoint, match="opt_state/0/mu/layer/kernel"):
        Checkpoints(workdir).verify(2)
    Checkpoints(workdir).verify(1)


def test_a_checkpoint_in_the_place_of_another_is_found(workdir):
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "2")
    step, _, lines = restore(workdir)
    assert step == 1 and "it is a checkpoint of step 1" in lines[0]


def test_the_error_tells_of_all_where_none_is_intact(workdir):
    for step, item in ((1, "opt_state"), (2, "params")):
        bulk_file(workdir / "checkpoints" / str(step), item).unlink()
    with pytest.raises(ValueError, match="has no intact checkpoint: .*step 2 .*params/.*step 1 .*opt_state/") as caught:
        restore(workdir)
    assert not isinstance(caught.value, DamagedCheckpoint) and "\n" not in str(caught.value)


def test_a_run_without_checkpoints_has_none_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore_newest_good({"params": {}}) is None


def test_the_newest_before_a_step_can_be_asked_for(workdir):
    abstract = abstract_on(one_device(), make_items(1))
    step, found = Checkpoints(workdir).restore_newest_good(abstract, before=2)
    assert step == 1
    assert_same_items(found, make_items(1))
    assert Checkpoints(workdir).restore_newest_good(abstract, before=1) is None


def test_trees_of_another_network_are_no_damage(workdir):
    abstract = abstract_on(one_device(), make_items(1))
    wrong = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype, sharding=x.sharding), abstract)
    for tree, message in ((wrong, r"0/count is int32\[\], not int32\[2\]"), ({"params": {}}, "not there")):
        with pytest.raises(ValueError, match=f"is of another network: .*{message}") as caught:
            Checkpoints(workdir).restore_newest_good(tree)
        assert not isinstance(caught.value, DamagedCheckpoint)


def test_reading_a_workdir_falls_back_too(workdir, capsys):
    flip_bit(workdir / "checkpoints" / "2" / "config" / "metadata")
    assert find_checkpoint(workdir)[0] == 1
    assert "step 2" in (error := capsys.readouterr().err) and "config/metadata" in error and "instead" in error
    with pytest.raises(DamagedCheckpoint, match="config/metadata"):
        find_checkpoint(workdir, 2)
    assert read_newest_good(workdir, Checkpoints(workdir).restore_config)[0] == 1


def test_weights_that_are_damaged_are_found_before_a_step_is_chosen(workdir, capsys):
    flip_bit(bulk_file(workdir / "checkpoints" / "2"))
    assert find_checkpoint(workdir)[0] == 1
    assert "params/" in capsys.readouterr().err
    assert find_checkpoint(workdir, 2)[0] == 2  # which alone says nothing of the weights


def test_a_damaged_checkpoint_of_an_older_version_is_not_used(workdir):
    folder = workdir / "checkpoints" / "2"
    remove_manifest(folder)
    step, _, lines = restore(workdir)
    assert step == 2 and len(lines) == 1 and "cannot be verified" in lines[0]
    (folder / "params" / "manifest.ocdbt").unlink()
    step, _, lines = restore(workdir)
    assert step == 1 and "step 2" in lines[-1] and "is used instead" in lines[-1]


def test_orbax_itself_reads_our_checkpoints(workdir):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        assert manager.latest_step() == 2
        restored = manager.restore(
            2, args=ocp.args.Composite(params=ocp.args.StandardRestore(), config=ocp.args.JsonRestore())
        )
    assert restored["config"]["stage"] == "diffusion"
    assert_same_items(restored["params"], make_items(2)["params"])


def test_what_cannot_be_read_back_replaces_nothing(tmp_path, monkeypatch):
    """The storage loses a byte while a save is under way: the checkpoints before stay, and the error is told."""
    save_steps(tmp_path, [1])
    rename = store_module.os.rename

    def lose_a_byte(source, target):
        rename(source, target)
        if str(target).endswith("/2"):
            flip_bit(bulk_file(pathlib.Path(target)))

    monkeypatch.setattr(store_module.os, "rename", lose_a_byte)
    checkpoints = Checkpoints(tmp_path, max_to_keep=1, log=(lines := []).append)
    items = jax.tree.map(np.asarray, make_items(2))
    checkpoints.save(2, items, CONFIG)
    with pytest.raises(ValueError, match="step 2 cannot be read back: params/.*; older checkpoints stay"):
        checkpoints.wait()
    assert len(lines) == 1 and checkpoints.all_steps() == [1, 2]
    assert restore(tmp_path)[0] == 1
    checkpoints.save(3, make_items(3), CONFIG)  # verified: takes the place of both
    checkpoints.wait()
    assert checkpoints.all_steps() == [3]
