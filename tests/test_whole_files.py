"""Files are written as a whole or not at all, and a sealed record tells of any change in it."""

import json
import os

import pytest

from dit_jax import files


def test_what_is_written_whole_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    files.write_text_whole(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.written_whole(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_disks_error_names_the_path():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"), files.written_whole("/dev/full"):
        raise OSError(28, "No space left on device")  # as writing to an open file raises it: without a path


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing/a.txt"):
        files.write_text_whole(tmp_path / "missing" / "a.txt", "text")


def test_every_changed_character_of_a_sealed_record_is_found():
    record = {"scale": 0.41, "names": ["a", "b"], "count": 12}
    text = json.dumps(files.sealed(record))
    assert files.check_seal(json.loads(text)) == record
    for i, character in enumerate(text):
        changed = text[:i] + chr(ord(character) ^ 1) + text[i + 1 :]
        try:
            value = json.loads(changed)
        except ValueError:
            continue
        with pytest.raises(ValueError, match="sum"):
            files.check_seal(value)
