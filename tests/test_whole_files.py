"""Files are written as a whole or not at all, and a sealed record tells of any change in it."""

import errno
import json
import os
import re
import socket
import subprocess
import sys

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


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("write: No space left on device")]
)
def test_a_write_that_fails_in_a_library_names_the_path_and_leaves_nothing(error, tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/a.bin'"),
        files.written_whole(tmp_path / "a.bin") as t,
    ):
        t.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="source.bin"), files.written_whole(tmp_path / "a.bin"):
        (tmp_path / "source.bin").read_bytes()


def test_what_a_killed_process_left_of_a_write_goes_when_another_writes_there(tmp_path):
    script = f"import os\nfrom dit_jax.files import written_whole\nwith written_whole({str(tmp_path / 'a')!r}) as t:\n"
    script += "  t.write_text('half')\n  os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert len(os.listdir(tmp_path)) == 1
    files.write_text_whole(tmp_path / "b", "whole")
    assert os.listdir(tmp_path) == ["b"]


def test_a_second_start_is_told_the_first_ones_host_process_and_start(tmp_path):
    path = tmp_path / ".lock"
    with files.only_one(path, "RUN is being trained"):
        who = (
            rf"^RUN is being trained: process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-.*; wait"
        )
        with pytest.raises(ValueError, match=who), files.only_one(path, "RUN is being trained"):
            pass
    with files.only_one(path, "RUN is being trained"):
        pass


def test_nothing_has_to_be_removed_after_a_kill(tmp_path):
    script = "import os, pathlib\nfrom dit_jax.files import only_one\n"
    script += f"with only_one(pathlib.Path({str(tmp_path)!r}) / 'l', ''):\n  os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert json.loads((tmp_path / "l").read_text())["process"] != os.getpid()  # it was held
    with files.only_one(tmp_path / "l", ""):
        assert json.loads((tmp_path / "l").read_text())["process"] == os.getpid()


def test_a_disk_without_locks_costs_a_line(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.only_one(tmp_path / ".lock", "RUN is being trained"):
        pass
    assert "a second start is not noticed" in capsys.readouterr().err


LINES = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_every_flipped_bit_of_a_log_is_read_or_set_aside(tmp_path):
    def check(row):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError
        return row

    path, aside = tmp_path / "a.jsonl", tmp_path / "a.jsonl.damaged"
    for bit in range(8 * len(LINES)):
        content = bytearray(LINES)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        aside.unlink(missing_ok=True)
        rows, damaged = files.read_records(path, check)
        told = []
        files.keep_lines(path, rows, damaged, told.append)
        assert bool(damaged) == aside.exists() == bool(told)
        assert files.read_records(path, check) == (rows, []) and path.read_bytes().endswith(b"\n")
        if bit // 8 < len(LINES) - 1:  # else the last line has no end
            lost = content.count(b"\n") - len(rows)
            assert lost == len(damaged) == (aside.read_bytes().count(b"\n") if damaged else 0)
