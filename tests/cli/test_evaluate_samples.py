"""`evaluate` of a diffusion model and of samples: the figures, their card, the sweep, and what does not compare."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dit_jax.cli.main import main
from dit_jax.config import load_config
from dit_jax.data.sources import open_source
from dit_jax.evaluation.parts import Parts
from dit_jax.evaluation.protocol import refuse_other
from dit_jax.evaluation.trained_classifier import trained_classifier
from dit_jax.files import check_seal, sealed
from dit_jax.metrics.frechet import frechet_distance, statistics
from dit_jax.metrics.history import read_metrics
from tests.cli.test_main import fail, write_config
from tests.tiny import dit_config, make_image_folder

DRAW = ["--num_samples=40", "--steps=2", "--features=classifier"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A diffusion run of pixels, evaluated once."""
    root = tmp_path_factory.mktemp("evaluate")
    folder = make_image_folder(root / "images", num_images=40)
    config = write_config(
        root / "dit.py",
        dit_config(folder, num_train_steps=8, eval_every_steps=8, checkpoint_every_steps=8, ema_lengths=(0.05, 0.1)),
    )
    learning = (
        "--config.optimizer.learning_rate=0.03"  # a network that has hardly learnt heeds neither label nor guidance
    )
    main(["train", f"--config={config}", f"--workdir={root / 'dit'}", learning])
    evaluate(root, root / "first")
    return root


def evaluate(root, output, *flags) -> dict:
    main(["evaluate", f"--workdir={root / 'dit'}", f"--cache={root / 'cache'}", f"--output={output}", *DRAW, *flags])
    return read(output) if (output / "evaluation.json").exists() else {}


def read(output) -> dict:
    return json.loads((output / "evaluation.json").read_text())


def test_an_evaluation_that_was_killed_draws_the_rest_and_ends_in_the_same_bytes(root, monkeypatch):
    written = []

    def write(parts, number, array):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        original(parts, number, array)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        original = Parts.write
        patch.setattr(Parts, "write", write)
        evaluate(root, root / "killed")
    assert len(list((root / "killed").glob(".parts-*/0*"))) == 3
    written.append("the rest")
    monkeypatch.setattr(
        Parts, "write", lambda parts, number, array: (written.append(number), original(parts, number, array))
    )
    evaluate(root, root / "killed")
    assert sorted(written, key=str) == [0, 1, 2, 3, 4, "the rest"] and not list((root / "killed").glob(".parts-*/0*"))
    assert (root / "killed" / "evaluation.json").read_bytes() == (root / "first" / "evaluation.json").read_bytes()


def test_the_same_evaluation_twice_gives_the_same_bytes_and_the_card_says_how(root):
    evaluate(root, root / "second")
    first, second = ((root / name / "evaluation.json").read_bytes() for name in ("first", "second"))
    assert first == second
    card = json.loads(first)
    samples, reference = (card["protocol"][key] for key in ("samples", "reference"))
    assert samples["num_samples"] == 40 and samples["labels"] == "balanced" and samples["seed"] == 0
    assert samples["average"] == "decay_0.5" and samples["sampling"]["num_steps"] == 2
    assert samples["sampling"]["cfg_scale"] == 2.0 and "batch_size" not in samples["sampling"]
    assert "truncated" in samples["uint8"] and reference["num_images"] == 108 and len(reference["sha256"]) == 64
    assert card["protocol"]["features"]["name"] == "images-classifier"
    assert 0 < card["protocol"]["features"]["accuracy"] <= 1
    assert card["protocol"]["software"]["jax"] == jax.__version__
    assert len(card["subject"]["checkpoint"]) == 64 and card["subject"]["step"] == 8
    assert set(card["values"]) == {
        "fd_classifier_40",
        "is_classifier_40",
        "is_std_classifier_40",
        "precision_classifier_40",
        "recall_classifier_40",
        "recognised",
    }
    assert set(card["left_out"]) == {"sfid", "kid"} and "singular" in " ".join(card["notes"])


def test_the_figures_are_those_of_all_features_at_once(root):
    """By the classifier's own features of the images that the model draws, all in one call."""
    from dit_jax.evaluation.loaded import load

    model = load(root / "dit")
    labels = np.arange(40) % 3
    images = model.sample(labels, num_steps=2, seed=0)
    trained = trained_classifier(model.config.data, root / "cache")
    apply = lambda x: trained.module.apply({"params": trained.params}, x)  # noqa: E731
    real = np.stack([np.repeat(example["image"], 3, axis=-1) for example in open_source(model.config.data, "train")])
    ours, theirs = apply(images), apply(real)
    values = read(root / "first")["values"]
    distance = frechet_distance(*(statistics(np.asarray(x["pool"])) for x in (ours, theirs))).value
    assert values["fd_classifier_40"] == pytest.approx(distance, rel=1e-5)
    assert values["recognised"] == np.mean(ours["logits"].argmax(-1) == labels)


def test_what_changes_the_figures_changes_the_card(root, capsys):
    other = evaluate(root, root / "random", "--labels=random", "--cfg_scale=1", "--metrics=fd")
    first = read(root / "first")
    assert other["values"]["fd_classifier_40"] != first["values"]["fd_classifier_40"]
    files = [str(root / name / "evaluation.json") for name in ("first", "random")]
    error = fail(capsys, "evaluate", "--compare", *files)
    assert "samples.labels: balanced | random" in error and "samples.sampling.cfg_scale: 2.0 | 1.0" in error
    assert "samples.seed" not in error and "checkpoint" not in error
    main(["evaluate", "--compare", *files, "--varied=samples.labels,samples.sampling.cfg_scale,metrics", "--json"])
    compared = json.loads(capsys.readouterr().out)["values"]["fd_classifier_40"]
    assert compared == [card["values"]["fd_classifier_40"] for card in (first, other)]
    assert "samples.nonsense is not a key" in fail(capsys, "evaluate", "--compare", *files, "--varied=samples.nonsense")
    (root / "broken.json").write_text("[]")
    assert "not a result" in fail(capsys, "evaluate", "--compare", files[0], root / "broken.json")


def test_an_evaluation_by_other_settings_is_not_lost_in_silence(root, capsys):
    """What differs is told before anything is drawn; fewer metrics would lose figures, too."""
    before = (root / "first" / "evaluation.json").read_bytes()
    command = [
        "evaluate",
        f"--workdir={root / 'dit'}",
        f"--cache={root / 'cache'}",
        f"--output={root / 'first'}",
        *DRAW,
    ]
    error = fail(capsys, *command, "--seed=1", "--cfg_scale=1")
    assert "samples.seed: 0 -> 1" in error and "cfg_scale: 2.0 -> 1.0" in error
    assert "--output=DIR" in error and "--overwrite" in error
    assert "metrics.is.splits: 10 -> none" in fail(capsys, *command, "--metrics=fd")
    assert (root / "first" / "evaluation.json").read_bytes() == before and not list((root / "first").glob(".parts-*"))


@pytest.mark.parametrize("content", [b"[]", b"{}", b"{", b'{"subject": 3}'])
def test_what_is_no_result_is_lost_no_more_than_one(content, tmp_path):
    path = tmp_path / "evaluation.json"
    refuse_other(path, {"seed": 0}, overwrite=False)
    path.write_bytes(content)
    refuse_other(path, {"seed": 0}, overwrite=True)
    with pytest.raises(ValueError, match="give --output=DIR"):
        refuse_other(path, {"seed": 0}, overwrite=False)


def test_a_folder_of_pictures_is_measured_as_the_file_of_the_same_images(root, tmp_path, monkeypatch, capsys):
    """And other images into the same output are refused, though all that is known before they are read is the same."""
    from dit_jax.evaluation import evaluator as module
    from dit_jax.evaluation.networks import named_network

    data = load_config(str(root / "dit.py")).data
    network = named_network("classifier", data, root / "cache")
    monkeypatch.setattr(module, "named_network", lambda *_: network)
    drawn = ["sample", f"--workdir={root / 'dit'}", f"--output={tmp_path}", "--num_samples=12", "--steps=2", "--png"]
    main(drawn)
    results = {}
    for name in ("samples.npz", "png"):
        command = ["evaluate", f"--samples={tmp_path / name}", f"--reference={data.name}", "--features=resnet50"]
        command += [f"--cache={root / 'cache'}", "--metrics=fd", f"--output={tmp_path / f'of {name}'}"]
        main(command)
        results[name] = read(tmp_path / f"of {name}")
    assert results["png"]["values"] == results["samples.npz"]["values"]
    assert results["png"]["subject"] == results["samples.npz"]["subject"]
    assert results["png"]["protocol"]["samples"]["source"] == "a folder of images"
    before = (tmp_path / "of png" / "evaluation.json").read_bytes()
    main(command)
    assert (tmp_path / "of png" / "evaluation.json").read_bytes() == before
    (tmp_path / "png" / "000000.png").write_bytes((tmp_path / "png" / "000001.png").read_bytes())
    assert "images: " in fail(capsys, *command)


def test_a_file_of_the_same_images_gives_the_same_figures(root, tmp_path, capsys):
    command = ["sample", f"--workdir={root / 'dit'}", f"--output={tmp_path}", "--num_samples=40", "--steps=2"]
    main(command)
    with np.load(tmp_path / "samples.npz") as file:
        np.savez(tmp_path / "reference.npz", arr_0=file["arr_0"][::-1])
    evaluated = ["evaluate", f"--samples={tmp_path / 'samples.npz'}", f"--reference={tmp_path / 'reference.npz'}"]
    error = fail(capsys, *evaluated, "--features=classifier", f"--output={tmp_path}")
    assert "is trained on a data set" in error
    error = fail(capsys, "evaluate", f"--samples={tmp_path / 'samples.npz'}")
    assert "needs a --reference" in error


def test_two_processes_with_a_device_each_give_the_result_of_eight_devices(root, tmp_path):
    """To the byte: images and features do not depend on devices and processes, nor sums on the order of either."""
    (kept,) = (root / "cache").glob("classifier-*.safetensors")
    shutil.copy(kept, tmp_path)  # the reference's statistics are computed anew
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "dit_jax", "evaluate", f"--workdir={root / 'dit'}", *DRAW]
    command += [f"--cache={tmp_path}", f"--output={tmp_path / 'two'}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "DIT_JAX_COORDINATOR": coordinator}
    environment |= {"DIT_JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(command, env=environment | {"DIT_JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    results = [(folder / "evaluation.json").read_bytes() for folder in (tmp_path / "two", root / "first")]
    assert results[0] == results[1]


def test_a_sweep_has_every_combination_and_goes_on_where_it_stopped(root, capsys):
    output = root / "swept"
    sweep = ["--sweep.cfg_scale=1,2", "--sweep.steps=1,2", "--sweep.ema_length=0.1", "--metrics=fd,recognised"]
    evaluate(root, output, *sweep)
    table = capsys.readouterr().out
    points = sorted((output / "sweep").iterdir())
    assert len(points) == 4 and points[0].name == "ema_length_0.1_steps_1_cfg_scale_1.0.json"
    assert table.splitlines()[0].split() == ["ema_length", "steps", "cfg_scale", "fd_classifier_40", "recognised"]
    charts = [output / f"fd_classifier_40_by_{axis}.svg" for axis in ("cfg_scale", "steps")]
    assert all("<polyline" in chart.read_text() for chart in charts)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in points}
    stale = check_seal(json.loads(points[1].read_text()))
    stale["protocol"]["samples"]["seed"] = 7
    points[1].write_text(json.dumps(sealed(stale)))
    points[2].unlink()  # as a kill would leave it
    damaged = points[3].read_text().replace('"fd_classifier_40": ', '"fd_classifier_40": 1', 1)  # another figure
    points[3].write_text(damaged)
    command = ["evaluate", f"--workdir={root / 'dit'}", f"--cache={root / 'cache'}", f"--output={output}"]
    assert "samples.seed: 7 -> 0" in fail(capsys, *command, *DRAW, *sweep) and not points[2].exists()
    evaluate(root, output, *sweep, "--overwrite")
    for path, (time, content) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path == points[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics=fid"], "fid is of Inception's features alone"),
        (["--metrics=fad"], "'fad' must be one of fd, sfid"),
        (["--metrics=sfid"], "sfid cannot be measured: the network has no spatial features"),
        (["--metrics=kid"], "kid cannot be measured: it needs 1,000 images"),
        (["--labels=some"], "--labels=some must be one of balanced, random"),
        (["--features=clip"], "--features=clip must be one of classifier, inception"),
        (["--sweep.steps=1,one"], "--sweep.steps=1,one must be numbers"),
        (["--sweep.sampler=ddim,dance"], "must be one of"),
        (["--sweep.cfg_scale=1,1"], "has a value twice"),
        (["--samples=x.npz"], "give one of --workdir, --samples and --compare"),
    ],
)
def test_mistakes_are_one_line(root, capsys, flags, message):
    command = ["evaluate", f"--workdir={root / 'dit'}", f"--cache={root / 'cache'}", *DRAW, *flags]
    assert message in fail(capsys, *command)


def test_a_run_measures_its_samples_while_it_trains_and_says_how_many(root):
    """And the figure is that of `evaluate` of the same weights, drawn alike."""
    workdir = root / "measured"
    flags = ["--config.evaluation.num_samples=40", f"--config.evaluation.cache={root / 'cache'}"]
    flags += ["--config.optimizer.learning_rate=0.03"]
    main(["train", f"--config={root / 'dit.py'}", f"--workdir={workdir}", *flags])
    row = [row for row in read_metrics(workdir) if row["split"] == "eval"][-1]
    assert row["step"] == 8 and row["fd_classifier_40"] > 0 and 0 <= row["recognised"] <= 1
    command = ["evaluate", f"--workdir={workdir}", f"--cache={root / 'cache'}", "--num_samples=40", "--metrics=fd"]
    main(command)
    values = read(workdir / "evaluation")["values"]
    assert values["fd_classifier_40"] == pytest.approx(row["fd_classifier_40"], rel=1e-3)
    main(["report", f"--workdir={workdir}", f"--output={root / 'report.html'}"])
    page = (root / "report.html").read_text()
    assert "FD-images-classifier, 40 images" in page and "samples.sampling.cfg_scale" in page


def test_runs_that_were_evaluated_alike_are_compared_by_their_cost(root, capsys):
    workdirs = [root / "dit", root / "measured"]
    evaluate(root, root / "dit" / "evaluation", "--metrics=fd")
    report = ["report", *(f"--workdir={workdir}" for workdir in workdirs), f"--output={root / 'report.html'}"]
    assert "do not compare" in fail(capsys, *report)  # by 2 steps and by 3
    evaluate(root, root / "dit" / "evaluation", "--metrics=fd", "--steps=3", "--overwrite")
    main([*report, f"--charts={root / 'charts'}"])
    page = (root / "report.html").read_text()
    assert "Evaluations compared" in page and "Gflops" in page
    assert "<polyline" in (root / "charts" / "fd_classifier_40_by_gflops.svg").read_text()


@pytest.mark.parametrize("key", ["sampling.num_steps=2", "data.image_size=8"])
def test_what_samples_of_a_file_cannot_have_is_refused(capsys, key):
    error = fail(capsys, "evaluate", "--samples=x.npz", "--reference=fashion_mnist", f"--config.{key}")
    assert f"--config.{key.partition('=')[0]} cannot be set for --samples" in error
