"""`dit-jax sample`: what is killed goes on, and ends in the same bytes; other settings never mix in."""

import json

import numpy as np
import pytest
from PIL import Image

from dit_jax.cli.main import main
from tests.cli.killed_sampling import count_parts, digest, kill_half_way, make_workdir, sample_flags

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
    main(sample_flags(workdir, tmp_path, 20))
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert count_parts(tmp_path) == 0
    assert all((a != b).any() for a, b in zip(images, other, strict=True))
    main([*sample_flags(workdir, tmp_path / "whole", 20)])
    assert digest(tmp_path) == digest(tmp_path / "whole")  # the damaged part was drawn again


def test_a_folder_that_another_process_writes_to_is_an_error(workdir, tmp_path, capsys):
    from dit_jax.evaluation.parts import Parts

    with Parts(tmp_path, {"other": 1}), pytest.raises(SystemExit) as exit_info:
        main(sample_flags(workdir, tmp_path, 20))
    assert exit_info.value.code == 2
    assert "another process writes to" in capsys.readouterr().err
