"""Names that come from files never lead out of the folder that is written to."""

import pytest

from dit_jax.evaluation import report, sweep
from dit_jax.files import file_name

NAMES = ["../../evil", "/tmp/evil", "..", ".", "", "a/b", ".hidden", "a\0b", "x" * 300, "fd_classifier_5k"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_s_name_is_one_visible_file_of_the_folder(name, tmp_path):
    path = tmp_path / f"{file_name(name)}_by_cfg_scale.svg"
    path.touch()
    assert path.parent == tmp_path and not path.name.startswith(".")
    assert file_name("fd_classifier_5k") == "fd_classifier_5k"


def test_charts_of_odd_metrics_are_written_to_the_folder(tmp_path):
    rows = [{"step": step, "split": "eval", "seconds": 1.0, "../../evil": float(step)} for step in (1, 2)]
    run = report.Run("run", {}, rows, {}, None)
    report.write_charts([run], tmp_path / "a" / "charts")
    features = {"name": "classifier", "distance": "FD"}
    card = {"protocol": {"features": features, "samples": {"num_samples": 3}}, "values": {"../../evil": 1.0}}
    points = [{"steps": 1}, {"steps": 2}]
    sweep.write_charts(points, [card, card], tmp_path / "a" / "charts")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"a/charts/_.._evil.svg", "a/charts/_.._evil_by_steps.svg"}
