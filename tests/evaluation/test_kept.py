"""What evaluation keeps: damaged, or of something else, it is told and made again; never used, never a traceback."""

import numpy as np
import pytest

from dit_jax.evaluation.kept import kept_file, kept_weights, read_arrays, write_arrays

PARAMS = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}
ARRAYS = {"mu": np.arange(5.0), "sigma": np.eye(5), "num_images": np.array(7)}
KEY = {"data": {"version": "content-1"}, "seed": 0}


def damaged(content):
    """Yields files that are truncated, or of which one bit is another."""
    yield from (content[: len(content) * part // 8] for part in range(8))
    for place in range(0, len(content), 9):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        yield bytes(changed)


def test_damaged_weights_are_told_and_made_again(tmp_path, capsys):
    path, made = kept_file(tmp_path, "classifier", KEY, ".safetensors"), []

    def make():
        made.append(1)
        return PARAMS, {"accuracy": 0.5}

    def check():
        params, facts = kept_weights(path, KEY, make)
        assert facts == {"accuracy": 0.5}
        for name, array in PARAMS["a"].items():
            np.testing.assert_array_equal(params["a"][name], array)

    check()
    check()
    whole = path.read_bytes()
    assert len(made) == 1 and not capsys.readouterr().err
    num_made = 0
    for content in damaged(whole):
        path.write_bytes(content)
        made.clear()
        check()
        said = capsys.readouterr().err
        assert said.count("\n") == len(made) and said.startswith(f"{path} is damaged and made again: "[: len(said)])
        num_made += len(made)
    assert num_made > 50 and path.read_bytes() == whole


def test_weights_of_something_else_are_made_again(tmp_path):
    path = tmp_path / "classifier-0.safetensors"
    kept_weights(path, KEY, lambda: (PARAMS, {}))
    other = {"a": {"kernel": np.zeros((2, 3), np.float32)}}
    assert kept_weights(path, KEY | {"seed": 1}, lambda: (other, {}))[0] is other


@pytest.mark.parametrize("change", ["none", "key", "no sum", "array"])
def test_arrays_are_read_as_they_were_written_or_not_at_all(tmp_path, capsys, change):
    path = kept_file(tmp_path / "cache", "reference", KEY, ".npz")
    assert read_arrays(path, KEY) is None
    write_arrays(path, KEY, ARRAYS)
    key = KEY | {"seed": 1} if change == "key" else KEY
    if change == "no sum":
        np.savez(path, **ARRAYS)
    if change == "array":
        with np.load(path) as file:
            np.savez(path, **dict(file) | {"mu": ARRAYS["mu"] + 1})
    found = read_arrays(path, key)
    assert (found is None) == (change != "none") == ("is damaged and made again" in capsys.readouterr().err)
    if found is not None:
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)


def test_a_damaged_file_of_arrays_is_never_read_as_other_arrays(tmp_path):
    path = tmp_path / "reference.npz"
    write_arrays(path, KEY, ARRAYS)
    refused = 0
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        found = read_arrays(path, KEY)
        refused += found is None
        for name, array in (found or {}).items():
            np.testing.assert_array_equal(array, ARRAYS[name])
    assert refused > 100
