"""`dit-jax sample`: what is killed goes on, and ends in the same bytes; other settings never mix in."""

import json

import numpy as np
import pytest
from PIL import Image

from dit_jax.cli.main import main
from dit_jax.evaluation.drawing import check_output, write_record
from dit_jax.evaluation.parts import Parts
from tests.cli.killed_sampling import count_parts, digest, kill_half_way, make_workdir, sample_flags
from tests.cli.test_main import fail

NUM_SAMPLES = 2000


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def drawn(workdir, tmp_path_factory):
    """What 8 devices draw at once."""
    output = tmp_path_factory.mktemp("drawn")
    main(sample_flags(workdir, output, NUM_SAMPLES))
    return output


def test_a_killed_drawing_goes_on_elsewhere_and_ends_in_the_same_bytes(workdir, drawn, tmp_path):
    kept = kill_half_way(workdir, tmp_path, NUM_SAMPLES, num_devices=1)
    assert NUM_SAMPLES // 16 <= kept < NUM_SAMPLES // 8 and not (tmp_path / "samples.npz").exists()
    main(sample_flags(workdir, tmp_path, NUM_SAMPLES))
    assert digest(tmp_path) == digest(drawn)
    assert (tmp_path / "grid.png").read_bytes() == (drawn / "grid.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".parts.lock", "grid.png", "samples.json", "samples.npz",
    ]  # fmt: skip


def test_the_files_hold_what_was_asked_for(drawn):
    with np.load(drawn / "samples.npz") as file:
        assert set(file) == {"arr_0", "labels"}
        assert file["arr_0"].shape == (NUM_SAMPLES, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_0"].std() > 1
        np.testing.assert_array_equal(file["labels"], np.arange(NUM_SAMPLES) % 3)
    assert Image.open(drawn / "grid.png").width > 8
    record = json.loads((drawn / "samples.json").read_text())
    assert record["sha256"] == digest(drawn) and record["sampling"]["num_steps"] == 2


def test_a_finished_drawing_is_not_drawn_again_unless_damaged(workdir, drawn, capsys):
    main(sample_flags(workdir, drawn, NUM_SAMPLES))
    assert "drawn before" in capsys.readouterr().out
    before = digest(drawn)
    content = bytearray((drawn / "samples.npz").read_bytes())
    content[500] ^= 1
    (drawn / "samples.npz").write_bytes(content)
    main(sample_flags(workdir, drawn, NUM_SAMPLES))
    assert "drawn before" not in capsys.readouterr().out
    assert digest(drawn) == before


def test_other_settings_in_the_same_folder_start_anew(workdir, tmp_path, capsys):
    """Of the parts of seed 0, one of them damaged, none is in the images of seed 1; those of seed 0 are kept."""
    from dit_jax.evaluation import drawing

    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(drawing, "write_samples", killed)
        main(sample_flags(workdir, tmp_path, 20))
    assert count_parts(tmp_path) == 0  # nothing is drawn before it is asked for
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(drawing, "write_samples", lambda path, batches, *_: (next(batches), killed()))
        main(sample_flags(workdir, tmp_path, 20))
    assert count_parts(tmp_path) == 3
    part = next(tmp_path.glob(".parts-*/000001"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    main([*sample_flags(workdir, tmp_path, 20), "--seed=1"])
    assert "unfinished" in capsys.readouterr().out and count_parts(tmp_path) == 3
    other = np.load(tmp_path / "samples.npz")["arr_0"]
    assert "seed: 1 -> 0" in fail(capsys, *sample_flags(workdir, tmp_path, 20))
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], other)
    main([*sample_flags(workdir, tmp_path, 20), "--overwrite"])
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert count_parts(tmp_path) == 0
    assert all((a != b).any() for a, b in zip(images, other, strict=True))
    main([*sample_flags(workdir, tmp_path / "whole", 20)])
    assert digest(tmp_path) == digest(tmp_path / "whole")  # the damaged part was drawn again


def test_a_finished_drawing_of_other_settings_is_not_lost_in_silence(workdir, drawn, capsys):
    """Nor is another picture of the way, nor images of which nothing says how they were drawn."""
    before = digest(drawn)
    error = fail(capsys, *sample_flags(workdir, drawn, NUM_SAMPLES), "--seed=1", "--eta=1")
    assert "sampling.eta: 0.0 -> 1.0; seed: 0 -> 1" in error and "--output=DIR" in error and "--overwrite" in error
    assert digest(drawn) == before and not list(drawn.glob(".parts-*"))


def test_a_drawing_of_unknown_settings_and_another_picture_of_the_way_are_not_lost_in_silence(tmp_path):
    identity = {"seed": 0, "conditions": {"label": "ab" * 32}}
    (tmp_path / "samples.npz").write_bytes(b"of another program")
    with pytest.raises(ValueError, match="no samples.json that says how it was drawn"):
        check_output(tmp_path, identity, 0, overwrite=False)
    Parts(tmp_path, identity).path.mkdir()  # a drawing that was killed before its record was written
    check_output(tmp_path, identity, 0, overwrite=False)
    write_record(tmp_path, identity, num_frames=4)
    for num_frames in (0, 4):
        check_output(tmp_path, identity, num_frames, overwrite=False)
    with pytest.raises(ValueError, match="num_frames: 4 -> 8"):
        check_output(tmp_path, identity, 8, overwrite=False)
    (tmp_path / "png").mkdir()
    for name in ("png/000019.png", "png/note.png", "denoising.png"):
        (tmp_path / name).touch()
    check_output(tmp_path, identity | {"seed": 1}, 0, overwrite=True)
    assert {path.name for path in tmp_path.rglob("*.png")} == {"note.png"}  # of the old drawing nothing is mixed in


def test_pictures_on_request_are_numbered_files_that_a_rerun_leaves_or_mends(workdir, tmp_path):
    flags = [*sample_flags(workdir, tmp_path, 20), "--png"]
    main(flags)
    pictures = sorted((tmp_path / "png").iterdir())
    assert [path.name for path in pictures] == [f"{i:06d}.png" for i in range(20)]
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pictures]), images)
    contents, times = [path.read_bytes() for path in pictures], [path.stat().st_mtime_ns for path in pictures]
    pictures[3].unlink()
    pictures[7].write_bytes(b"half")
    main(flags)
    assert [path.read_bytes() for path in pictures] == contents
    assert [i for i, path in enumerate(pictures) if path.stat().st_mtime_ns != times[i]] == [3, 7]


def test_a_folder_that_another_process_writes_to_is_an_error(workdir, tmp_path, capsys):
    with Parts(tmp_path, {"other": 1}), pytest.raises(SystemExit) as exit_info:
        main(sample_flags(workdir, tmp_path, 20))
    assert exit_info.value.code == 2
    assert "another process writes to" in capsys.readouterr().err
