"""The program: bad input gives one line and a non-zero exit; help is quick; the verbs work one after the other."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import dit_jax
from dit_jax.cli.main import VERBS, main, split_overrides
from dit_jax.config import config_to_dict
from dit_jax.metrics.history import read_metrics
from tests.tiny import NUM_CLASSES, autoencoder_config, dit_config, make_image_folder

ROOT = pathlib.Path(__file__).parents[2]


def write_config(path: pathlib.Path, config) -> pathlib.Path:
    values = config_to_dict(config)
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A trained autoencoder, its latents and a DiT trained on them, made by the program."""
    root = tmp_path_factory.mktemp("program")
    folder = make_image_folder(root / "images")
    config = write_config(root / "autoencoder.py", autoencoder_config(folder))
    main(["train", f"--config={config}", f"--workdir={root / 'autoencoder'}"])
    main(["encode", f"--config={config}", f"--autoencoder={root / 'autoencoder'}", f"--output={root / 'latents'}"])
    dit = config_to_dict(dit_config(folder)) | {"latents": {"shape": (4, 4, 2), "path": str(root / "latents")}}
    text = f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({dit!r})\n"
    (root / "dit.py").write_text(text)
    main(["train", f"--config={root / 'dit.py'}", f"--workdir={root / 'dit'}"])
    return root


def fail(capsys, *argv) -> str:
    """Runs the program, which must exit with 2 and one line on standard error, beside warnings; returns all of it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in argv])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert len([line for line in error.splitlines() if line and not line.startswith("warning: ")]) == 1, error
    assert "Traceback" not in error
    return error


def test_the_verbs_work_one_after_the_other(root, capsys):
    output = root / "drawn"
    main(
        [
            "sample",
            f"--workdir={root / 'dit'}",
            f"--output={output}",
            "--num_samples=7",
            "--sampler=ancestral",
            "--steps=4",
        ]
    )
    with np.load(output / "samples.npz", allow_pickle=False) as samples:
        assert samples["arr_0"].shape == (7, 8, 8, 3) and samples["arr_0"].dtype == np.uint8
        assert samples["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert Image.open(output / "grid.png").mode == "RGB"
    capsys.readouterr()
    main(["info", f"--workdir={root / 'dit'}", "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info["stage"] == "diffusion" and info["step"] == 4
    assert info["parameters"] == sum(x.size for x in leaves(dit_jax.load(root / "dit").params))
    main(
        [
            "report",
            f"--workdir={root / 'autoencoder'}",
            f"--workdir={root / 'dit'}",
            f"--samples={output}",
            f"--output={root / 'report.html'}",
        ]
    )
    assert "<html" in (root / "report.html").read_text()


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_a_finished_run_and_a_finished_cache_are_left_as_they_are(root, capsys):
    before = (root / "latents" / "manifest.json").read_bytes()
    main(
        [
            "encode",
            f"--config={root / 'autoencoder.py'}",
            f"--autoencoder={root / 'autoencoder'}",
            f"--output={root / 'latents'}",
        ]
    )
    assert "already holds" in capsys.readouterr().out
    assert (root / "latents" / "manifest.json").read_bytes() == before
    rows = read_metrics(root / "dit")
    main(["train", f"--config={root / 'dit.py'}", f"--workdir={root / 'dit'}"])
    assert read_metrics(root / "dit") == rows


def test_a_diffusion_workdir_draws_without_the_cache_and_the_autoencoder_it_came_from(root, tmp_path):
    shutil.copytree(root / "dit", tmp_path / "moved")
    model = dit_jax.load(tmp_path / "moved")
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    latents = model.encode(images)
    assert latents.shape == (2, 4, 4, 2)
    assert model.decode(latents).shape == images.shape
    np.testing.assert_array_equal(
        model.sample([1, 2], num_steps=3, seed=5), dit_jax.load(root / "dit").sample([1, 2], num_steps=3, seed=5)
    )


def test_overrides_are_told_from_other_flags():
    argv, overrides = split_overrides(["train", "--config=a.py", "--config.b.c=1", "--workdir=w", "--config.d", "2"])
    assert argv == ["train", "--config=a.py", "--workdir=w"]
    assert overrides == [("b.c", "1"), ("d", "2")]


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb):
    code = (
        "import sys\nfrom dit_jax.cli.main import main\n"
        f"try:\n    main(['{verb}', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'orbax', 'grain', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout


@pytest.mark.parametrize(
    ("before", "after"),
    {
        None: "glibc.malloc.hugetlb=1",
        "glibc.malloc.arena_max=8": "glibc.malloc.arena_max=8:glibc.malloc.hugetlb=1",
        "glibc.malloc.hugetlb=0": "glibc.malloc.hugetlb=0",
    }.items(),
)
@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that has these huge pages")
def test_program_goes_on_as_the_same_process_with_huge_pages_unless_told_otherwise(before, after):
    code = (
        "import os, sys\nfrom dit_jax.cli.main import use_huge_pages\nuse_huge_pages()\n"
        "print(os.getpid(), *sys.argv[1:], os.environ['GLIBC_TUNABLES'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if before is None else {"GLIBC_TUNABLES": before}
    command = [sys.executable, "-c", code, "an argument"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0] == f"{process.pid} an argument {after}\n"


TRAIN = ("train", "--config={root}/dit.py", "--workdir={tmp}/w")
BAD_INPUTS = {
    "unknown key": (
        (*TRAIN, "--config.dit.dept=3"),
        "config.dit.dept is not a config key; did you mean config.dit.depth?",
    ),
    "unknown section": ((*TRAIN, "--config.optimiser.b1=0"), "did you mean config.optimizer?"),
    "mistyped value": (
        (*TRAIN, "--config.training.num_train_steps=many"),
        "config.training.num_train_steps='many' must be int",
    ),
    "no such config": (("train", "--config=none.py", "--workdir={tmp}/w"), "no such file"),
    "indivisible batch": (
        (*TRAIN, "--config.training.global_batch_size=12"),
        "divisible by the 8 devices that split it; try",
    ),
    "impossible mesh": ((*TRAIN, "--config.mesh.data=3"), "must multiply to the 8 devices"),
    "missing cache": ((*TRAIN, "--config.latents.path={tmp}/none"), "no latent cache at"),
    "cache of another shape": (
        (*TRAIN, "--config.latents.shape=(4,4,4)"),
        "config.latents.shape=(4, 4, 4) but the latent cache",
    ),
    "missing folder": (
        ("train", "--config={root}/autoencoder.py", "--workdir={tmp}/w", "--config.data.name=/none"),
        "no such folder",
    ),
    "missing data set": (
        (
            "train",
            "--config={root}/autoencoder.py",
            "--workdir={tmp}/w",
            "--config.data.name=no_such_set",
            "--config.data.data_dir={tmp}",
        ),
        "no_such_set",
    ),
    "workdir of another config": (
        ("train", "--config={root}/dit.py", "--workdir={root}/dit", "--config.dit.width=64"),
        "config.dit.width: 32 -> 64",
    ),
    "workdir of another stage": (
        ("train", "--config={root}/dit.py", "--workdir={root}/autoencoder"),
        "config.stage: 'autoencoder' -> 'diffusion'",
    ),
    "unwritable workdir": (("train", "--config={root}/dit.py", "--workdir=/proc/none/w"), "cannot be written"),
    "workdir in a bucket": (("train", "--config={root}/dit.py", "--workdir=gs://bucket/w"), "mount the bucket"),
    "workdir is a file": (("train", "--config={root}/dit.py", "--workdir={root}/dit.py"), "cannot be written"),
    "encode through a DiT": (
        ("encode", "--config={root}/autoencoder.py", "--autoencoder={root}/dit", "--output={tmp}/l"),
        "give an autoencoder's workdir",
    ),
    "encode over another cache": (
        (
            "encode",
            "--config={root}/autoencoder.py",
            "--autoencoder={root}/autoencoder",
            "--output={root}/latents",
            "--config.data.horizontal_flip=False",
        ),
        "choose another",
    ),
    "sample from an autoencoder": (
        ("sample", "--workdir={root}/autoencoder", "--output={tmp}/s"),
        "give a diffusion run's",
    ),
    "sample from nothing": (("sample", "--workdir={tmp}/none", "--output={tmp}/s"), "has no checkpoints"),
    "label out of range": (("sample", "--workdir={root}/dit", "--output={tmp}/s", "--labels=3"), "must be from 0 to 2"),
    "too many steps": (
        ("sample", "--workdir={root}/dit", "--output={tmp}/s", "--steps=2000"),
        "from 1 to the 1000 timesteps",
    ),
    "info of nothing": (("info",), "give one of --config=FILE and --workdir=DIR"),
    "report of nothing": (("report", "--workdir={tmp}", "--output={tmp}/r.html"), "is not a workdir"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gives_one_line_with_its_remedy(name, root, tmp_path, capsys):
    argv, message = BAD_INPUTS[name]
    assert message in fail(capsys, *(argument.format(root=root, tmp=tmp_path) for argument in argv))


def test_corrupt_images_stop_a_run_with_their_name_and_are_no_data_to_resume_on(tmp_path, capsys):
    folder = make_image_folder(tmp_path / "images")
    config = write_config(tmp_path / "config.py", autoencoder_config(folder))
    command = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    main(command)
    for image in folder.glob("*/00*.png"):
        image.write_bytes(image.read_bytes()[:40])
    assert "other images" in fail(capsys, *command, "--config.training.num_train_steps=8")
    assert dit_jax.load(tmp_path / "run").step == 4
    error = fail(capsys, *command, f"--workdir={tmp_path / 'new'}")
    assert "cannot read image" in error and str(folder) in error


def test_the_smallest_class_count_is_checked_against_the_folder(root, tmp_path, capsys):
    command = [
        "train",
        f"--config={root / 'autoencoder.py'}",
        f"--workdir={tmp_path / 'w'}",
        "--config.data.num_classes=7",
    ]
    assert f"must be {NUM_CLASSES}" in fail(capsys, *command)
