"""`dit-jax info` of an autoencoder: its codebook's parameters, and its discriminator's aside."""

import json

import pytest

from dit_jax.cli.main import main
from tests.checkpoint.test_older_layouts import remove_manifest
from tests.checkpoint.trees import save_steps

CONFIG = "--config=configs/autoencoder_kl.py:f4"


@pytest.mark.parametrize(("num_layers", "parameters"), [(3, 2_765_633), (2, 663_361)])
def test_a_discriminator_is_counted_beside_the_autoencoder(num_layers, parameters, capsys):
    flags = ("info", CONFIG, f"--config.autoencoder.discriminator.num_layers={num_layers}")
    main([*flags, "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info["discriminator_parameters"] == parameters
    assert info["parameters"] == sum(info["modules"].values()) == 55_312_063
    main(flags)
    assert f"and in training a discriminator of {parameters:,} parameters\n" in capsys.readouterr().out


def test_the_codes_of_a_vq_autoencoder_are_counted_and_no_discriminator_where_there_is_none(capsys):
    without = ["--config.autoencoder.discriminator=None"]
    main(["info", CONFIG, *without, "--config.autoencoder.codebook.num_codes=8192", "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info["modules"]["quantize"] == 8192 * 3 and info["parameters"] == 55_322_782
    assert "discriminator_parameters" not in info


def test_verify_tells_of_each_checkpoint_and_fails_where_one_is_damaged(tmp_path, capsys):
    save_steps(tmp_path, [1, 2])
    save_steps(tmp_path, [1], folder="snapshots")
    save_steps(tmp_path / "autoencoder", [7, 8])
    remove_manifest(tmp_path / "autoencoder" / "checkpoints" / "7")
    verify = ["info", f"--workdir={tmp_path}", "--verify"]
    main(verify)
    lines = capsys.readouterr().out.splitlines()
    paths = ["autoencoder/checkpoints/7", "autoencoder/checkpoints/8", "checkpoints/1", "checkpoints/2", "snapshots/1"]
    assert [line.split(": ")[0] for line in lines] == paths
    assert [line.split(": ")[1] for line in lines] == ["unverifiable", "good", "good", "good", "good"]
    assert "7 arrays" in lines[1]

    damaged = tmp_path / "checkpoints" / "2" / "opt_state" / "_METADATA"
    damaged.write_text(damaged.read_text().replace("mu", "nu", 1))
    with pytest.raises(SystemExit, match="2"):
        main([*verify, "--json"])
    output = capsys.readouterr()
    reports = {report["path"]: report for report in json.loads(output.out)["checkpoints"]}
    assert [report["state"] for report in reports.values()] == ["unverifiable", "good", "good", "damaged", "good"]
    assert "opt_state/_METADATA has other bytes" in reports["checkpoints/2"]["reason"]
    assert "1 of 5 checkpoints" in output.err and "checkpoints/2" in output.err and output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--verify", CONFIG], "--verify needs --workdir"), (["--verify", "--workdir=x"], "x has no")],
)
def test_verify_without_checkpoints_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["info", *flags])
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
