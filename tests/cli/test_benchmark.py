"""`dit-jax benchmark`: its figures follow from one another, for each part and both stages; mistakes cost one line."""

import json

import jax
import pytest

from dit_jax.cli.main import main
from dit_jax.config import config_to_dict
from dit_jax.evaluation import speed
from dit_jax.models.cost import describe_cost
from dit_jax.parallel.chips import Chip
from tests.tiny import autoencoder_config, dit_config, make_image_folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The tiny configs by stage, each with its file."""
    root = tmp_path_factory.mktemp("benchmark")
    folder, files = make_image_folder(root / "images"), {}
    for config in (autoencoder_config(folder), dit_config(folder)):
        file = root / f"{config.stage}.py"
        values = f"ConfigDict({config_to_dict(config)!r})"
        file.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return {values}\n")
        files[config.stage] = config, file
    return files


def benchmark(capsys, file, *more) -> dict:
    capsys.readouterr()
    main(["benchmark", f"--config={file}", "--steps=4", "--json", *more])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("stage", "parts"), [("autoencoder", ["train", "data", "encode"]), ("diffusion", ["train", "data", "sample"])]
)
def test_the_figures_follow_from_one_another(stage, parts, configs, capsys):
    config, file = configs[stage]
    report = benchmark(capsys, file, f"--what={','.join(parts)}")
    assert report["jax"] == jax.__version__ and report["device_kind"] == "cpu" and report["devices"] == 8
    assert report["mesh"]["data"] == 8 and report["global_batch_size"] == 8
    assert report["peak_memory_of"] == "process" and report["peak_memory_bytes"] > 2**20
    for part in parts:
        figures = report[part]
        rate = figures["steps_per_second" if part == "train" else "batches_per_second"]
        assert rate == pytest.approx(figures["calls"] / figures["seconds"])
        assert figures["images_per_second"] == pytest.approx(rate * figures["batch_size"])
        assert figures["images_per_second_per_chip"] == pytest.approx(figures["images_per_second"] / report["chips"])
    train = report["train"]
    assert train["calls"] == 4 and 0 <= train["data_wait"] <= 1 and train["compile_seconds"] > 0
    flops = 6 * describe_cost(config)["macs"] * train["images_per_second"]
    assert train["model_flops_per_second"] == pytest.approx(flops)
    assert train["mfu"] is None  # a CPU has no peak in the table: the most is what a matmul reaches
    assert train["share_of_matmul"] == pytest.approx(flops / train["matmul_flops_per_second"])
    assert report["data"]["source"] == f"images of {config.data.name}"
    if stage == "diffusion":
        assert report["sample"]["num_steps"] == 3 and report["sample"]["decoded"]


def test_mfu_is_six_times_the_multiply_adds_over_the_peak_of_all_chips(configs, capsys, monkeypatch):
    config, file = configs["diffusion"]
    chip = Chip("half a chip a device", 1e9, 1, 1, 1, devices=2)
    monkeypatch.setitem(speed.CHIPS, "cpu", chip)
    report = benchmark(capsys, file)
    train = report["train"]
    assert report["chips"] == 4
    assert train["peak_flops"] == 4 * 1e9
    flops = 6 * describe_cost(config)["macs"] * train["images_per_second"]
    assert train["mfu"] == pytest.approx(flops / 4e9)


def test_without_data_the_pipeline_reads_synthetic_latents(configs, capsys):
    """The config of a latent cache that is not there yet."""
    _, file = configs["diffusion"]
    report = benchmark(capsys, file, "--config.latents.shape=(4,4,2)", "--what=train,data,sample")
    assert report["data"]["source"] == "synthetic, in memory"
    assert not report["sample"]["decoded"]


def test_a_profile_is_written_and_people_get_lines(configs, capsys, tmp_path):
    _, file = configs["diffusion"]
    main(["benchmark", f"--config={file}", "--steps=2", f"--profile={tmp_path / 'profile'}"])
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    output = capsys.readouterr().out
    for text in (f"JAX {jax.__version__}, 8 x cpu, mesh data 8, batch 8", "steps/s", "waiting for data", "peak memory"):
        assert text in output


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("autoencoder", ["--what=sample"], "--what=sample needs a config of stage 'diffusion'"),
        ("diffusion", ["--what=encode"], "--what=encode needs an autoencoder"),
        ("diffusion", ["--what=speed"], "--what=speed must name each once of train, data, encode, sample"),
        ("diffusion", ["--what=data", "--profile=p"], "add train to --what=data"),
        ("diffusion", ["--steps=0"], "--steps=0 must be positive"),
        ("diffusion", ["--config.training.global_batch_size=12"], "divisible by the 8 devices"),
    ],
)
def test_bad_flags_give_one_line(stage, flags, message, configs, capsys):
    _, file = configs[stage]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", f"--config={file}", *flags])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
