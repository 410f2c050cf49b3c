import argparse
import json
import re
import shutil
import xml.etree.ElementTree

import numpy as np
import PIL.Image
import pytest

from dit_jax.cli import report as cli
from dit_jax.cli.evaluate import compare
from dit_jax.evaluation.chart import _ticks, line_chart, standalone
from dit_jax.evaluation.report import figure_lines, write_report
from dit_jax.metrics import history


def make_workdir(workdir, name="samples"):
    (workdir / "samples").mkdir(parents=True)
    config = {"stage": "autoencoder", "data": {"name": "<b>toys</b>", "image_size": 28}, "dit": None}
    (workdir / "config.json").write_text(json.dumps(config))
    history.resume_metrics(workdir, 0)
    for step in (10, 20, 30):
        values = {"loss": 10.0 / step, "steps_per_second": step / 10}
        history.append_metrics(workdir, step, "train", 2.5 * step, values)
    history.append_metrics(workdir, 30, "eval", 80.0, {"loss": 0.5, "psnr": 21.5})
    for step in (10, 20, 30):
        PIL.Image.fromarray(np.full((4, 5, 3), step, np.uint8)).save(workdir / "samples" / f"{name}_{step:07d}.png")
    return workdir


def make_samples(directory):
    directory.mkdir()
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(directory / "grid.png")
    return directory


def test_figures_are_the_last_of_each_metric(tmp_path):
    figures = write_report([make_workdir(tmp_path / "a")], None, tmp_path / "report.html")
    assert figures == {
        "a": {
            "stage": "autoencoder",
            "steps": 30,
            "seconds": 80.0,
            "steps_per_second": 2.0,
            "train_loss": pytest.approx(1 / 3),
            "eval_loss": 0.5,
            "eval_psnr": 21.5,
        }
    }


def test_the_page_holds_everything_itself(tmp_path):
    workdirs = [make_workdir(tmp_path / "a"), make_workdir(tmp_path / "b", name="reconstructions")]
    output = tmp_path / "pages" / "report.html"
    write_report(workdirs, make_samples(tmp_path / "drawn"), output)
    page = output.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:") for source in sources) and "http" not in page and "url(" not in page
    assert page.count("<img") == 1 + 2 * 2  # the grid; the first and the last picture of each run
    assert page.count("<svg") == 2 * 3 + 2  # loss, PSNR and speed of each run; held-out loss and PSNR of both together
    assert "reconstructions, step 30" in page and "reconstructions, step 20" not in page
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_text_of_users_is_escaped(tmp_path):
    write_report([make_workdir(tmp_path / "<i>run", name="<u>s")], None, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search("<(i|u|b)>", page)
    assert "&lt;i&gt;run" in page and "&lt;u&gt;s" in page and "&lt;b&gt;toys" in page


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    workdirs = [make_workdir(tmp_path / "a" / "run"), make_workdir(tmp_path / "b" / "run")]
    assert list(write_report(workdirs, None, tmp_path / "report.html")) == [str(workdir) for workdir in workdirs]


def test_what_is_missing_is_named(tmp_path):
    output = tmp_path / "report.html"
    with pytest.raises(ValueError, match=r"is not a workdir \(it has no config.json\)"):
        write_report([tmp_path], None, output)
    workdir = make_workdir(tmp_path / "a")
    with pytest.raises(ValueError, match=r"grid\.png does not exist"):
        write_report([workdir], tmp_path, output)
    history.resume_metrics(workdir, 0)
    with pytest.raises(ValueError, match="has no metrics yet"):
        write_report([workdir], None, output)
    history.metrics_path(workdir).unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        write_report([workdir], None, output)
    assert not output.exists()


def test_chart_leaves_out_what_is_not_finite():
    assert line_chart({"training": [(1, float("nan"))], "held-out": []}) == ""
    chart = line_chart({"training": [(1, 1.0), (2, float("nan")), (3, 3.0)]})
    (points,) = re.findall(r'points="([^"]*)"', chart)
    assert len(points.split()) == 2 and "nan" not in chart


@pytest.mark.parametrize("points", [[(0, 0.0)], [(5, 2.0), (6, 2.0)], [(0, 1e-6), (9, 1e6)], [(0, -1.0), (1, 1.0)]])
def test_chart_keeps_its_points_inside(points):
    (line,) = re.findall(r'points="([^"]*)"', line_chart({"training": points}))
    for point in line.split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 460 and 0 <= y <= 250


def test_long_series_are_thinned():
    (line,) = re.findall(r'points="([^"]*)"', line_chart({"training": [(x, float(x)) for x in range(1, 10_000)]}))
    assert len(line.split()) == 400


def test_ticks_are_round():
    assert _ticks(0, 1200) == [0, 500, 1000]
    np.testing.assert_allclose(_ticks(0.13, 0.88), [0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("as_json", [False, True])
def test_the_verb_prints_the_figures(tmp_path, capsys, as_json):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = [f"--workdir={make_workdir(tmp_path / 'a')}", f"--output={tmp_path / 'report.html'}"]
    cli.run(parser.parse_args(arguments + ["--json"] * as_json))
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["a"]["eval_psnr"] == 21.5
    else:
        assert re.search(r"^a +held-out PSNR \(dB\) +21\.5$", out, re.MULTILINE)
        assert re.search(r"^a +time in training \(evaluation included\) +1 min 20 s$", out, re.MULTILINE)
    assert (tmp_path / "report.html").exists()


def test_charts_of_several_runs_are_svg_files_with_their_names(tmp_path):
    workdirs = [make_workdir(tmp_path / "a"), make_workdir(tmp_path / "b")]
    write_report(workdirs, None, tmp_path / "report.html", tmp_path / "charts")
    assert sorted(path.name for path in (tmp_path / "charts").iterdir()) == ["loss.svg", "psnr.svg"]
    root = xml.etree.ElementTree.parse(tmp_path / "charts" / "psnr.svg").getroot()
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"PSNR (dB)", "a", "b"} <= set(texts)
    assert sum(element.tag.endswith("polyline") for element in root.iter()) == 2


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_names_of_a_charts_lines_stand_within_it_and_apart(count):
    chart = line_chart({f"cross_attention_{i}": [(0, 1.0), (9, 2.0)] for i in range(count)})
    svg = standalone(chart, "MSE", ["#000"] * count)
    width, height = (int(re.search(rf'{side}="(\d+)"', svg)[1]) for side in ("width", "height"))
    marks = [tuple(map(int, place)) for place in re.findall(r'<rect x="(-?\d+)" y="(\d+)"', svg)]
    header = int(re.search(r"translate\(0 (\d+)\)", svg)[1])
    assert len(set(marks)) == count and all(0 <= x < width - 80 and y < header for x, y in marks)
    assert height - header == int(re.search(r'viewBox="0 0 \d+ (\d+)"', chart)[1])


CARD = {
    "values": {"fd": 3.5, "recognised": 0.5},
    "notes": ["a note"],
    "left_out": {"kid": "it needs images"},
    "subject": {"gflops": 1.5, "training_gflops": 9.0, "parameters": 7, "step": 30},
    "protocol": {"features": {"name": "a", "distance": "FD-a"}, "samples": {"num_samples": 500}},
}
ODD = (10**400, float("inf"), float("nan"), -1, 0, 1e308, -1e-320, 2**60, None, True, [1], {}, "\ud800", "a/../b", "")


def places(value, path=()):
    """Yields the path of every value within JSON values."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def odd_copies(value):
    """Yields copies of JSON values, each with one odd value, one missing or one key of an odd name."""
    for path in list(places(value)):
        for odd in (*ODD, KeyError, "key"):
            copy = json.loads(json.dumps({"": value}))
            parent, key = copy, ""
            for step in path:
                parent, key = parent[key], step
            if odd is KeyError:
                del parent[key]
            elif odd == "key" and isinstance(parent, dict) and path:
                parent["../x\ud800"] = parent.pop(key)
            else:
                parent[key] = odd
            yield copy.get("")


@pytest.mark.parametrize("file", ["config.json", "evaluation/evaluation.json", "metrics/metrics.jsonl"])
def test_odd_values_in_a_workdir_are_told_in_one_line_or_shown(tmp_path, file, monkeypatch):
    monkeypatch.setattr("dit_jax.evaluation.report._versions", lambda: [])
    workdirs = [make_workdir(tmp_path / "a"), make_workdir(tmp_path / "b")]
    for workdir in workdirs:
        shutil.rmtree(workdir / "samples")
        (workdir / "evaluation").mkdir()
        (workdir / "evaluation" / "evaluation.json").write_text(json.dumps(CARD))
    path, told = workdirs[0] / file, 0
    values = json.loads(path.read_text().splitlines()[-1] if file.endswith("l") else path.read_text())
    for odd in odd_copies(values):
        path.write_text(json.dumps(odd) + "\n")
        try:
            figures = write_report(workdirs, None, tmp_path / "out" / "report.html", tmp_path / "out" / "charts")
            assert all(len(line) == 3 for line in figure_lines(figures))
            compare(workdirs[0] / "evaluation/evaluation.json", workdirs[1] / "evaluation/evaluation.json", [], True)
        except ValueError as error:
            assert str(tmp_path) in str(error) or "result of a" in str(error) or "results of a" in str(error), error
            told += 1
    assert told > 20
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "out"}
