import json

import pytest

from dit_jax.metrics import history


def write_run(workdir, steps):
    history.resume_metrics(workdir, 0)
    for step in steps:
        history.append_metrics(workdir, step, "train", step / 10, {"loss": 1 / step})


def test_lines_come_back_as_they_were_written(tmp_path):
    write_run(tmp_path, [10])
    history.append_metrics(tmp_path, 10, "eval", 1.25, {"loss": 0.5, "psnr": 20})
    assert history.read_metrics(tmp_path) == [
        {"step": 10, "split": "train", "seconds": 1.0, "loss": 0.1},
        {"step": 10, "split": "eval", "seconds": 1.25, "loss": 0.5, "psnr": 20.0},
    ]


def test_resuming_drops_what_was_written_after_the_checkpoint(tmp_path):
    write_run(tmp_path, [10, 20, 30])
    assert history.resume_metrics(tmp_path, 20) == 2.0
    assert [row["step"] for row in history.read_metrics(tmp_path)] == [10, 20]


@pytest.mark.parametrize("torn", ['{"step": 30, "spl', '{"step": 30, "split": "train", "seconds": 3.0}', "\x00\x00"])
def test_the_unfinished_line_of_a_killed_run_is_left_out(tmp_path, torn):
    write_run(tmp_path, [10, 20])
    with history.metrics_path(tmp_path).open("a") as file:
        file.write(torn)
    assert [row["step"] for row in history.read_metrics(tmp_path)] == [10, 20]
    history.resume_metrics(tmp_path, 1000)
    history.append_metrics(tmp_path, 30, "train", 3.0, {"loss": 1.0})
    assert [row["step"] for row in history.read_metrics(tmp_path)] == [10, 20, 30]


def test_a_broken_line_before_the_last_is_named(tmp_path):
    write_run(tmp_path, [10])
    path = history.metrics_path(tmp_path)
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        history.read_metrics(tmp_path)


@pytest.mark.parametrize("byte", [b"\xff", b"{", b"\n"])
def test_a_damaged_line_is_set_aside_with_a_word_and_blocks_no_resume(byte, tmp_path):
    write_run(tmp_path, [10, 20, 30])
    path, told = history.metrics_path(tmp_path), []
    content = path.read_bytes()
    content = content[:5] + byte + content[6:]
    path.write_bytes(content)
    assert history.resume_metrics(tmp_path, 30, told.append) == 3.0
    assert [row["step"] for row in history.read_metrics(tmp_path)] == [20, 30]
    assert len(told) == 1 and "set aside in metrics.jsonl.damaged" in told[0]
    aside = path.with_name("metrics.jsonl.damaged").read_bytes()
    assert content.startswith(aside) and aside.count(b"\n") == 1 + (byte == b"\n")


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match="must be the --workdir"):
        history.read_metrics(tmp_path)


def test_values_that_are_not_finite_survive(tmp_path):
    history.resume_metrics(tmp_path, 0)
    history.append_metrics(tmp_path, 1, "train", 0.0, {"loss": float("inf")})
    assert history.read_metrics(tmp_path)[0]["loss"] == float("inf")
    assert json.loads(history.metrics_path(tmp_path).read_text())["step"] == 1
